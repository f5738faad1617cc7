"""tsv_m: the leading singular directions of each task vector, made orthogonal (arXiv 2412.00081)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.merging.methods.method import MergeMethod, Slice, Values, register
from workers.merging.methods.whole_matrix import (
    PARAMETERS,
    Blocks,
    Lying,
    TaskVector,
    merge_matrix,
    merge_mean,
    singular_values,
)

if TYPE_CHECKING:
    from torch import Tensor

SAME_DIRECTION = 2.0**-12
"""Directions of several parents with a smaller angle between them are one: fp32 cannot tell."""


def merge(piece: Slice, values: Values) -> None:
    """U_i S_i V_i^T = the first 1/K of the singular values of w_i (x_i - x_0), K parents (TSV-Merge).

    U = [U_1 .. U_K] and V = [V_1 .. V_K] are replaced by the nearest matrices with orthonormal columns,
    U (U^T U)^-1/2 (Procrustes); out = x_0 + lambda U S V^T. 1/K of min(out, in) is rounded down, and
    what is no matrix gets lambda times the mean, as in the authors' code
    (AntoAndGar/task_singular_vectors, compute_and_sum_svd_mem_reduction). Weights come before the
    decomposition, as in fusion_bench; lambda 1 is its default.

    Different from these, which take arbitrary vectors there: a parent that equals the base takes no
    share (K counts the others), directions of strength zero are left out, a direction that several
    parents have in common counts once, and a matrix of less than K directions gets the mean.
    """
    merge_matrix(piece, values, _merge_directions)


def _merge_directions(lying: Lying, vectors: list[TaskVector], values: Values) -> None:
    share = lying.short // len(vectors)
    if len(vectors) == 1:
        lying.write(lambda part: vectors[0].read(part).mul_(values["lambda"]))
    elif share == 0:
        merge_mean(lying.piece, values)
    else:
        lying.write(_in_orthogonal_directions(lying, vectors, share, values["lambda"]))


def _in_orthogonal_directions(
    lying: Lying, vectors: list[TaskVector], share: int, scale: float
) -> Blocks:
    """lambda U S V^T as above, of the first `share` directions of each task vector.

    The right vectors are not kept: S_i^-1 U_i^T d_i is worked out again wherever it is needed, which
    is little beside the decompositions.
    """
    import torch

    strengths, lefts = [], []
    for vector in vectors:
        found, left = singular_values(lying.product(vector.read, vector.read))
        strengths.append(found[:share])
        lefts.append(left[:, :share].contiguous())
    strength = torch.cat(strengths)

    def right(part: slice) -> Tensor:
        own = [left.T @ vector.read(part) for left, vector in zip(lefts, vectors, strict=True)]
        return torch.cat(own).div_(strength[:, None])

    left = torch.cat(lefts, dim=1)
    left = (left @ _inverse_root(left.T @ left)).mul_(strength)
    gram = torch.zeros(len(strength), len(strength), dtype=left.dtype, device=left.device)
    for part in lying.parts():
        block = right(part)
        gram.addmm_(block, block.T)
    left = (left @ _inverse_root(gram)).mul_(scale)
    return lambda part: left @ right(part)


def _inverse_root(gram: Tensor) -> Tensor:
    """gram^-1/2, but zero in directions where `gram` is."""
    lengths, vectors = singular_values(gram, floor=SAME_DIRECTION)
    return (vectors / lengths) @ vectors.T


register(
    MergeMethod(
        name="tsv_m",
        summary="leading singular directions of each task vector, made orthogonal (TSV-Merge, "
        "arXiv 2412.00081); last bits depend on LAPACK and processor",
        parameters=PARAMETERS,
        merge=merge,
        uses_base="always",
        least_task_vectors=2,
        grain="matrix",
        exact=False,
    )
)
