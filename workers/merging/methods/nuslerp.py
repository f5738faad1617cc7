"""nuslerp: slerp by weights, of task vectors if there is a base, of whole tensors or row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.merging.methods.gram import (
    GramMatrix,
    combine,
    row_products,
    task_vectors_gram,
    vectors_of,
    weights_cancel,
)
from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register
from workers.merging.methods.slerp import cosine_of, shares

if TYPE_CHECKING:
    from torch import Tensor

PARALLEL = 1.0 - 1e-14
"""Above this |cosine| the angle is lost in the rounding of float64."""


def merge(piece: Slice, values: Values) -> None:
    """out = sin((1-t)a)/sin(a) v_1 + sin(ta)/sin(a) v_2, t = w_2 / (w_1 + w_2).

    v_i are the parents; with a base they are the task vectors, and the base is added. The angle a is
    theirs as whole tensors, or with `flatten: 0` that of each pair of rows.

    Where v_1 or v_2 is zero or both are parallel the way is a line; mergekit takes a zero vector as
    orthogonal to the other. Weights that sum to 0 are refused; mergekit takes t = 1/2 for them. Its
    `nuslerp_row_wise`, which is about columns, is not here.
    """
    first, second = values["weight"].values()
    t = second / (first + second)
    vectors = vectors_of(piece)
    if values["flatten"]:
        combine(vectors, shares(cosine_of(piece.statistic), t, PARALLEL), piece.base, piece.out)
    else:
        combine(vectors, row_shares(row_products(vectors), t), piece.base, piece.out)


def row_shares(products: Tensor, t: float) -> list[Tensor]:
    """`shares` for each row: two `[rows, 1]` of the products `[3, rows]`.

    Rounded to fp32: sines differ between processors in the last bits of float64, which shows in about
    one of 10^8 rows.
    """
    first, dot, second = products
    norms = first.sqrt() * second.sqrt()
    cosine = (dot / norms).nan_to_num_(nan=1.0).clamp_(-1.0, 1.0)
    angle = cosine.acos()
    is_line = (cosine.abs() > PARALLEL).double()
    sine = angle.sin() + is_line
    return [
        (arc * (1.0 - is_line) + line * is_line).float().unsqueeze(1)
        for line, arc in (
            (1.0 - t, ((1.0 - t) * angle).sin() / sine),
            (t, (t * angle).sin() / sine),
        )
    ]


def statistic(values: Values) -> GramMatrix | None:
    return task_vectors_gram(values) if values["flatten"] else None


def check(values: Values) -> str | None:
    return weights_cancel(values["weight"])


register(
    MergeMethod(
        name="nuslerp",
        summary="spherical interpolation by weights, of task vectors if there is a base",
        parameters=(Parameter("weight", "per_parent"), Parameter("flatten", "flag", default=1.0)),
        merge=merge,
        check=check,
        uses_base="optional",
        parents=(2, 2),
        grain="row",
        statistic=statistic,
    )
)
