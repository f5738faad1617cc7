"""task_arithmetic: the base plus weighted task vectors (arXiv 2212.04089)."""

from __future__ import annotations

from workers.merging.methods.consensus import NO_DIVISOR
from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register


def merge(piece: Slice, values: Values) -> None:
    """out = x_0 + lambda * sum_i w_i (x_i - x_0).

    Divided by sum_i w_i if `normalize` is 1, unless that is nearly 0.
    """
    assert piece.base is not None
    weights: dict[str, float] = values["weight"]
    divisor = sum(weights.values()) if values["normalize"] else 1.0
    scale = values["lambda"] / (divisor if abs(divisor) >= NO_DIVISOR else 1.0)
    piece.out.copy_(piece.base)
    for name, parent in piece.parents.items():
        delta = parent.sub_(piece.base)
        piece.out.add_(delta.mul_(scale * weights[name]))


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
    )
)
