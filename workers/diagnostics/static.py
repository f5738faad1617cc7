"""The static scan: what the weights of parents and base are like, tensor by tensor, without running them.

A tensor is scanned by one worker, chunk by chunk on a fixed grid, so what is found depends neither on the
number of workers nor on who scans what. Values are those that a merge would read: FP8 codes times their
scales, what an adapter adds. What is stored as 16-bit floats, nearly everything, is read without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy

from workers.checkpoints import ArchitectureMap, Checkpoint, CheckpointReader, LogicalTensor
from workers.checkpoints.quantization import check_values_readable
from workers.diagnostics.comparison import Comparison
from workers.diagnostics.distribution import (
    CHUNK_ELEMENTS,
    CODED,
    CodeCounts,
    Moments,
    Statistics,
    to_float64,
)
from workers.merging.plan import BASE, MERGEABLE_DTYPES

if TYPE_CHECKING:
    from workers.merging.sources import Source

STRETCH_ELEMENTS = 1 << 22
"""So much is read at once: from a bucket one request, and what a worker holds of each parent."""

NUMPY_DTYPES = {"BF16": "<u2", "F16": "<u2", "F32": "<f4", "F64": "<f8"}


def scanned_tensors(
    maps: dict[str, ArchitectureMap],
) -> tuple[list[LogicalTensor], dict[str, list[str]]]:
    """The father's floating point tensors, and of each checkpoint the stored tensors that are left out.

    `maps`: father first, the base as `base`. Left out is what holds no floating point values, and what
    other checkpoints have beyond the father. Raises `BadInputError` for quantized weights that cannot be
    read.
    """
    father = next(iter(maps.values()))
    left_out: dict[str, list[str]] = {}
    for name, other in maps.items():
        check_values_readable(other.checkpoint)
        stored = {
            tensor.stored: None
            for tensor in other.tensors
            if tensor.name not in father.by_name or not has_values(tensor)
        }
        if stored:
            left_out[name] = list(stored)
    return [tensor for tensor in father.tensors if has_values(tensor)], left_out


class StaticScan:
    """Scans tensors of opened checkpoints. `parents` by name, the father first."""

    def __init__(self, parents: dict[str, Checkpoint], base: Checkpoint | None) -> None:
        checkpoints = parents | ({BASE: base} if base else {})
        self._values = {name: _Values(checkpoint) for name, checkpoint in checkpoints.items()}
        self._pairs = [*combinations(parents, 2), *((BASE, name) for name in parents if base)]

    def scan(self, name: str) -> dict[str, Any]:
        """The scan's entry for one of the father's tensors: see docs/diagnostics.md."""
        found = {
            checkpoint: tensor
            for checkpoint, values in self._values.items()
            if (tensor := values.map.find(name)) is not None and has_values(tensor)
        }
        father = next(iter(found.values()))
        by_shape: dict[tuple[int, ...], dict[str, LogicalTensor]] = {}
        for checkpoint, tensor in found.items():
            by_shape.setdefault(tensor.shape, {})[checkpoint] = tensor
        of: dict[str, Statistics] = {}
        between: dict[str, dict[str, float | None]] = {}
        for group in by_shape.values():
            self._scan_together(group, of, between)
        return {
            "tensor": name,
            "component": father.component,
            "layer": father.layer,
            "expert": father.expert,
            "elements": father.elements,
            "of": {checkpoint: of[checkpoint] for checkpoint in found},
            "between": between,
        }

    def _scan_together(
        self,
        tensors: dict[str, LogicalTensor],
        of: dict[str, Statistics],
        between: dict[str, dict[str, float | None]],
    ) -> None:
        """Scan tensors of one shape, by checkpoint, into `of`, and their pairs into `between`."""
        counted = {
            name: CodeCounts(tensor.values_dtype) if tensor.values_dtype in CODED else Moments()
            for name, tensor in tensors.items()
        }
        pairs = {pair: Comparison() for pair in self._pairs if tensors.keys() >= set(pair)}
        for stretch in self._stretches(tensors):
            for name, counts in counted.items():
                counts.add(stretch[name])
            if pairs:
                _compare(stretch, tensors, pairs)
        for name, counts in counted.items():
            if isinstance(counts, Moments):
                for stretch in self._stretches({name: tensors[name]}):
                    counts.add_bins(stretch[name])
            of[name] = counts.finish()
        for pair, sums in pairs.items():
            norms = [_norm(of[name], tensors[name]) for name in pair]
            between["|".join(pair)] = sums.finish((norms[0], norms[1]))

    def _stretches(self, tensors: dict[str, LogicalTensor]) -> Iterator[dict[str, numpy.ndarray]]:
        """Checkpoint -> stored numbers, for one stretch after the other of tensors of one shape."""
        elements = next(iter(tensors.values())).elements
        for first in range(0, elements, STRETCH_ELEMENTS):
            count = min(STRETCH_ELEMENTS, elements - first)
            yield {
                name: self._values[name].read(tensor, first, count)
                for name, tensor in tensors.items()
            }


class _Values:
    """What a merge would read of a checkpoint, as numpy arrays; 16-bit floats as their codes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.map = ArchitectureMap.of(checkpoint)
        self._reader = CheckpointReader(checkpoint)
        self._source: Source | None = None

    def read(self, tensor: LogicalTensor, first: int, count: int) -> numpy.ndarray:
        kind = numpy.dtype(NUMPY_DTYPES[tensor.values_dtype])
        if not tensor.is_computed:
            start, stop = (
                (tensor.offset + element) * kind.itemsize for element in (first, first + count)
            )
            return numpy.frombuffer(self._reader.read(tensor.stored, start, stop), kind)
        import torch

        if self._source is None:
            from workers.merging.sources import Source

            self._source = Source(self._reader.checkpoint)
        values = self._source.read(tensor, first, count)
        return values.contiguous().view(torch.uint8).numpy().view(kind)


def _compare(
    stretch: dict[str, numpy.ndarray],
    tensors: dict[str, LogicalTensor],
    pairs: dict[tuple[str, str], Comparison],
) -> None:
    names = {name for pair in pairs for name in pair}
    spare, flags = numpy.empty(CHUNK_ELEMENTS), numpy.empty(CHUNK_ELEMENTS, bool)
    for first in range(0, len(stretch[next(iter(names))]), CHUNK_ELEMENTS):
        chunk = {
            name: to_float64(
                stretch[name][first : first + CHUNK_ELEMENTS], tensors[name].values_dtype
            )
            for name in names
        }
        for (one, two), sums in pairs.items():
            size = len(chunk[one])
            sums.add(chunk[one], chunk[two], spare[:size], flags[:size])


def has_values(tensor: LogicalTensor) -> bool:
    """Whether it holds floating point numbers, not integers or codes without scales."""
    return tensor.values_dtype in MERGEABLE_DTYPES


def _norm(of: Statistics, tensor: LogicalTensor) -> float | None:
    """The L2 norm of a tensor."""
    return None if of["rms"] is None else of["rms"] * math.sqrt(tensor.elements)
