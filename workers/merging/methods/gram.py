"""Gram matrices of parents or task vectors, and linear combinations with coefficients read from them."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from workers.merging.methods.method import Slice, Values

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LANES = 1 << 15
"""Products are added up side by side in so many sums: their buffers stay in a core's cache, and an
operation on them takes much longer than torch needs to start it."""

ROW_LANES = 1 << 8
"""As `LANES`, for each of many rows."""

Matrix = tuple[tuple[float, ...], ...]
"""`[parents, parents]`: the products x_i . x_j, in the recipe's order."""


class GramMatrix:
    """The products of the parents, or of their task vectors, over the whole tensor, in float64.

    Products of fp32 numbers are exact in float64 and every sum has a fixed order, so the matrix is the
    same on any processor and for any number of threads.
    """

    def __init__(self, of_task_vectors: bool) -> None:
        self.of_task_vectors = of_task_vectors
        self.sums: list[float] = []

    def update(self, piece: Slice) -> None:
        vectors = vectors_of(piece) if self.of_task_vectors else [*piece.parents.values()]
        rows = [vector.reshape(1, -1) for vector in vectors]
        self._add(pair_products(rows, lanes(rows[0], LANES))[:, 0].tolist())

    def merge(self, other: GramMatrix) -> None:
        self._add(other.sums)

    def finish(self) -> Matrix:
        return symmetric(self.sums)

    def _add(self, sums: list[float]) -> None:
        if self.sums and sums:
            sums = [mine + more for mine, more in zip(self.sums, sums, strict=True)]
        self.sums = sums or self.sums


def parents_gram(values: Values) -> GramMatrix:
    """The Gram matrix of the parents themselves, whether or not the recipe has a base."""
    return GramMatrix(of_task_vectors=False)


def task_vectors_gram(values: Values) -> GramMatrix:
    """The Gram matrix of the task vectors; of the parents, if there is no base."""
    return GramMatrix(of_task_vectors=True)


def vectors_of(piece: Slice) -> list[Tensor]:
    """What is combined: the task vectors, made in the parents' buffers; the parents without a base."""
    parents = piece.parents.values()
    return [*parents] if piece.base is None else [parent.sub_(piece.base) for parent in parents]


def row_products(vectors: Sequence[Tensor]) -> Tensor:
    """x_i . x_j for j <= i, row by row: float64 `[pairs, rows]` of fp32 tensors `[rows, columns]`."""
    import torch

    width = lanes(vectors[0], ROW_LANES)
    blocks = zip(*(torch.split(vector, LANES // width) for vector in vectors), strict=True)
    return torch.cat([pair_products(block, width) for block in blocks], dim=1)


def lanes(vector: Tensor, most: int) -> int:
    return max(1, min(vector.shape[1], most))


def pair_products(vectors: Sequence[Tensor], width: int) -> Tensor:
    """`row_products` of few rows, each added up in `width` sums: the order depends on the columns alone."""
    import torch

    rows = len(vectors[0])
    pairs = len(vectors) * (len(vectors) + 1) // 2
    room = float64_buffer((len(vectors) + pairs, rows, width), vectors[0].device)
    wide, sums = room[: len(vectors)], room[len(vectors) :].zero_()
    buffers, steps = _steps(wide, sums)
    for blocks in zip(*(torch.split(vector, width, dim=1) for vector in vectors), strict=True):
        rest = blocks[0].shape[1]
        if rest < width:
            buffers, steps = _steps(wide[..., :rest], sums[..., :rest])
        for buffer, block in zip(buffers, blocks, strict=True):
            buffer.copy_(block)
        for total, one, others in steps:
            total.addcmul_(one, others)
    return sum_by_halves(sums).clone()  # the buffer will be used again


def float64_buffer(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """This thread's float64 buffer, used again and again: fresh memory costs more than the arithmetic."""
    import torch

    kept: dict[torch.device, Tensor] = _own.__dict__.setdefault("buffers", {})
    count = math.prod(shape)
    if device not in kept or len(kept[device]) < count:
        kept[device] = torch.empty(count, dtype=torch.float64, device=device)
    return kept[device][:count].view(shape)


_own = threading.local()


def _steps(
    wide: Tensor, sums: Tensor
) -> tuple[Sequence[Tensor], list[tuple[Tensor, Tensor, Tensor]]]:
    """The buffers one by one, and for each what to multiply it with and where to add the products."""
    steps, first = [], 0
    for number, one in enumerate(wide):
        steps.append((sums[first : first + number + 1], one, wide[: number + 1]))
        first += number + 1
    return wide.unbind(0), steps


def sum_by_halves(values: Tensor) -> Tensor:
    """Sums along the last dimension, in an order that depends on its length alone; overwrites `values`.

    `dot` and `sum` take another order, hence other last bits, for other processors and threads.
    """
    width = values.shape[-1]
    while width > 1:
        half = (width + 1) // 2
        values[..., : width - half].add_(values[..., half:width])
        width = half
    return values[..., 0]


def symmetric(products: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    """The whole matrix from the products x_i . x_j for j <= i."""
    size = math.isqrt(2 * len(products))
    return tuple(
        tuple(products[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)] for j in range(size))
        for i in range(size)
    )


def is_finite(gram: Matrix) -> bool:
    """Whether there is an angle to speak of: no parent has NaN or infinite elements."""
    return all(math.isfinite(product) for row in gram for product in row)


def combine(
    vectors: Iterable[Tensor],
    coefficients: Iterable[float | Tensor],
    base: Tensor | None,
    out: Tensor,
) -> None:
    """out = sum_i c_i v_i, plus the base if there is one. Overwrites the vectors.

    A coefficient is a number, or an fp32 tensor `[rows, 1]` with one for each row. Numbers are rounded to
    fp32 first, so that the last bits of a float64 cosine cannot reach the child.
    """
    import torch

    total = base
    for vector, coefficient in zip(vectors, coefficients, strict=True):
        if isinstance(coefficient, float):
            coefficient = rounded(coefficient)
        if total is None:
            torch.mul(vector, coefficient, out=out)
        else:
            torch.add(total, vector.mul_(coefficient), out=out)
        total = out


def weights_cancel(weights: dict[str, float]) -> str | None:
    """What is wrong with weights that nothing can be divided by."""
    total = sum(weights.values())
    return (
        f"the weights sum to {total:g}: nothing can be divided by that"
        if abs(total) < 1e-6
        else None
    )


def rounded(value: float) -> float:
    """`value` as fp32; the largest one instead of infinity."""
    (as_fp32,) = struct.unpack("<f", struct.pack("<f", max(-LARGEST, min(LARGEST, value))))
    return float(as_fp32)


LARGEST = (2.0 - 2.0**-23) * 2.0**127
"""The largest finite fp32 number."""
