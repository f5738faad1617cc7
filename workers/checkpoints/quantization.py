"""Quantized checkpoints: which tensors hold the block scales of which FP8 weight, and what is refused.

An FP8 pack stores a weight `X` `[out, in]` as F8_E4M3 codes, and beside it `X_scale_inv`
`[ceil(out / b0), ceil(in / b1)]`: the factor of each block of b0 x b1 elements. The block's size stands
in config.json (`quantization_config.weight_block_size`) and is never guessed. The experts of a layer may
be fused: `X` `[E, out, in]`, scales `[E, ..., ...]`. Format: DeepSeek-V3, and transformers 5
(`integrations/finegrained_fp8.py`), whose `FP8Experts` gives the halves of a `gate_up_proj` a row of
blocks each where both would fit into one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from workers.checkpoints.checkpoint import Stored
from workers.checkpoints.safetensors_format import TensorEntry
from workers.errors import BadInputError

SCALES_SUFFIX = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
ACTIVATION_SCALE = re.compile(r"(?:.*[._])?(?:activation|input)_scale(?:_inv)?")


@dataclass(frozen=True, slots=True)
class BlockScales:
    """The scales of one matrix `[out, in]` of FP8 codes.

    The value of element (row, column) is its code times scale number
    `offset + (first_row + row) // block[0] * width + column // block[1]` of the stored tensor.
    """

    stored: str
    dtype: str
    offset: int
    width: int
    """Scales in a row of blocks."""
    block: tuple[int, int]
    first_row: int = 0
    """Rows of the grid that are above the matrix: gate and up of a fused tensor share one grid."""


class ScaleTable:
    """The scale tensors of a checkpoint, by the weight that they belong to.

    Raises `BadInputError` for scales that are of no weight, and where the block size is missing.
    """

    def __init__(self, checkpoint: Stored) -> None:
        self._location = checkpoint.location
        self._of = dict(_pairs(checkpoint))
        self.stored = frozenset(entry.name for entry in self._of.values())
        self.block = _block_size(checkpoint, next(iter(self._of))) if self._of else None

    def of_matrix(self, weight: TensorEntry) -> BlockScales | None:
        """The scales of a stored matrix; None if it has none."""
        entry = self._of.get(weight.name)
        if entry is None:
            return None
        assert self.block is not None
        if len(weight.shape) != 2:
            raise self._refusal(weight, entry, "only matrices and fused experts have block scales")
        height, width = _blocks(weight.shape, self.block)
        if entry.shape != (height, width):
            raise self._refusal(weight, entry, f"its shape must be [{height}, {width}]")
        return BlockScales(entry.name, entry.dtype, 0, width, self.block)

    def of_expert(
        self, weight: TensorEntry, expert: int, part: int, parts: int
    ) -> BlockScales | None:
        """The scales of one expert's matrix, the `part`-th of `parts`, in a fused `[E, out, in]`."""
        entry = self._of.get(weight.name)
        if entry is None:
            return None
        assert self.block is not None
        experts, *matrix = weight.shape
        rows = matrix[0] // parts
        height, width = _blocks(matrix, self.block)
        own_height = math.ceil(rows / self.block[0])
        if entry.shape == (experts, height, width):
            first, first_row = expert * height * width, part * rows
        elif entry.shape == (experts, parts * own_height, width):
            first, first_row = (expert * parts + part) * own_height * width, 0
        else:
            raise self._refusal(weight, entry, f"its shape must be [{experts}, {height}, {width}]")
        return BlockScales(entry.name, entry.dtype, first, width, self.block, first_row)

    def refuse(self, weight: TensorEntry, reason: str) -> None:
        """Raise `BadInputError` if `weight` has scales: for layouts in which they cannot be read."""
        if weight.name in self._of:
            raise self._refusal(weight, self._of[weight.name], reason)

    def _refusal(self, weight: TensorEntry, scales: TensorEntry, reason: str) -> BadInputError:
        return BadInputError(
            f"{self._location}: tensor {scales.name!r} {list(scales.shape)} cannot be the scales of "
            f"{weight.name!r} {list(weight.shape)} with blocks of {self.block}: {reason}"
        )


def quantization_config(checkpoint: Stored) -> dict[str, Any]:
    """The configuration's part about quantization; empty if there is none."""
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, dict) else {}):
        found = config.get("quantization_config")
        if isinstance(found, dict):
            return found
    return {}


def quantization_name(checkpoint: Stored, scales: ScaleTable) -> str | None:
    """What a person should read about how the weights are quantized; None if they are not."""
    if scales.block is not None:
        return f"fp8, blocks of {scales.block[0]} x {scales.block[1]}"
    method = quantization_config(checkpoint).get("quant_method")
    return None if method is None else str(method)


def check_values_readable(checkpoint: Stored) -> None:
    """Raise `BadInputError` for quantized weights whose values cannot be computed from the file."""
    method = quantization_config(checkpoint).get("quant_method")
    for entry in checkpoint.tensors.values():
        static = ACTIVATION_SCALE.fullmatch(entry.name)
        if static or (method not in (None, "fp8") and entry.dtype not in FLOAT_DTYPES):
            raise BadInputError(
                f"{checkpoint.location}: quant_method {method!r} with tensor {entry.name!r} "
                f"({entry.dtype}) is not read, only FP8 weights with block scales and activations scaled "
                "as they come: dequantize the checkpoint first"
            )


def _pairs(checkpoint: Stored) -> Iterable[tuple[str, TensorEntry]]:
    for entry in checkpoint.tensors.values():
        if not entry.name.endswith(SCALES_SUFFIX) or ACTIVATION_SCALE.fullmatch(entry.name):
            continue
        weight = checkpoint.tensors.get(entry.name.removesuffix(SCALES_SUFFIX))
        if weight is None:
            raise BadInputError(
                f"{checkpoint.location}: tensor {entry.name!r} holds scales of a weight that is not there"
            )
        if weight.dtype != "F8_E4M3" or entry.dtype not in SCALE_DTYPES:
            raise BadInputError(
                f"{checkpoint.location}: tensor {weight.name!r} is {weight.dtype} and its scales "
                f"{entry.name!r} are {entry.dtype}: only F8_E4M3 with scales in "
                f"{', '.join(SCALE_DTYPES)} is read; dequantize the checkpoint first"
            )
        yield weight.name, entry


def _block_size(checkpoint: Stored, weight: str) -> tuple[int, int]:
    config = quantization_config(checkpoint)
    block, method = config.get("weight_block_size"), config.get("quant_method")
    if method != "fp8":
        raise BadInputError(
            f"{checkpoint.place}/config.json: quantization_config.quant_method is {method!r}, but "
            f"{weight!r} has the block scales of 'fp8': restore the file, or dequantize the checkpoint"
        )
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    ):
        raise BadInputError(
            f"{checkpoint.place}/config.json: quantization_config.weight_block_size is {block!r}; "
            f"without the two sizes of a block the scales of {weight!r} cannot be applied: restore the "
            "file, or dequantize the checkpoint"
        )
    return block[0], block[1]


def _blocks(matrix: Iterable[int], block: tuple[int, int]) -> tuple[int, int]:
    height, width = (math.ceil(size / side) for size, side in zip(matrix, block, strict=True))
    return height, width
