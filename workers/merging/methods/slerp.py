"""slerp: spherical interpolation of two parents (Shoemake 1985), the tensor taken as one vector."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_PARALLEL = 0.9995
"""Above this |cosine| the arc is a line to fp32, and the formula divides by almost nothing."""


class PairMoments:
    """Dot product and squared norms of the two parents over the whole tensor, in float64."""

    def __init__(self, values: Values) -> None:
        self.dot = self.first = self.second = 0.0

    def update(self, piece: Slice) -> None:
        one, two = (parent.double() for parent in piece.parents.values())
        self.dot += sum_by_halves(one * two)
        self.first += sum_by_halves(one * one)
        self.second += sum_by_halves(two * two)

    def merge(self, other: PairMoments) -> None:
        self.dot += other.dot
        self.first += other.first
        self.second += other.second

    def finish(self) -> float:
        """The cosine between the parents; 1 if one of them is zero (interpolated as a line)."""
        norms = math.sqrt(self.first * self.second)
        return max(-1.0, min(1.0, self.dot / norms)) if norms > 0 else 1.0


def sum_by_halves(values: Tensor) -> float:
    """Their sum, added up in an order that depends on their number alone; overwrites them.

    `dot` and `sum` take another order, hence other last bits, for other processors and threads.
    """
    while len(values) > 1:
        half = (len(values) + 1) // 2
        values[: len(values) - half] += values[half:]
        values = values[:half]
    return float(values.sum())


def shares(cosine: float, t: float) -> tuple[float, float]:
    """How much of each parent: sin((1-t)a)/sin(a) and sin(ta)/sin(a), a the angle between them.

    Rounded to fp32, so that the last bits of a float64 sum cannot reach the child.
    """
    if abs(cosine) > NEARLY_PARALLEL:
        first, second = 1.0 - t, t
    else:
        angle = math.acos(cosine)
        first = math.sin((1.0 - t) * angle) / math.sin(angle)
        second = math.sin(t * angle) / math.sin(angle)
    rounded: tuple[float, float] = struct.unpack("<2f", struct.pack("<2f", first, second))
    return rounded


def merge(piece: Slice, values: Values) -> None:
    """out = sin((1-t)a)/sin(a) x_1 + sin(ta)/sin(a) x_2."""
    import torch

    one, two = piece.parents.values()
    first, second = shares(piece.statistic, values["t"])
    torch.add(one.mul_(first), two.mul_(second), out=piece.out)


register(
    MergeMethod(
        name="slerp",
        summary="spherical interpolation of two parents (Shoemake 1985)",
        parameters=(Parameter("t", "shared", low=0.0, high=1.0),),
        merge=merge,
        parents=(2, 2),
        statistic=PairMoments,
    )
)
