"""A token-indexed tensor of the child as each checkpoint would have it: rows brought into the child's order.

A row that a checkpoint lacks is filled before anything is merged: with the base's if the base knows the
token, else with the mean of those parents that know it (of one: its own row), the same for every
checkpoint. So a token that only one parent knows has no task vector, and enters the child as it is.
Rows that nobody knows (see `workers.checkpoints.vocabulary`) are the mean of the father's rows.
"""

from __future__ import annotations

import threading
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy
import torch

from workers.checkpoints import LogicalTensor
from workers.checkpoints.vocabulary import BASE, ChildVocabulary
from workers.merging.sources import TORCH_DTYPES, Source

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

BLOCK_ELEMENTS = 1 << 20
"""Elements gathered at once, and the most that are read at once."""

GAP_ELEMENTS = 1 << 16
"""Rows so close to one another are read at once with what lies between: remote reads cost by number."""


class TokenRows:
    """One token-indexed tensor of the child. Safe to be used by many threads.

    `tensors`: checkpoint (`base` for the base) -> the tensor in it, the father's first; what does not
    store the tensor is left out, and counts as knowing no token.
    """

    def __init__(
        self,
        vocabulary: ChildVocabulary,
        sources: dict[str, Source],
        tensors: dict[str, LogicalTensor],
    ) -> None:
        self._sources = sources
        self._tensors = tensors
        self._maps = {name: vocabulary.maps[name] for name in tensors}
        father = next(iter(tensors.values()))
        self.shape = (vocabulary.rows, *father.shape[1:])
        self._columns = father.elements // father.shape[0] if father.shape[0] else 0
        self._mapped = {
            name: sources[name].read(tensor, 0, tensor.elements).view(-1, self._columns)
            for name, tensor in tensors.items()
            if tensor.elements and sources[name].is_view(tensor)
        }
        self._mean: torch.Tensor | None = None
        self._lock = threading.Lock()

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that holds every row of a checkpoint as it is: its own, if it lacks none."""
        own = TORCH_DTYPES[self._tensors[name].values_dtype]
        if (self._maps[name] >= 0).all():
            return own
        others = (TORCH_DTYPES[tensor.values_dtype] for tensor in self._tensors.values())
        return reduce(torch.promote_types, others, torch.promote_types(own, torch.float32))

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Elements `first` to `first + count` for a checkpoint, flat, in its `dtype`."""
        values = torch.empty(count, dtype=self.dtype(name))
        self.copy_into(name, first, values)
        return values

    def copy_into(self, name: str, first: int, values: torch.Tensor) -> None:
        """Fill the flat `values` with the elements from `first` on, as a checkpoint has them.

        Each is converted once to the dtype of `values`; what has that dtype is copied bit by bit.
        """
        done, stop = 0, first + len(values)
        while first + done < stop:
            row, column = divmod(first + done, self._columns)
            # A piece of one row, or whole rows.
            rows = min((stop - first - done) // self._columns, self._step()) if not column else 0
            size = rows * self._columns or min(self._columns - column, stop - first - done)
            width = size // max(rows, 1)
            piece = values[done : done + size].view(-1, width)
            self._copy_rows(name, row, slice(column, column + width), piece)
            done += size

    def _step(self) -> int:
        return max(BLOCK_ELEMENTS // self._columns, 1)

    def _copy_rows(self, name: str, first: int, columns: slice, out: torch.Tensor) -> None:
        wanted = slice(first, first + len(out))
        rows = self._maps[name][wanted]
        missing = numpy.flatnonzero(rows < 0)
        own = numpy.flatnonzero(rows >= 0)
        self._gather(name, rows[own], columns, out, own)
        if not len(missing):
            return
        if BASE in self._maps:
            rows = self._maps[BASE][wanted][missing]
            self._gather(BASE, rows[rows >= 0], columns, out, missing[rows >= 0])
            missing = missing[rows < 0]
        if len(missing):
            self._fill_from_parents(wanted, missing, columns, out)

    def _fill_from_parents(
        self, wanted: slice, missing: NDArray[int64], columns: slice, out: torch.Tensor
    ) -> None:
        """The rows `missing` of those `wanted`, from the parents that know them."""
        known = {n: rows[wanted][missing] for n, rows in self._maps.items() if n != BASE}
        count = numpy.sum([rows >= 0 for rows in known.values()], axis=0)
        for name, rows in known.items():
            alone = (rows >= 0) & (count == 1)
            self._gather(name, rows[alone], columns, out, missing[alone])
        many = numpy.flatnonzero(count > 1)
        if len(many):
            total = torch.zeros(len(many), columns.stop - columns.start, dtype=torch.float64)
            for name, rows in known.items():
                has = numpy.flatnonzero(rows[many] >= 0)
                values = torch.empty(len(has), total.shape[1], dtype=torch.float64)
                self._gather(name, rows[many][has], columns, values, numpy.arange(len(has)))
                total[torch.from_numpy(has)] += values
            _put(out, missing[many], (total / torch.from_numpy(count[many])[:, None]).float())
        nobody = missing[count == 0]
        if len(nobody):
            row = self._mean_of_father()[columns].float()
            _put(out, nobody, row.expand(len(nobody), -1))

    def _gather(
        self,
        name: str,
        rows: NDArray[int64],
        columns: slice,
        out: torch.Tensor,
        places: NDArray[int64],
    ) -> None:
        """Copy a checkpoint's rows to the rows `places` of `out`, reading what is close at once."""
        if not len(rows):
            return
        if name in self._mapped:
            self._copy_span(self._mapped[name][:, columns], rows, out, places)
            return
        order = numpy.argsort(rows, kind="stable")
        rows, places = rows[order], places[order]
        # What is read at once ends at a wide gap, and at the fixed bounds of blocks.
        gap = max(GAP_ELEMENTS // self._columns, 1)
        ends = (numpy.diff(rows) > gap) | (numpy.diff(rows // self._step()) > 0)
        for part in numpy.split(numpy.arange(len(rows)), numpy.flatnonzero(ends) + 1):
            low, high = int(rows[part[0]]), int(rows[part[-1]])
            block = self._read(name, low * self._columns, (high - low + 1) * self._columns)
            block = block.view(-1, self._columns)[:, columns]
            self._copy_span(block, rows[part] - low, out, places[part])

    def _copy_span(
        self, block: torch.Tensor, rows: NDArray[int64], out: torch.Tensor, places: NDArray[int64]
    ) -> None:
        if _consecutive(rows):
            block = block[int(rows[0]) : int(rows[0]) + len(rows)]
        else:
            block = block.index_select(0, torch.from_numpy(rows))
        _put(out, places, block)

    def _mean_of_father(self) -> torch.Tensor:
        """The mean of the father's rows `[columns]`, fp64, always added up in the same order."""
        with self._lock:
            if self._mean is None:
                name, tensor = next(iter(self._tensors.items()))
                total: Any = numpy.zeros(self._columns)
                for first in range(0, tensor.shape[0], self._step()):
                    rows = min(self._step(), tensor.shape[0] - first)
                    block = self._read(name, first * self._columns, rows * self._columns)
                    total += block.double().view(rows, self._columns).numpy().sum(axis=0)
                self._mean = torch.from_numpy(total / tensor.shape[0])
            return self._mean

    def _read(self, name: str, first: int, count: int) -> torch.Tensor:
        return self._sources[name].read(self._tensors[name], first, count)


def _put(out: torch.Tensor, places: NDArray[int64], rows: torch.Tensor) -> None:
    """Copy `rows` to the rows `places` of `out`."""
    if _consecutive(places):
        out[int(places[0]) : int(places[0]) + len(places)].copy_(rows)
    else:
        out[torch.from_numpy(places).to(out.device)] = rows.to(out.device, out.dtype)


def _consecutive(rows: NDArray[int64]) -> bool:
    return bool((numpy.diff(rows) == 1).all())
