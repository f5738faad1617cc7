"""iso_c: the sum of the task vectors with all its singular values made equal (arXiv 2502.04959)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.merging.methods.method import MergeMethod, Slice, Values, register
from workers.merging.methods.whole_matrix import (
    PARAMETERS,
    Lying,
    TaskVector,
    merge_matrix,
    singular_values,
)

if TYPE_CHECKING:
    from torch import Tensor


def merge(piece: Slice, values: Values) -> None:
    """U S V^T = sum_i w_i (x_i - x_0); out = x_0 + lambda mean(S) U V^T.

    Task vectors are summed, and what is no matrix gets lambda times their mean, as in the authors' code
    (danielm1405/iso-merging, src/utils/iso.py). They choose lambda on validation data; 1 is the default
    of fusion_bench. The mean is over all min(out, in) singular values, zeros included; but directions
    in which the sum is zero stay so, where a full decomposition has arbitrary vectors.
    """
    merge_matrix(piece, values, _flatten)


def _flatten(lying: Lying, vectors: list[TaskVector], values: Values) -> None:
    def merged(part: slice) -> Tensor:
        result = vectors[0].read(part)
        for vector in vectors[1:]:
            result.add_(vector.read(part))
        return result

    strengths, left = singular_values(lying.product(merged, merged))
    level = values["lambda"] * float(strengths.sum()) / lying.short
    flatten = (left * (level / strengths)) @ left.T  # U V^T = (U S^-1 U^T) (U S V^T)
    lying.write(lambda part: flatten @ merged(part))


register(
    MergeMethod(
        name="iso_c",
        summary="sum of task vectors, its singular values made equal (Iso-C, arXiv 2502.04959); last "
        "bits depend on LAPACK and processor",
        parameters=PARAMETERS,
        merge=merge,
        uses_base="always",
        grain="matrix",
        exact=False,
    )
)
