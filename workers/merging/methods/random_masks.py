"""What methods that drop at random must know of the whole tensor: the L1 norms that their masks leave."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from workers.merging.methods.method import Slice, Values

if TYPE_CHECKING:
    from torch import Tensor

Probability = Callable[[Slice, "Tensor", Values, str], "float | Tensor"]
"""(slice, a parent's task vector, parameters, parent): the probability to keep, one or for each element;
may use scratch buffer 1."""


STEPS = 24
"""Magnitudes are summed as multiples of the largest one of their slice, rounded up to a power of 2, over
2^STEPS."""

LEAST_EXPONENT = -100
"""Below 2^LEAST_EXPONENT a whole slice counts as nothing: 1 over its step would be no fp32 number."""


class NormsLeft:
    """Per parent, the L1 norm of its task vector over that of what its very mask leaves of it.

    In each slice magnitudes are rounded to whole multiples of a step, whose fp64 sums are exact: so they are
    the same in any order of adding, as differs between processors. Slices lie on a fixed grid.
    """

    def __init__(self, values: Values, probability: Probability) -> None:
        self._values, self._probability = values, probability
        self.whole: dict[str, float] = {}
        self.left: dict[str, float] = {}

    def update(self, piece: Slice) -> None:
        import torch

        assert piece.base is not None
        for name, parent in piece.parents.items():
            if self._values["density"][name] >= 1.0:
                continue
            delta = parent.sub_(piece.base)
            probability = self._probability(piece, delta, self._values, name)
            mask = piece.keep_mask(name, probability)
            steps = delta.abs_()
            most = float(steps.max())
            step = math.ldexp(1.0, max(math.frexp(most)[1], LEAST_EXPONENT) - STEPS)
            steps.mul_(1.0 / step).round_()
            for sums in (self.whole, self.left):
                exact = float(steps.sum(dtype=torch.float64)) * step
                sums[name] = sums.get(name, 0.0) + exact
                steps.mul_(mask)

    def merge(self, other: NormsLeft) -> None:
        for own, others in ((self.whole, other.whole), (self.left, other.left)):
            for name, norm in others.items():
                own[name] = own.get(name, 0.0) + norm

    def finish(self) -> dict[str, float]:
        return {
            name: self.whole[name] / left if 0.0 < left < math.inf else 1.0
            for name, left in self.left.items()
        }


def norms_left(probability: Probability) -> Callable[[Values], NormsLeft | None]:
    """The statistic of a method with such masks: for `rescale: l1`, where something is dropped."""

    def make(values: Values) -> NormsLeft | None:
        drops = any(density < 1.0 for density in values["density"].values())
        return NormsLeft(values, probability) if drops and values["rescale"] == "l1" else None

    return make
