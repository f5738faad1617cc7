"""linear: the weighted mean of the parents (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from workers.merging.methods.gram import combine, weights_cancel
from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register


def merge(piece: Slice, values: Values) -> None:
    """out = sum_i w_i x_i / sum_i w_i; the plain sum if `normalize` is 0.

    Weights that sum to 0 are refused if they are to be normalized, where mergekit divides by zero.
    """
    factors = coefficients(values)
    combine(piece.parents.values(), [factors[name] for name in piece.parents], None, piece.out)


def coefficients(values: Values) -> dict[str, float]:
    """w_i / sum_i w_i; w_i if `normalize` is 0."""
    weights: dict[str, float] = values["weight"]
    total = sum(weights.values()) if values["normalize"] else 1.0
    return {name: weight / total for name, weight in weights.items()}


def check(values: Values) -> str | None:
    return weights_cancel(values["weight"]) if values["normalize"] else None


register(
    MergeMethod(
        name="linear",
        summary="weighted mean of the parents (arXiv 2203.05482)",
        parameters=(
            Parameter("weight", "per_parent"),
            Parameter("normalize", "flag", default=1.0),
        ),
        merge=merge,
        check=check,
        coefficients=coefficients,
    )
)
