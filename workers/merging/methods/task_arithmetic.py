"""task_arithmetic: the base plus weighted task vectors (arXiv 2212.04089)."""

from __future__ import annotations

from workers.merging.methods.consensus import NO_DIVISOR
from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register


def merge(piece: Slice, values: Values) -> None:
    """out = x_0 + lambda * sum_i w_i (x_i - x_0).

    Divided by sum_i w_i if `normalize` is 1, unless that is nearly 0.
    """
    assert piece.base is not None
    factors = coefficients(values)
    piece.out.copy_(piece.base)
    for name, parent in piece.parents.items():
        delta = parent.sub_(piece.base)
        piece.out.add_(delta.mul_(factors[name]))


def coefficients(values: Values) -> dict[str, float]:
    """What each task vector is multiplied by: lambda * w_i, divided as `merge` says."""
    weights: dict[str, float] = values["weight"]
    divisor = sum(weights.values()) if values["normalize"] else 1.0
    scale = values["lambda"] / (divisor if abs(divisor) >= NO_DIVISOR else 1.0)
    return {name: scale * weight for name, weight in weights.items()}


register(
    MergeMethod(
        name="task_arithmetic",
        summary="base plus weighted task vectors (arXiv 2212.04089)",
        parameters=(
            Parameter("weight", "per_parent"),
            Parameter("lambda", "shared", default=1.0),
            Parameter("normalize", "flag", default=0.0),
        ),
        merge=merge,
        uses_base="always",
        coefficients=coefficients,
    )
)
