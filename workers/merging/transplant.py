"""A checkpoint in the father's layout some of whose feed-forward neurons are another model's.

A neuron of a gated feed-forward network is a row of gate, the same row of up, and the same column of down.
The three move together, so that a neuron computes with its own weights whatever its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import numpy
import torch
from awscrt import checksums

from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor, WeightFile
from workers.checkpoints.health import count_not_finite
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.errors import BadInputError
from workers.merging.child import count_changes, publish_file
from workers.merging.parts import PART_BYTES, PARTS_OF_LARGE_FILES
from workers.merging.plan import Plan, columns_of
from workers.merging.sources import TORCH_DTYPES, Source
from workers.storage import Store

CHUNK_BYTES = 32 << 20
"""About so much of one tensor is worked on at once."""


@dataclass(frozen=True)
class NeuronMatching:
    """Which neurons of one network take which places in another: the father's. Arrays are by his."""

    mother: numpy.ndarray[Any, Any]
    """The number of the mother's neuron that takes the place; -1: the father's stays."""
    flipped: numpy.ndarray[Any, Any]
    """Whether its up and down change their signs, which leaves what the neuron writes as it is."""
    correlation: numpy.ndarray[Any, Any]
    """The absolute correlation of the two neurons' activations; 0 where the father's stays."""
    scale: float
    """What the columns of down that move are multiplied by."""

    @property
    def moved(self) -> int:
        """How many neurons take a place."""
        return int((self.mother >= 0).sum())


Moves = dict[int, tuple[int, NeuronMatching]]
"""The father's layer -> the mother's, and her neurons that take places in it."""


@dataclass
class Transplanted:
    """Weight files that are written, but not published."""

    target: Store
    uploads: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    receipts: dict[str, dict[int, str]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    """Logical tensor -> how many of the written elements have other bits than the father's."""
    not_finite: dict[str, int] = field(default_factory=dict)

    def publish(self) -> dict[str, str]:
        """Publish the weight files, and read them back: file -> SHA-256."""
        return {
            name: publish_file(self.target, name, upload, self.parts[name], self.receipts[name])
            for name, upload in self.uploads.items()
        }

    def abandon(self) -> None:
        """Drop what was written."""
        for name, upload in self.uploads.items():
            self.target.abandon_parts(name, upload)


def write_transplant(
    plan: Plan,
    mother: ArchitectureMap,
    moved: Moves,
    target: Store,
    notify: Callable[[int], None] = lambda done: None,
) -> Transplanted:
    """Write the weight files of `plan`'s child: a father of one, some of whose neurons are `moved`.

    Memory: about `CHUNK_BYTES` of the father, a part, and one whole matrix of the mother, as its rows come
    in any order; of a local checkpoint whose weights are values, only the rows that are used. Whatever
    goes wrong, nothing written remains. Raises `BadInputError` if a moved weight is not finite.
    """
    (name,) = plan.maps
    father, hers = _Model(plan.maps[name]), _Model(mother)
    written = Transplanted(target)
    try:
        for file in plan.layout.weight_files:
            written.uploads[file.name] = target.begin_parts(file.name, file.size)
            writer = _FileWriter(written, file, notify)
            writer.add(file.header.raw)
            for values, tensor, own in _values(plan, father, hers, moved, file):
                data = _bytes(values)
                _describe(values, data, tensor, own, written)
                writer.add(data)
            writer.end()
    except BaseException:
        with suppress(Exception):
            written.abandon()
        raise
    return written


class _Model:
    """A checkpoint's logical tensors, and their values."""

    def __init__(self, architecture: ArchitectureMap) -> None:
        self.by_name = architecture.by_name
        # Maps of parents are of checkpoints; only the child's is of a layout.
        self._source = Source(cast(Checkpoint, architecture.checkpoint))

    def matrix(self, name: str) -> torch.Tensor:
        """A whole matrix."""
        tensor = self.by_name[name]
        return self._source.read(tensor, 0, tensor.elements).view(tensor.shape)

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Elements of a tensor, flat."""
        return self._source.read(self.by_name[name], first, count)


def _values(
    plan: Plan,
    father: _Model,
    mother: _Model,
    moved: Moves,
    file: WeightFile,
) -> Iterator[tuple[torch.Tensor, LogicalTensor, torch.Tensor]]:
    """Of a file, in order: values as they are stored, their tensor, and the father's own values."""
    pieces: dict[str, list[LogicalTensor]] = {}
    for tensor in plan.child.tensors:
        pieces.setdefault(tensor.stored, []).append(tensor)
    for entry in file.header.entries:
        for tensor in sorted(pieces[entry.name], key=lambda piece: piece.offset):
            columns = max(columns_of(tensor), 1)
            step = max(CHUNK_BYTES * 8 // (BITS_PER_ELEMENT[tensor.dtype] * columns), 1) * columns
            move = (
                moved.get(tensor.layer)
                if tensor.component == "mlp" and tensor.layer is not None
                else None
            )
            if move is not None:
                role = tensor.name.removeprefix(f"layers.{tensor.layer}.")
                hers = mother.matrix(f"layers.{move[0]}.{role}")
            for first in range(0, max(tensor.elements, 1), step):
                count = min(step, tensor.elements - first)
                own = father.read(tensor.name, first, count).to(TORCH_DTYPES[tensor.dtype])
                values = own
                if move is not None:
                    values = _with_neurons(own, tensor, first, move[1], hers)
                yield values, tensor, own


def _with_neurons(
    own: torch.Tensor,
    tensor: LogicalTensor,
    first: int,
    place: NeuronMatching,
    hers: torch.Tensor,
) -> torch.Tensor:
    """The father's values from element `first` on, whole rows, with the moved neurons over them.

    `hers` is the mother's whole matrix.
    """
    columns = columns_of(tensor)
    start, stop = first // columns, (first + len(own)) // columns
    values = own.view(-1, columns).clone()
    sources = torch.from_numpy(place.mother)
    signs = 1.0 - 2.0 * torch.from_numpy(place.flipped).float()
    if tensor.name.endswith("down_proj.weight"):
        taken = sources >= 0
        columns_of_hers = hers[start:stop][:, sources[taken]].float()
        moved = (columns_of_hers * (signs[taken] * place.scale)).to(values.dtype)
        values[:, taken] = moved
    else:
        sources, signs = sources[start:stop], signs[start:stop]
        taken = sources >= 0
        rows_of_hers = hers[sources[taken]].float()
        if tensor.name.endswith("up_proj.weight"):
            rows_of_hers *= signs[taken, None]
        moved = rows_of_hers.to(values.dtype)
        values[taken] = moved
    broken = count_not_finite(_bytes(moved), tensor.dtype) if moved.numel() else 0
    if broken:
        raise BadInputError(
            f"tensor {tensor.name!r}: {broken} of the mother's values would be written as NaN or infinite: "
            "she is damaged, or the father's dtype too narrow for her values"
        )
    return values.view(-1)


def _describe(
    values: torch.Tensor,
    data: memoryview,
    tensor: LogicalTensor,
    own: torch.Tensor,
    written: Transplanted,
) -> None:
    changed = count_changes(values, own) if values is not own else 0
    written.changed[tensor.name] = written.changed.get(tensor.name, 0) + changed
    broken = count_not_finite(data, tensor.dtype)
    if broken:
        written.not_finite[tensor.name] = written.not_finite.get(tensor.name, 0) + broken


def _bytes(values: torch.Tensor) -> memoryview:
    data: memoryview = values.contiguous().view(torch.uint8).numpy().data
    return data


class _FileWriter:
    """One weight file, written in parts as its bytes come."""

    def __init__(
        self, written: Transplanted, file: WeightFile, notify: Callable[[int], None]
    ) -> None:
        self._written, self._file, self._notify = written, file, notify
        self._least = max(PART_BYTES, -(-file.size // PARTS_OF_LARGE_FILES))
        self._buffer = bytearray()
        self._start = 0
        written.parts[file.name], written.receipts[file.name] = [], {}

    def add(self, data: bytes | memoryview) -> None:
        self._buffer += data
        if len(self._buffer) >= self._least:
            self._write()

    def end(self) -> None:
        if self._buffer:
            self._write()
        assert self._start == self._file.size, (self._file.name, self._start, self._file.size)

    def _write(self) -> None:
        name, parts = self._file.name, self._written.parts[self._file.name]
        data, stop = bytes(self._buffer), self._start + len(self._buffer)
        number = len(parts) + 1
        self._written.receipts[name][number] = self._written.target.write_part(
            name, self._written.uploads[name], number, self._start, data
        )
        parts.append((self._start, stop, checksums.crc64nvme(data)))
        self._notify(len(data))
        self._buffer.clear()
        self._start = stop
