"""Values that no file holds: FP8 codes times their block scales, and weights plus a LoRA product.

Each value is made by the same few roundings of fp32 whichever range is asked for, on any processor:
products and sums are separate elementwise operations in a fixed order, never a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy
import torch

from workers.checkpoints.adapter import LowRank
from workers.checkpoints.quantization import BlockScales

PIECE_ELEMENTS = 1 << 17
"""Elements worked on at once: three fp32 buffers of this size stay in a core's cache."""


class Piece(NamedTuple):
    """Whole rows of a matrix, or a part of one row, at `start` of a flat range."""

    start: int
    row: int
    rows: int
    column: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


def cut_rows(first: int, count: int, columns: int) -> Iterator[Piece]:
    """Elements `first` to `first + count` of a matrix of so many columns, cut at its rows."""
    position, stop = first, first + count
    while position < stop:
        row, column = divmod(position, columns)
        if column or stop - position < columns:
            width = min(columns - column, stop - position)
            piece = Piece(position - first, row, 1, column, width)
        else:
            rows = min(max(1, PIECE_ELEMENTS // columns), (stop - position) // columns)
            piece = Piece(position - first, row, rows, 0, columns)
        yield piece
        position = first + piece.stop


def decode_fp8(codes: torch.Tensor) -> torch.Tensor:
    """The fp32 values of flat F8_E4M3 codes; exact. Several times faster than torch's conversion."""
    values = torch.empty(codes.numel(), dtype=torch.float32)
    source, target = codes.view(torch.uint8).numpy(), values.numpy()
    for start in range(0, len(target), PIECE_ELEMENTS):
        part = slice(start, start + PIECE_ELEMENTS)
        numpy.take(_fp8_values(), source[part], out=target[part], mode="clip")
    return values


@cache
def _fp8_values() -> Any:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def apply_scales(
    values: torch.Tensor,
    first: int,
    columns: int,
    scales: BlockScales,
    read: Callable[[int, int], torch.Tensor],
) -> None:
    """Multiply flat `values`, from element `first` of a matrix on, by the scales of their blocks.

    `read(first, count)` gives scales in their stored dtype.
    """
    height, width = scales.block
    top = (scales.first_row + first // columns) // height
    bottom = (scales.first_row + (first + len(values) - 1) // columns) // height + 1
    grid = read(scales.offset + top * scales.width, (bottom - top) * scales.width).float()
    by_column = grid.view(-1, scales.width).repeat_interleave(width, dim=1)[:, :columns]
    for piece in cut_rows(first, len(values), columns):
        row = piece.row
        while row < piece.row + piece.rows:
            block = (scales.first_row + row) // height
            end = min(piece.row + piece.rows, (block + 1) * height - scales.first_row)
            start = piece.start + (row - piece.row) * piece.columns
            part = values[start : start + (end - row) * piece.columns].view(-1, piece.columns)
            part *= by_column[block - top, piece.column : piece.column + piece.columns]
            row = end


def add_low_rank(
    values: torch.Tensor,
    first: int,
    columns: int,
    update: LowRank,
    a: torch.Tensor,
    b: torch.Tensor,
    transposed: bool,
) -> None:
    """Add `scaling * B A`, or its transpose, to flat fp32 `values` from element `first` of a matrix on.

    `a` `[rank, in]` and `b` `[out, rank]` are the factors in their stored dtype. The terms of a sum are
    added in the order of the rank.
    """
    left, right = (a.t(), b.t()) if transposed else (b, a)
    right = right.to(torch.float32).contiguous()
    for piece in cut_rows(first, len(values), columns):
        row_factors = left[piece.row : piece.row + piece.rows].to(torch.float32)
        total = torch.zeros(piece.rows, piece.columns)
        product = torch.empty_like(total)
        for k in range(update.rank):
            part = right[k, piece.column : piece.column + piece.columns]
            torch.mul(row_factors[:, k : k + 1], part, out=product)
            total += product
        total *= update.scaling
        values[piece.start : piece.stop] += total.view(-1)
