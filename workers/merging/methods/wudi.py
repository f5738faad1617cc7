"""wudi: the change that interferes least with the inputs of every task vector (arXiv 2503.08099)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register
from workers.merging.methods.whole_matrix import PARAMETERS, Lying, TaskVector, merge_matrix

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 256
"""A row's gradient depends on that row alone, so that many are optimised at a time, near the cache."""

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def merge(piece: Slice, values: Values) -> None:
    """out = x_0 + lambda d; d minimises sum_i |(d - d_i) d_i^T|^2 / |d_i|^2 with d_i = w_i (x_i - x_0).

    As in the authors' code (nathanielyvo/WUDI-Merging, vit/wudi_main.py): Adam (betas 0.9 and 0.999,
    epsilon 1e-8) with learning rate 1e-5, 300 steps from the sum of the d_i, and lambda 1. An element
    moves by no more than about steps x rate: task vectors much larger than that stay near their sum.
    What is no matrix gets lambda times the mean, as in fusion_bench; the authors' code, which names the
    layers that it merges, leaves it at the base. Weights are an addition.

    The gradient is written out, as a function of e = d - sum_j d_j, which is small and starts at 0:
    2 (e H + G), H = sum_i d_i^T d_i / |d_i|^2, G = sum_i (sum_j d_j - d_i) d_i^T d_i / |d_i|^2.
    """
    merge_matrix(piece, values, _merge_by_interference)


def _merge_by_interference(lying: Lying, vectors: list[TaskVector], values: Values) -> None:
    piece, scale = lying.piece, values["lambda"]
    if len(vectors) == 1:  # which is the minimum
        lying.write(lambda part: vectors[0].read(part).mul_(scale))
        return
    assert piece.base is not None

    def upright(stored: Tensor) -> Tensor:
        return stored.T if piece.is_transposed else stored

    total, base = upright(piece.out).zero_(), upright(piece.base)
    scaled = []
    for vector in vectors:
        change = upright(piece.parents[vector.parent]).sub_(base)
        change.mul_(values["weight"][vector.parent])
        scaled.append((change, vector.squared_norm))
        total.add_(change)
    rows, columns = total.shape
    quadratic = _by_inputs if columns <= 2 * len(vectors) * rows else _by_outputs
    _add_minimum(total, *quadratic(total, scaled), values)
    total.mul_(scale).add_(base)


Quadratic = tuple[Callable[["Tensor"], "Tensor"], "Tensor"]
"""e -> e H for any rows e, and G."""


def _by_inputs(total: Tensor, vectors: list[tuple[Tensor, float]]) -> Quadratic:
    """With H `[in, in]` worked out. Overwrites the vectors."""
    import torch

    constant = torch.zeros_like(total)
    curvature = torch.zeros(total.shape[1], total.shape[1], dtype=total.dtype, device=total.device)
    for vector, norm in vectors:
        own = (vector.T @ vector).div_(norm)
        curvature.add_(own)
        constant.addmm_(vector.neg_().add_(total), own)
    return lambda change: change @ curvature, constant


def _by_outputs(total: Tensor, vectors: list[tuple[Tensor, float]]) -> Quadratic:
    """With (e d_i^T) d_i, which is less for a matrix of few rows."""
    import torch

    scaled = [vector.div(math.sqrt(norm)) for vector, norm in vectors]
    constant = torch.zeros_like(total)
    for (vector, _), unit in zip(vectors, scaled, strict=True):
        constant.addmm_(vector.neg_().add_(total) @ unit.T, unit)

    def apply(change: Tensor) -> Tensor:
        result = (change @ scaled[0].T) @ scaled[0]
        for unit in scaled[1:]:
            result.addmm_(change @ unit.T, unit)
        return result

    return apply, constant


def _add_minimum(
    total: Tensor, apply: Callable[[Tensor], Tensor], constant: Tensor, values: Values
) -> None:
    """Add to `total` what Adam finds, from 0, for the quadratic with the gradient 2 (e H + G)."""
    import torch

    rate, steps = values["learning_rate"], round(values["steps"])
    first, second = BETAS
    for start in range(0, len(total), ROWS):
        rows = constant[start : start + ROWS]
        change, mean, square = (torch.zeros_like(rows) for _ in range(3))
        for step in range(1, steps + 1):
            gradient = apply(change).add_(rows).mul_(2.0)
            mean.mul_(first).add_(gradient, alpha=1.0 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
            root = torch.sqrt(square, out=gradient)
            root.mul_(1.0 / math.sqrt(1.0 - second**step)).add_(EPSILON)
            change.addcdiv_(mean, root, value=-rate / (1.0 - first**step))
        total[start : start + ROWS].add_(change)


register(
    MergeMethod(
        name="wudi",
        summary="least interference with the inputs of every task vector, by Adam (WUDI-Merging, "
        "arXiv 2503.08099); last bits depend on BLAS and processor",
        parameters=(
            *PARAMETERS,
            Parameter("steps", "shared", low=0, high=100_000, default=300),
            Parameter("learning_rate", "shared", low=0, high=1, default=1e-5),
        ),
        merge=merge,
        uses_base="always",
        least_task_vectors=2,
        grain="matrix",
        exact=False,
    )
)
