"""Where merged values go: into a live model, into a checkpoint, or into hashes alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

import torch

from workers.checkpoints import CheckpointWriter, LogicalTensor
from workers.merging.plan import MergeUnit


class Sink(Protocol):
    """Takes the merge units of a recipe, in the father's order."""

    def wants(self, tensor: LogicalTensor) -> bool:
        """Whether this tensor is to be merged at all."""

    def destination(self, unit: MergeUnit, dtype: torch.dtype) -> torch.Tensor:
        """Flat tensor `[unit.count]` to fill; of `dtype` (the father's), or one it is cast to."""

    def accept(self, unit: MergeUnit, values: torch.Tensor) -> None:
        """Called in order, when `values` (the destination) is filled."""


class LiveSink:
    """Writes into the weights of a model in memory, given as flat views by logical name."""

    def __init__(self, views: dict[str, torch.Tensor]) -> None:
        self.views = views

    def wants(self, tensor: LogicalTensor) -> bool:
        return tensor.name in self.views

    def destination(self, unit: MergeUnit, dtype: torch.dtype) -> torch.Tensor:
        return self.views[unit.target.name][unit.first : unit.first + unit.count]

    def accept(self, unit: MergeUnit, values: torch.Tensor) -> None:
        pass


class HashSink:
    """Keeps the SHA-256 of each stored tensor's bytes, and nothing else."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self._running = hashlib.sha256()

    def wants(self, tensor: LogicalTensor) -> bool:
        return True

    def destination(self, unit: MergeUnit, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(unit.count, dtype=dtype)

    def accept(self, unit: MergeUnit, values: torch.Tensor) -> None:
        if unit.starts_stored:
            self._running = hashlib.sha256()
        self.take(unit, values.view(torch.uint8).numpy().data)
        self.digests[unit.target.stored] = self._running.hexdigest()

    def take(self, unit: MergeUnit, data: memoryview) -> None:
        """The bytes of one unit, in order."""
        self._running.update(data)


class CheckpointSink(HashSink):
    """Streams into a `CheckpointWriter`, hashing on the way; `notify` is told how many bytes."""

    def __init__(self, writer: CheckpointWriter, notify: Callable[[int], None]) -> None:
        super().__init__()
        self.writer = writer
        self.notify = notify

    def take(self, unit: MergeUnit, data: memoryview) -> None:
        super().take(unit, data)
        self.writer.write(unit.target.stored, data)
        self.notify(data.nbytes)
