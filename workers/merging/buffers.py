"""Memory that a merge uses again and again."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch

from workers.merging.plan import CHUNK_ELEMENTS


class Buffers:
    """fp32 buffers of each thread, used again and again: fresh memory costs more than the arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()

    def take(self, number: int, elements: int, keep: bool = True) -> list[torch.Tensor]:
        """`number` flat buffers. Those of whole matrices are not kept."""
        if not keep:
            return [self._new(elements) for _ in range(number)]
        return [self._get("loaded", index, elements) for index in range(number)]

    def bytes(self, size: int) -> torch.Tensor:
        """The thread's buffer for what it writes: uint8, in memory of the CPU."""
        kept: Any = self._own.__dict__
        buffer = kept.get("bytes")
        if buffer is None or len(buffer) < size:
            buffer = kept["bytes"] = torch.empty(size, dtype=torch.uint8)
        return cast(torch.Tensor, buffer[:size])

    def scratch(self, shape: tuple[int, ...], index: int) -> torch.Tensor:
        """The thread's spare buffer of that number."""
        return self._get("scratch", index, torch.Size(shape).numel()).view(shape)

    def mask(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The thread's buffer for the mask that was drawn last."""
        return self._get("mask", 0, torch.Size(shape).numel()).view(shape)

    def _get(self, kind: str, index: int, elements: int) -> torch.Tensor:
        kept: Any = self._own.__dict__
        buffer = kept.get((kind, index))
        if buffer is None or len(buffer) < elements:
            buffer = kept[kind, index] = self._new(max(elements, CHUNK_ELEMENTS))
        return cast(torch.Tensor, buffer[:elements])

    def _new(self, elements: int) -> torch.Tensor:
        return torch.empty(elements, dtype=torch.float32, device=self._device)
