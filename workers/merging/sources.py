"""The values of a parent's tensors, as torch tensors, whatever they are stored as."""

from __future__ import annotations

from functools import lru_cache, partial

import torch

from workers.checkpoints import Checkpoint, CheckpointReader, LogicalTensor
from workers.checkpoints.adapter import AdapterChange
from workers.checkpoints.safetensors_format import TensorEntry
from workers.merging.computed import add_low_rank, apply_scales, decode_fp8
from workers.merging.plan import columns_of

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Source:
    """The values of one parent's logical tensors. Safe to be read by many threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._reader = CheckpointReader(checkpoint)
        if checkpoint.adapter is not None:
            self._adapter = CheckpointReader(checkpoint.adapter.weights)
        # A factor is small, and is needed again for each part of its weight.
        self._factor = lru_cache(maxsize=8)(self._read_factor)

    @property
    def is_remote(self) -> bool:
        """Whether each read is a request to a store."""
        return self._reader.checkpoint.folder is None

    def is_view(self, tensor: LogicalTensor) -> bool:
        """Whether reading it costs nothing, however much: all of it is mapped, and nothing computed."""
        return not self.is_remote and not tensor.is_computed

    def read(self, tensor: LogicalTensor, first: int, count: int) -> torch.Tensor:
        """Elements `first` to `first + count` of a logical tensor, flat, as `tensor.values_dtype`.

        Where nothing is computed this is a view of the stored bytes. Else it is fp32: FP8 codes times
        the scales of their blocks, and what an adapter adds.
        """
        if count == 0:
            return torch.empty(0, dtype=TORCH_DTYPES[tensor.values_dtype])
        change = tensor.change
        if change is not None and change.replacement is not None:
            own = change.replacement
            values = _read(self._adapter, own.stored, own.dtype, own.offset + first, count)
        else:
            values = self._read_own(tensor, first, count)
        if change is None or change.low_rank is None:
            return values
        return self._adapted(values, tensor, change, first)

    def _read_own(self, tensor: LogicalTensor, first: int, count: int) -> torch.Tensor:
        stored = _read(self._reader, tensor.stored, tensor.dtype, tensor.offset + first, count)
        if tensor.scales is None:
            return stored
        values = decode_fp8(stored)
        read_scales = partial(_read, self._reader, tensor.scales.stored, tensor.scales.dtype)
        apply_scales(values, first, columns_of(tensor), tensor.scales, read_scales)
        return values

    def _adapted(
        self, values: torch.Tensor, tensor: LogicalTensor, change: AdapterChange, first: int
    ) -> torch.Tensor:
        update = change.low_rank
        assert update is not None
        # Always a copy: what was read may be the mapped file.
        values = values.to(torch.float32, copy=True)
        a, b = self._factor(update.a), self._factor(update.b)
        add_low_rank(values, first, columns_of(tensor), update, a, b, change.transposed)
        return values

    def _read_factor(self, entry: TensorEntry) -> torch.Tensor:
        flat = _read(self._adapter, entry.name, entry.dtype, 0, entry.elements)
        return flat.view(entry.shape)


def _read(
    reader: CheckpointReader, stored: str, dtype: str, first: int, count: int
) -> torch.Tensor:
    """Elements of a stored tensor, flat; a view of the mapped file if it is local."""
    kind = TORCH_DTYPES[dtype]
    start = first * kind.itemsize
    return torch.frombuffer(reader.read(stored, start, start + count * kind.itemsize), dtype=kind)
