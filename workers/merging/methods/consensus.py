"""How sparsified task vectors become one: by a weighted sum, or by that of the elected sign.

Written without masks and `where`, which cost ten times as much as arithmetic, and without fresh memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.merging.methods.method import Parameter, Slice, Values

if TYPE_CHECKING:
    from torch import Tensor

RESCALINGS = ("inverse_density", "l1", "none")

SIGN = -(1 << 31)
"""The sign bit of an fp32 pattern seen as int32."""

NO_DIVISOR = 1e-8
"""Weights that sum to less are not divided by, as in mergekit."""


def task_vector_parameters(
    normalize: float, rescale: str, *own: Parameter
) -> tuple[Parameter, ...]:
    """The parameters that all these methods share, with a method's defaults, and its own ones.

    `rescale` says by what the elements that a sparsifier keeps are multiplied: `inverse_density`, one
    over their probability to be kept; `l1`, what gives the task vector the L1 norm back that it had
    over the whole tensor (mergekit's `rescale: true`); `none`.
    """
    return (
        Parameter("weight", "per_parent"),
        Parameter("density", "per_parent", low=0.0, high=1.0),
        Parameter("lambda", "shared", default=1.0),
        Parameter("normalize", "flag", default=normalize),
        Parameter("rescale", "choice", default=rescale, choices=RESCALINGS),
        *own,
    )


def merge_sum(piece: Slice, values: Values, factors: dict[str, float]) -> None:
    """out = x_0 + lambda * sum_i w_i f_i d_i, d_i being in `piece.parents`.

    Divided by sum_i w_i if `normalize` is 1, unless that is nearly 0.
    """
    import torch

    assert piece.base is not None
    weights: dict[str, float] = values["weight"]
    divisor = sum(weights.values()) if values["normalize"] else 1.0
    scale = values["lambda"] / (divisor if abs(divisor) >= NO_DIVISOR else 1.0)
    for name, delta in piece.parents.items():
        _scale(delta, scale * weights[name] * factors[name])
    total = _sum(list(piece.parents.values()), piece.out)
    torch.add(piece.base, total, out=piece.out)


def merge_agreeing(piece: Slice, values: Values, factors: dict[str, float]) -> None:
    """out = x_0 + lambda * (sum of the v_i = w_i f_i d_i that have the elected sign).

    The sign elected for an element is that of sum_i v_i, + if that is 0. If `normalize` is 1, the sum is
    divided by that of the w_i whose v_i count, unless it is 0.
    """
    weights: dict[str, float] = values["weight"]
    for name, delta in piece.parents.items():
        _scale(delta, weights[name] * factors[name])
    sign = elected_sign(piece)
    add_agreeing(piece, sign, weights if values["normalize"] else None, values["lambda"])


def elected_sign(piece: Slice) -> Tensor:
    """The sign bit of the sum of what is in `piece.parents`, as int32; in scratch buffer 0."""
    import torch

    votes = _sum(list(piece.parents.values()), piece.scratch(0))
    return votes.view(torch.int32).bitwise_and_(SIGN)


def add_agreeing(
    piece: Slice, sign: Tensor, weights: dict[str, float] | None, scale: float
) -> None:
    """out = x_0 + scale * (sum of the entries of `piece.parents` that have that sign).

    With `weights`, divided by the sum of those of the entries that count.
    """
    import torch

    assert piece.base is not None
    entries = list(piece.parents.values())
    for entry in entries:
        # Its sign turned, an entry that agrees is positive; what is not finite stays so.
        entry.view(torch.int32).bitwise_xor_(sign)
        entry.relu_()
    total = _sum(entries, piece.out)
    if weights is not None:
        for name, entry in piece.parents.items():
            _scale(entry.sign_(), weights[name])
        divisor = _sum(entries, entries[0])
        if min(weights.values()) >= 0.0:
            divisor.clamp_(min=torch.finfo(torch.float32).tiny)  # the total is 0 where it is 0
        else:
            divisor.add_(torch.eq(divisor, 0.0, out=piece.scratch(1)))
        total.div_(divisor)
    total.view(torch.int32).bitwise_xor_(sign)
    torch.add(piece.base, _scale(total, scale), out=piece.out)


def _scale(numbers: Tensor, factor: float) -> Tensor:
    return numbers if factor == 1.0 else numbers.mul_(factor)


def _sum(terms: list[Tensor], out: Tensor) -> Tensor:
    """Their sum in `out`, from the first to the last; `out` may be the first."""
    import torch

    first, *others = terms
    if not others:
        return out if out is first else out.copy_(first)
    torch.add(first, others[0], out=out)
    for term in others[1:]:
        out.add_(term)
    return out
