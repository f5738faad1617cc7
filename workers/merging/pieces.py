"""What a merge unit is merged in: pieces that have one method, cut into slices as the method sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from workers.checkpoints import LogicalTensor
from workers.merging.assignment import Assignment
from workers.merging.methods import Grain
from workers.merging.plan import MergeUnit, columns_of


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `first` to `first + count` of what is merged in one way: a tensor, or one row of it."""

    tensor: LogicalTensor
    """Of a row: what it would be as a tensor of its own."""
    way: Assignment
    first: int
    count: int
    start: int = 0
    """Element of the whole tensor that the row begins with."""
    is_row: bool = False


def cut_rows(unit: MergeUnit, way: Assignment) -> Iterator[Piece]:
    """A unit of whole rows, row by row: each a tensor of its own, so that no row depends on the others."""
    columns = unit.tensor.elements // len(way.rows)
    for start in range(unit.first, unit.first + unit.count, columns):
        row = way.rows[start // columns]
        yield Piece(replace(unit.tensor, shape=(1, columns)), row, 0, columns, start, True)


def cut(
    tensor: LogicalTensor, grain: Grain, first: int, count: int, most: int
) -> Iterable[tuple[int, int, tuple[int, ...]]]:
    """(first element, elements, shape) of the slices that cover a stretch of a tensor."""
    if grain == "element":
        for start in range(first, first + count, most):
            size = min(most, first + count - start)
            yield start, size, (size,)
        return
    columns = columns_of(tensor)
    if not count or not columns:
        return
    step = columns * (tensor.elements // columns if grain == "matrix" else max(most // columns, 1))
    last = -(-(first + count) // columns) * columns
    for start in range(0 if grain == "matrix" else first - first % columns, last, step):
        size = min(step, last - start)
        yield start, size, (size // columns, columns)
