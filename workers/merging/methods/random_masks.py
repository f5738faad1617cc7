"""What methods that drop at random must know of the whole tensor: the L1 norms that their masks leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from workers.merging.methods.magnitudes import BinCounts
from workers.merging.methods.method import Slice, Values

if TYPE_CHECKING:
    from torch import Tensor

Probability = Callable[[Slice, "Tensor", Values, str], "float | Tensor"]
"""(slice, a parent's task vector, parameters, parent): the probability to keep, one or for each element;
may use scratch buffer 1."""


class NormsLeft:
    """Per parent, the L1 norm of its task vector over that of what its very mask leaves of it.

    From counts in magnitude bins, as the norms of `magnitudes.Magnitudes`: exact sums for any order.
    """

    def __init__(self, values: Values, probability: Probability) -> None:
        self._values, self._probability = values, probability
        self.whole: dict[str, BinCounts] = {}
        self.left: dict[str, BinCounts] = {}

    def update(self, piece: Slice) -> None:
        import torch

        assert piece.base is not None
        for name, parent in piece.parents.items():
            if self._values["density"][name] >= 1.0:
                continue
            delta = parent.sub_(piece.base)
            probability = self._probability(piece, delta, self._values, name)
            mask = piece.keep_mask(name, probability)
            left = torch.mul(delta, mask, out=piece.scratch(0))
            self.left.setdefault(name, BinCounts()).add(left, piece.out)
            self.whole.setdefault(name, BinCounts()).add(delta, piece.out)

    def merge(self, other: NormsLeft) -> None:
        for own, others in ((self.whole, other.whole), (self.left, other.left)):
            for name, counts in others.items():
                own.setdefault(name, BinCounts()).merge(counts)

    def finish(self) -> dict[str, float]:
        ratios = {}
        for name, counts in self.left.items():
            left, whole = counts.finish(), self.whole[name].finish()
            has_norm = left.total > 0 and left.norms[-1] > 0
            ratios[name] = float(whole.norms[-1] / left.norms[-1]) if has_norm else 1.0
        return ratios


def norms_left(probability: Probability) -> Callable[[Values], NormsLeft | None]:
    """The statistic of a method with such masks: for `rescale: l1`, where something is dropped."""

    def make(values: Values) -> NormsLeft | None:
        drops = any(density < 1.0 for density in values["density"].values())
        return NormsLeft(values, probability) if drops and values["rescale"] == "l1" else None

    return make
