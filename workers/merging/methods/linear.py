"""linear: the weighted mean of the parents (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from workers.errors import BadInputError
from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register


def merge(piece: Slice, values: Values) -> None:
    """out = sum_i w_i x_i / sum_i w_i; the plain sum if `normalize` is 0."""
    weights = values["weight"]
    total = sum(weights.values()) if values["normalize"] else 1.0
    if total == 0:
        raise BadInputError("method linear: the weights sum to 0, so there is nothing to normalize")
    piece.out.zero_()
    for name, parent in piece.parents.items():
        piece.out.add_(parent.mul_(weights[name] / total))


register(
    MergeMethod(
        name="linear",
        summary="weighted mean of the parents (arXiv 2203.05482)",
        parameters=(
            Parameter("weight", "per_parent"),
            Parameter("normalize", "flag", default=1.0),
        ),
        merge=merge,
    )
)
