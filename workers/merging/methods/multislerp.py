"""multislerp: interpolation between any number of parents on a sphere."""

from __future__ import annotations

import math

from workers.merging.methods.gram import (
    Matrix,
    combine,
    is_finite,
    task_vectors_gram,
    vectors_of,
    weights_cancel,
)
from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register


def coefficients(gram: Matrix, weights: list[float], normalize: bool, eps: float) -> list[float]:
    """c_i = w_i / (|v_i| + eps) * sum_j w_j |v_j| / |m|, m = sum_j w_j v_j / (|v_j| + eps).

    w_i where m is zero to `eps`, so that it has no direction.
    """
    if normalize:
        total = sum(weights)
        weights = [weight / total for weight in weights]
    if not is_finite(gram):
        return weights
    norms = [math.sqrt(row[i]) for i, row in enumerate(gram)]
    shares = [
        weight / (norm + eps) if norm else 0.0 for weight, norm in zip(weights, norms, strict=True)
    ]
    length = norm_of(gram, shares)
    if length <= eps:
        return weights
    mean_norm = sum(weight * norm for weight, norm in zip(weights, norms, strict=True))
    return [share * mean_norm / length for share in shares]


def norm_of(gram: Matrix, shares: list[float]) -> float:
    """|sum_i c_i v_i|."""
    square = sum(
        one * other * gram[i][j] for i, one in enumerate(shares) for j, other in enumerate(shares)
    )
    return math.sqrt(max(square, 0.0))


def merge(piece: Slice, values: Values) -> None:
    """out = the direction of sum_i w_i v_i / |v_i|, times sum_i w_i |v_i|.

    v_i are the parents; with a base they are the task vectors, and the base is added. mergekit writes it
    with a tangent space at that direction, where the weighted mean of what it maps is 0 by construction.
    Where the weighted directions cancel the result is sum_i w_i v_i, as in mergekit with two parents;
    with more it stops.
    """
    found = coefficients(
        piece.statistic,
        [values["weight"][name] for name in piece.parents],
        bool(values["normalize_weights"]),
        values["eps"],
    )
    combine(vectors_of(piece), found, piece.base, piece.out)


def check(values: Values) -> str | None:
    return weights_cancel(values["weight"]) if values["normalize_weights"] else None


register(
    MergeMethod(
        name="multislerp",
        summary="interpolation on a sphere between any number of parents, or of task vectors",
        parameters=(
            Parameter("weight", "per_parent"),
            Parameter("normalize_weights", "flag", default=1.0),
            Parameter("eps", "shared", low=0.0, high=1.0, default=1e-8),
        ),
        merge=merge,
        check=check,
        uses_base="optional",
        statistic=task_vectors_gram,
    )
)
