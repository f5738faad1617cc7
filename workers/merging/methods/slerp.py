"""slerp: spherical interpolation of two parents (Shoemake 1985), the tensor taken as one vector."""

from __future__ import annotations

import math

from workers.merging.methods.gram import Matrix, combine, parents_gram
from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register

NEARLY_PARALLEL = 0.9995
"""Above this |cosine| the arc is a line to fp32, and the formula divides by almost nothing."""


def cosine_of(gram: Matrix) -> float:
    """The cosine between two vectors; 1 if one of them is zero (interpolated as a line)."""
    (first, dot), (_, second) = gram
    norms = math.sqrt(first) * math.sqrt(second)
    return max(-1.0, min(1.0, dot / norms)) if norms > 0 else 1.0


def shares(cosine: float, t: float, nearly_parallel: float) -> tuple[float, float]:
    """How much of each vector: sin((1-t)a)/sin(a) and sin(ta)/sin(a), a the angle between them.

    1 - t and t, a line, where |cosine| is above `nearly_parallel`.
    """
    if abs(cosine) > nearly_parallel:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return (
        math.sin((1.0 - t) * angle) / math.sin(angle),
        math.sin(t * angle) / math.sin(angle),
    )


def merge(piece: Slice, values: Values) -> None:
    """out = sin((1-t)a)/sin(a) x_1 + sin(ta)/sin(a) x_2.

    mergekit takes a tensor that is zero as orthogonal to the other; here the way to it is a line.
    """
    cosine = cosine_of(piece.statistic)
    combine(piece.parents.values(), shares(cosine, values["t"], NEARLY_PARALLEL), None, piece.out)


register(
    MergeMethod(
        name="slerp",
        summary="spherical interpolation of two parents (Shoemake 1985)",
        parameters=(Parameter("t", "shared", low=0.0, high=1.0),),
        merge=merge,
        parents=(2, 2),
        statistic=parents_gram,
    )
)
