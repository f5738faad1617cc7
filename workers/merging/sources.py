"""Stored tensor bytes as torch tensors."""

from __future__ import annotations

import torch

from workers.checkpoints import Checkpoint, CheckpointReader, LogicalTensor

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


class Source:
    """The values of one parent's logical tensors."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._reader = CheckpointReader(checkpoint)

    def read(self, tensor: LogicalTensor, first: int, count: int) -> torch.Tensor:
        """Elements `first` to `first + count` of a logical tensor, flat, in its stored dtype."""
        dtype = TORCH_DTYPES[tensor.dtype]
        if count == 0:
            return torch.empty(0, dtype=dtype)
        start = (tensor.offset + first) * dtype.itemsize
        return torch.frombuffer(
            self._reader.read(tensor.stored, start, start + count * dtype.itemsize), dtype=dtype
        )
