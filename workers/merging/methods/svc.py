"""svc: a post-step that shrinks what several task vectors have in common (arXiv 2602.05536)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register
from workers.merging.methods.whole_matrix import Blocks, Lying, one_thread, singular_values

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_RESPONSE = 2.0**-20
"""Of a task vector's norm: in fp32 weights, what is smaller in some direction is noise."""


def merge(piece: Slice, values: Values) -> None:
    """Singular value calibration of D = out - x_0 = sum_r s_r u_r v_r^T against the d_i = x_i - x_0.

    In the output direction u_r the child responds u_r^T D, a parent u_r^T d_i. p_i is the projection
    coefficient <u_r^T D, u_r^T d_i> / |u_r^T d_i|^2, and s_r becomes s_r K / sum_i max(alpha, p_i)
    (the paper's algorithm 1). What is no matrix stays as it is.

    With alpha 1, the default, it only shrinks: the paper's setting after tsv_m. After sums of task
    vectors the paper takes 1/K, which also strengthens directions that one parent alone has. A parent
    without a response counts as alpha, as in the authors' code (lyymuwu/SVC); a parent that equals
    the base does not count, where theirs would count it as alpha too.
    """
    if piece.is_matrix:
        with one_thread():
            _calibrate(Lying(piece), values["alpha"])


def _calibrate(lying: Lying, alpha: float) -> None:
    piece = lying.piece
    merged = lying.change(piece.out)
    vectors = lying.task_vectors(dict.fromkeys(piece.parents, 1.0))
    vectors = [vector for vector in vectors if vector.squared_norm != 0.0]
    gram = lying.product(merged, merged)
    if not vectors or not math.isfinite(float(gram.sum())):
        return  # what is not finite stays so, and is found
    strengths, directions = singular_values(gram)
    del gram
    total = strengths.new_zeros(len(strengths))
    for vector in vectors:
        overlap, response = _responses(lying, merged, vector.read, strengths, directions)
        responds = (response > SMALLEST_RESPONSE**2 * vector.squared_norm).double()
        projection = overlap / (response + (1.0 - responds)) * responds
        total += projection.clamp_(min=alpha)
    calibrate = (directions * (len(vectors) / total - 1.0)) @ directions.T
    calibrate.diagonal().add_(1.0)
    lying.write(lambda part: calibrate @ merged(part))


def _responses(
    lying: Lying, merged: Blocks, change: Blocks, strengths: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """For each r, <u_r^T D, u_r^T d> and |u_r^T d|^2.

    `directions` are the u_r if D has more inputs than outputs. Else they are the v_r, so that
    u_r = D v_r / s_r and u_r^T D = s_r v_r^T.
    """
    import torch

    if lying.is_tall != lying.piece.is_transposed:
        child = (directions * strengths).T
        parent = (directions / strengths).T @ lying.product(merged, change)
        return (child * parent).sum(1), parent.square_().sum(1)
    overlap, response = torch.zeros_like(strengths), torch.zeros_like(strengths)
    for part in lying.parts():
        parent = directions.T @ change(part)
        overlap += (directions.T @ merged(part)).mul_(parent).sum(1)
        response += parent.square_().sum(1)
    return overlap, response


register(
    MergeMethod(
        name="svc",
        summary="post-step: shrinks what task vectors have in common (SVC, arXiv 2602.05536); last bits "
        "depend on LAPACK and processor",
        parameters=(Parameter("alpha", "shared", low=0.01, high=1.0, default=1.0),),
        merge=merge,
        uses_base="always",
        least_task_vectors=2,
        grain="matrix",
        post=True,
        exact=False,
    )
)
