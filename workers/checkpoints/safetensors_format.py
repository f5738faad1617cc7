"""The safetensors header: parsed strictly, so that a damaged file is named and never merged.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of little-endian header length,
a JSON object `name -> {dtype, shape, data_offsets}`, then the data, without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass
from typing import Any

from workers.errors import BadInputError

LENGTH_BYTES = 8
HEADER_LIMIT = 100_000_000
"""The limit of the reference implementation: a larger header is refused before it is read."""

BITS_PER_ELEMENT = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

LARGEST_SIZE = (1 << 64) - 1
"""What the reference implementation can count, in elements."""

MOST_DIMENSIONS = 64
"""What torch and numpy can hold."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor: where it lies in its weight file, in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: the tensors in the order of their bytes, and the raw bytes it came from."""

    entries: tuple[TensorEntry, ...]
    raw: bytes
    """Length prefix and JSON: everything in the file before the first tensor."""


def header_length(prefix: bytes, file: str, file_size: int) -> int:
    """Bytes of JSON that follow the prefix; an implausible one is a `BadInputError`."""
    if len(prefix) < LENGTH_BYTES:
        raise BadInputError(
            f"{file}: {file_size} bytes is too short for a safetensors file; fetch it again"
        )
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > HEADER_LIMIT:
        raise BadInputError(
            f"{file}: header of {length} bytes is over the limit of {HEADER_LIMIT}; "
            "this is not a safetensors file, or it is damaged"
        )
    if LENGTH_BYTES + length > file_size:
        raise BadInputError(
            f"{file}: truncated: the header needs {LENGTH_BYTES + length} bytes and the file has "
            f"{file_size}; fetch it again"
        )
    return length


def parse_header(raw: bytes, file: str, file_size: int) -> Header:
    """Parse length prefix plus JSON (`raw`) of `file`, and check it against the file's size."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise BadInputError(f"{file}: the header names tensor {key!r} twice")
            found[key] = value
        return found

    try:
        table = json.loads(
            raw[LENGTH_BYTES:].decode(),
            object_pairs_hook=unique_keys,
            parse_int=_parse_size,
            parse_constant=_refuse_constant,
        )
    except BadInputError:
        raise
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{file}: the header is not valid JSON ({error})") from error
    if not isinstance(table, dict):
        raise BadInputError(f"{file}: the header is not a JSON object")
    metadata = table.pop("__metadata__", None)
    if metadata is not None and not _is_table_of_texts(metadata):
        raise BadInputError(f"{file}: the header's __metadata__ is not a table of texts")
    data_start = len(raw)
    entries = [_parse_entry(name, value, file, data_start) for name, value in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = data_start
    for entry in entries:
        if entry.stop > file_size:
            raise BadInputError(
                f"{file}: tensor {entry.name!r} ends at byte {entry.stop} but the file has "
                f"{file_size}: truncated, fetch it again"
            )
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a hole"
            raise BadInputError(f"{file}: tensor {entry.name!r} {kind} (byte {entry.start})")
        position = entry.stop
    if position != file_size:
        raise BadInputError(
            f"{file}: {file_size - position} bytes after the last tensor belong to none"
        )
    return Header(tuple(entries), raw)


def _parse_entry(name: str, value: Any, file: str, data_start: int) -> TensorEntry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise BadInputError(f"{file}: tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not _is_text(name):
        raise BadInputError(f"{file}: tensor {name!r} has a name that is not valid Unicode")
    if not isinstance(dtype, str) or dtype not in BITS_PER_ELEMENT:
        shown = reprlib.repr(dtype)
        raise BadInputError(f"{file}: tensor {name!r} has the unknown dtype {shown}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise BadInputError(f"{file}: tensor {name!r} has a malformed shape or data_offsets")
    start, stop = offsets
    wanted = _elements(shape) * BITS_PER_ELEMENT[dtype] // 8
    if wanted > LARGEST_SIZE or len(shape) > MOST_DIMENSIONS:
        raise BadInputError(
            f"{file}: tensor {name!r} of dtype {dtype} and shape {reprlib.repr(shape)} needs more than any "
            "memory holds: the header is damaged"
        )
    if stop - start != wanted:
        raise BadInputError(
            f"{file}: tensor {name!r} of dtype {dtype} and shape {shape} needs {wanted} bytes, "
            f"its data_offsets span {stop - start}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _elements(shape: list[int]) -> int:
    """Their product, or some number over `LARGEST_SIZE` as soon as it is that large."""
    product = 1
    for size in shape:
        product *= size
        if product > LARGEST_SIZE:
            break
    return product


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _parse_size(digits: str) -> int | str:
    """A number as the format allows it; what is none stays text, so that its tensor can be named."""
    return int(digits) if digits.isdigit() and len(digits) < 20 else digits


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_table_of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_text(part) for item in value.items() for part in item
    )


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON can spell half a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value
