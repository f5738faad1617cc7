"""Tensors with a row for each expert: a parent's rows in the order of the child's experts."""

from __future__ import annotations

import torch

from workers.checkpoints import LogicalTensor
from workers.merging.sources import TORCH_DTYPES, Source

LONG_ROW_ELEMENTS = 1 << 16
"""Rows that are shorter are read together, as remote reads cost by number."""


def read_matched(
    source: Source, tensor: LogicalTensor, rows: tuple[int, ...] | None, first: int, count: int
) -> torch.Tensor:
    """Elements of a parent's `tensor`, flat; with `rows` as `read_rows` has them."""
    if rows is None:
        return source.read(tensor, first, count)
    return read_rows(source, tensor, rows, first, count)


def read_rows(
    source: Source, tensor: LogicalTensor, rows: tuple[int, ...], first: int, count: int
) -> torch.Tensor:
    """Elements `first` to `first + count`, flat, of the `tensor` whose row i is what is stored as `rows[i]`.

    In its `values_dtype`; the stored bits, where nothing is computed.
    """
    columns = tensor.elements // len(rows)
    values = torch.empty(count, dtype=TORCH_DTYPES[tensor.values_dtype])
    if not count:
        return values
    begin, end = first // columns, -(-(first + count) // columns)
    wanted = rows[begin:end]
    low, stored = 0, None
    if columns < LONG_ROW_ELEMENTS:
        low = min(wanted)
        stored = source.read(tensor, low * columns, (max(wanted) + 1 - low) * columns)
    for place, row in enumerate(wanted, begin):
        start, stop = max(first, place * columns), min(first + count, (place + 1) * columns)
        skipped, size = start - place * columns, stop - start
        if stored is None:
            own = source.read(tensor, row * columns + skipped, size)
        else:
            own = stored.narrow(0, (row - low) * columns + skipped, size)
        values[start - first : stop - first].copy_(own)
    return values
