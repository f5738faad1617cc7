"""A checkpoint described instead of opened: names, shapes, dtypes and files, as if from its headers.

A description is a small YAML file (`conf/checkpoint`) for models that are too large to be had for a look: it
gives everything that is planned from headers, and no bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from workers.checkpoints.checkpoint import WeightFile
from workers.checkpoints.layout import weight_file
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT, TensorEntry
from workers.errors import BadInputError

KEYS = {"hub", "config", "files", "dtype", "sets", "tensors"}
PLACE = re.compile(r"\{(\w+)\}")
NUMBERS = re.compile(r"(\d+):(\d+)(?::(\d+))?")


@dataclass(frozen=True)
class Description:
    """A checkpoint's headers (see `workers.checkpoints.checkpoint.Stored`), without a checkpoint."""

    name: str
    hub: str
    """Id of the model on the Hugging Face hub."""
    config: dict[str, Any]
    weight_files: tuple[WeightFile, ...]
    adapter: None = None

    @property
    def location(self) -> str:
        return f"a model like {self.name}"

    @property
    def place(self) -> str:
        return self.location

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every stored tensor by name, in the order of the files and of the bytes in them."""
        return {entry.name: entry for file in self.weight_files for entry in file.header.entries}

    @cached_property
    def fingerprint(self) -> str:
        """Stands for that of the described checkpoint where a recipe wants one."""
        return hashlib.sha256(f"description of {self.name}".encode()).hexdigest()


def parse_description(name: str, data: Any) -> Description:
    """The description that a YAML file holds. Raises `BadInputError` naming what is wrong in it.

    `tensors` maps names to shapes `[out, in]`, with a dtype in front where it is not the file's `dtype`; a
    name that ends at a dot maps to the tensors behind it. `{set}` in a name stands for each number of a set,
    which is written as a slice, `0:60` or `3:60:4`, also `0:60 without 3:60:4`.
    """
    if not isinstance(data, dict) or set(data) != KEYS:
        raise BadInputError(
            f"{name}: a description of a checkpoint has the keys {', '.join(sorted(KEYS))}"
        )
    sets = {key: _numbers(name, key, text) for key, text in _table(name, data, "sets").items()}
    stored = [
        TensorEntry(tensor, *_dtype_and_shape(name, tensor, shape, data["dtype"]), 0, 0)
        for tensor, shape in _tensors(name, _table(name, data, "tensors"), sets)
    ]
    if len({entry.name for entry in stored}) < len(stored):
        raise BadInputError(f"{name}: tensors: some name stands for two of them")
    files = _table(name, data, "files")
    largest, pattern = files.get("largest"), files.get("name")
    if type(largest) is not int or largest <= 0 or not isinstance(pattern, str):
        raise BadInputError(f"{name}: files: must have the bytes of the largest, and their name")
    packed = _pack(stored, largest)
    try:
        names = [pattern.format(number=n + 1, count=len(packed)) for n in range(len(packed))]
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise BadInputError(f"{name}: files: name: {pattern!r} ({error})") from error
    weight_files = tuple(map(weight_file, names, packed))
    return Description(name, str(data["hub"]), _table(name, data, "config"), weight_files)


def _table(name: str, data: dict[str, Any], key: str) -> dict[str, Any]:
    table = data[key]
    if not isinstance(table, dict):
        raise BadInputError(f"{name}: {key}: must be a table")
    return table


def _numbers(name: str, key: str, text: Any) -> list[int]:
    chosen, _, left_out = str(text).partition(" without ")
    found = []
    for part in (chosen, left_out or "0:0"):
        match = NUMBERS.fullmatch(part)
        if match is None or match[3] == "0":
            raise BadInputError(
                f"{name}: sets: {key}: {text!r} is not first:stop or first:stop:step"
            )
        found.append(range(int(match[1]), int(match[2]), int(match[3] or 1)))
    return [number for number in found[0] if number not in found[1]]


def _tensors(
    name: str, table: dict[str, Any], sets: dict[str, list[int]]
) -> Iterator[tuple[str, Any]]:
    """(name, shape) of every tensor."""
    for pattern, value in table.items():
        if not isinstance(pattern, str):
            raise BadInputError(f"{name}: tensors: {pattern!r} is not a name")
        for given in _expand(name, pattern, sets):
            if not pattern.endswith("."):
                yield given, value
            elif isinstance(value, dict):
                yield from ((given + rest, shape) for rest, shape in _tensors(name, value, sets))
            else:
                raise BadInputError(f"{name}: tensors: {pattern}: must be a table of tensors")


def _expand(name: str, pattern: str, sets: dict[str, list[int]]) -> list[str]:
    place = PLACE.search(pattern)
    if place is None:
        return [pattern]
    if place[1] not in sets:
        raise BadInputError(f"{name}: tensors: {pattern}: there is no set {place[1]!r}")
    start, stop = place.span()
    rest = _expand(name, pattern[stop:], sets)
    return [f"{pattern[:start]}{n}{behind}" for n in sets[place[1]] for behind in rest]


def _dtype_and_shape(name: str, tensor: str, given: Any, dtype: Any) -> tuple[str, tuple[int, ...]]:
    shape: list[Any] = list(given) if isinstance(given, list) else [None]
    if shape and isinstance(shape[0], str):
        dtype, *shape = shape
    if str(dtype) not in BITS_PER_ELEMENT or not all(
        type(size) is int and size > 0 for size in shape
    ):
        raise BadInputError(f"{name}: tensors: {tensor}: {given!r} is not [dtype, sizes...]")
    return dtype, tuple(shape)


def _pack(stored: list[TensorEntry], largest: int) -> list[list[TensorEntry]]:
    """The tensors in files of at most so many bytes: large ones first, file after file."""
    sizes = {e.name: e.elements * BITS_PER_ELEMENT[e.dtype] // 8 for e in stored}
    files: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in sorted(stored, key=lambda entry: (-sizes[entry.name], entry.name)):
        if files[-1] and size + sizes[entry.name] > largest:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += sizes[entry.name]
    return [sorted(file, key=lambda entry: entry.name) for file in files]
