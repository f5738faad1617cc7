"""model_stock: from the base towards the parents' mean, as far as their angles tell (arXiv 2403.19522)."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING

from workers.merging.methods.gram import (
    GramMatrix,
    Matrix,
    combine,
    row_products,
    symmetric,
    task_vectors_gram,
    vectors_of,
)
from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register

if TYPE_CHECKING:
    from torch import Tensor

LEAST_COSINE = 0.0
"""Task vectors that point away from each other have nothing in common to go along."""


def ratio(gram: Matrix) -> float:
    """t of the whole tensor, from the mean cosine between two task vectors; one that is zero has 0."""
    cosines = []
    for i, j in combinations(range(len(gram)), 2):
        norms = math.sqrt(gram[i][i]) * math.sqrt(gram[j][j])
        cosines.append(min(gram[i][j] / norms, 1.0) if 0.0 < norms < math.inf else 0.0)
    mean = max(sum(cosines) / len(cosines), LEAST_COSINE)
    return len(gram) * mean / (1.0 + (len(gram) - 1) * mean)


def row_ratios(products: Tensor) -> Tensor:
    """`ratio` for each row: fp32 `[rows, 1]` of the products `[pairs, rows]`."""
    gram = symmetric([*products])
    total = products.new_zeros(products.shape[1:])
    pairs = list(combinations(range(len(gram)), 2))
    for i, j in pairs:
        norms = gram[i][i].sqrt() * gram[j][j].sqrt()
        total += (gram[i][j] / norms).nan_to_num_(nan=0.0).clamp_(max=1.0)
    mean = (total / len(pairs)).clamp_(min=LEAST_COSINE)
    return (len(gram) * mean / (1.0 + (len(gram) - 1) * mean)).float().unsqueeze(1)


def merge(piece: Slice, values: Values) -> None:
    """out = x_0 + t mean_i d_i, t = K cos / (1 + (K-1) cos), cos the mean cosine of the K task vectors.

    For the whole tensor, or with `filter_wise: 1` for each row.

    A negative cos is taken as 0, where mergekit steps back from the base, by any length as cos nears
    -1/(K-1); and mergekit makes cos smaller where |d_i| |d_j| is below 1e-6, which is the rule for rows of
    little change.
    """
    vectors = vectors_of(piece)
    t = row_ratios(row_products(vectors)) if values["filter_wise"] else ratio(piece.statistic)
    combine(vectors, [t / len(vectors)] * len(vectors), piece.base, piece.out)


def statistic(values: Values) -> GramMatrix | None:
    return None if values["filter_wise"] else task_vectors_gram(values)


register(
    MergeMethod(
        name="model_stock",
        summary="base plus as much of the mean task vector as the angles tell (arXiv 2403.19522)",
        parameters=(Parameter("filter_wise", "flag", default=0.0),),
        merge=merge,
        uses_base="always",
        parents=(2, None),
        least_task_vectors=2,
        grain="row",
        statistic=statistic,
    )
)
