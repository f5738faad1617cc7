"""What methods that drop at random must know of the whole tensor: the L1 norms that their masks leave."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from workers.merging.methods.gram import sum_by_halves
from workers.merging.methods.method import Slice, Values

if TYPE_CHECKING:
    from torch import Tensor

Probability = Callable[[Slice, "Tensor", Values, str], "float | Tensor"]
"""(slice, a parent's task vector, parameters, parent): the probability to keep, one or for each element;
may use scratch buffer 1."""


LANES = 1 << 13
"""So many sums are kept side by side until all is added up."""


class NormsLeft:
    """Per parent, the L1 norm of its task vector over that of what its very mask leaves of it.

    Numbers are added up in an order that depends on their places alone, by additions of whole vectors: so
    sums are the same on any processor. Slices lie on a fixed grid.
    """

    def __init__(self, values: Values, probability: Probability) -> None:
        self._values, self._probability = values, probability
        self._whole: dict[str, Tensor] = {}
        self._left: dict[str, Tensor] = {}
        """Sums by parent, fp64: `LANES` of them, or fewer of a small tensor."""

    def update(self, piece: Slice) -> None:
        import torch

        assert piece.base is not None
        for name, parent in piece.parents.items():
            if self._values["density"][name] >= 1.0:
                continue
            delta = parent.sub_(piece.base)
            probability = self._probability(piece, delta, self._values, name)
            mask = piece.keep_mask(name, probability)
            left = torch.mul(delta.abs_(), mask, out=piece.out)
            _add(self._whole, name, _folded(delta.view(-1)))
            _add(self._left, name, _folded(left.view(-1)))

    def merge(self, other: NormsLeft) -> None:
        for own, others in ((self._whole, other._whole), (self._left, other._left)):
            for name, sums in others.items():
                _add(own, name, sums)

    def finish(self) -> dict[str, float]:
        return {
            name: _total(self._whole[name]) / left
            if 0.0 < (left := _total(sums)) < math.inf
            else 1.0
            for name, sums in self._left.items()
        }


def _add(totals: dict[str, Tensor], name: str, sums: Tensor) -> None:
    own = sums.double().clone()
    known = totals.get(name, own[:0])
    longer, shorter = (known, own) if len(known) > len(own) else (own, known)
    longer[: len(shorter)] += shorter
    totals[name] = longer


def _total(sums: Tensor) -> float:
    return float(sum_by_halves(sums.clone()))


def _folded(numbers: Tensor) -> Tensor:
    """Fp32 numbers added to one another until `LANES` or fewer are left, in their memory."""
    while len(numbers) > LANES:
        half = (len(numbers) + 1) // 2
        numbers[: len(numbers) - half].add_(numbers[half:])
        numbers = numbers[:half]
    return numbers


def norms_left(probability: Probability) -> Callable[[Values], NormsLeft | None]:
    """The statistic of a method with such masks: for `rescale: l1`, where something is dropped."""

    def make(values: Values) -> NormsLeft | None:
        drops = any(density < 1.0 for density in values["density"].values())
        return NormsLeft(values, probability) if drops and values["rescale"] == "l1" else None

    return make
