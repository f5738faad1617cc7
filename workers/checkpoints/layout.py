"""The form of a child: which files it has, and which tensors of which shape and dtype lie in them.

By default that is the father's, header by header. A child whose layers are stacked anew, whose dtype or
shard size is chosen, or whose father is quantised, gets files of its own, in the father's order.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from workers.checkpoints.architecture import ArchitectureMap
from workers.checkpoints.checkpoint import SINGLE_FILE, WeightFile
from workers.checkpoints.safetensors_format import (
    BITS_PER_ELEMENT,
    LENGTH_BYTES,
    Header,
    TensorEntry,
)
from workers.checkpoints.stacking import Entry, entries_of, stack_config, stack_layers, text_of
from workers.checkpoints.vocabulary import ChildVocabulary, is_token_indexed

CONFIG_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Layout:
    """A child's files and configuration, before there are any bytes."""

    weight_files: tuple[WeightFile, ...]
    config: dict[str, Any]
    location: str
    """What messages call it."""
    is_fathers: bool
    """Whether files and configuration are the father's own, byte by byte."""
    adapter: None = None

    @property
    def place(self) -> str:
        return self.location

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every stored tensor by name, in the order of the files and of the bytes in them."""
        return {entry.name: entry for file in self.weight_files for entry in file.header.entries}

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.stop - entry.start for entry in self.tensors.values())

    @property
    def index(self) -> bytes | None:
        """The index file; None for a checkpoint of a single file of the usual name."""
        if [file.name for file in self.weight_files] == [SINGLE_FILE]:
            return None
        weight_map = {e.name: file.name for file in self.weight_files for e in file.header.entries}
        metadata = {"total_size": self.total_bytes}
        return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2).encode()


@dataclass(frozen=True)
class Form:
    """What makes a child's layout differ from its father's."""

    layers: tuple[dict[str, tuple[int, int]], ...] = ()
    """Slices of the parents' layers, stacked."""
    dtype: str | None = None
    shard_bytes: int | None = None
    vocabulary: str | None = None
    """Whose tokens the child knows: "union", "base" or a parent's name."""
    experts: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    """The order of parents' experts (see `Recipe.experts`): it changes no file of the child."""


def child_layout(
    maps: dict[str, ArchitectureMap], form: Form, vocabulary: ChildVocabulary | None
) -> Layout:
    """The layout of a child of these parents, the father first, with the `vocabulary` of its form.

    Raises `BadInputError` if the father's configuration does not allow what the form asks for.
    """
    father = next(iter(maps.values()))
    checkpoint = father.checkpoint
    location = f"the child of {checkpoint.location}"
    if form == Form(experts=form.experts) and not father.scales:
        return Layout(checkpoint.weight_files, checkpoint.config, checkpoint.location, True)
    config = copy.deepcopy(checkpoint.config)
    if vocabulary is not None:
        config = vocabulary.config_changes(config)
    entries = list(entries_of(father))
    if form.layers:
        entries = list(stack_layers(entries, maps, form.layers))
        stack_config(config, maps, form.layers, checkpoint.location)
    entries = list(_retyped(entries, form.dtype, config))
    if vocabulary is not None:
        entries = [_with_rows(entry, vocabulary.rows) for entry in entries]
    stored = [entry.stored for entry in entries]
    keeps_files = not form.layers and form.shard_bytes is None
    if keeps_files:
        groups = [
            [e for e, s in zip(entries, stored, strict=True) if s.name in names]
            for names in ({e.name for e in f.header.entries} for f in checkpoint.weight_files)
        ]
        names = [file.name for file in checkpoint.weight_files]
    else:
        largest = max(file.size for file in checkpoint.weight_files)
        groups = _pack(entries, form.shard_bytes or largest)
        names = [SINGLE_FILE]
        if len(groups) > 1:
            count = len(groups)
            names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    files = tuple(
        weight_file(name, [entry.stored for entry in group])
        for name, group in zip(names, groups, strict=True)
        if group
    )
    return Layout(files, config, location, False)


def _retyped(entries: list[Entry], dtype: str | None, config: dict[str, Any]) -> Iterator[Entry]:
    """With `dtype` in the place of that of most of the weights, and it or BF16 in the place of codes."""
    sizes: dict[str, int] = {}
    for entry in entries:
        if entry.stored.dtype in (*CONFIG_DTYPES, "F64") or entry.stored.dtype.startswith("F8"):
            sizes[entry.stored.dtype] = sizes.get(entry.stored.dtype, 0) + entry.stored.elements
    if not sizes:
        yield from entries
        return
    codes = {name for name in sizes if name.startswith("F8")}
    plain = [name for name in sizes if name not in codes]
    main = max(plain, key=lambda name: sizes[name], default="BF16")
    if codes:
        for holder in (config, text_of(config)):
            holder.pop("quantization_config", None)
    wanted = dtype or ("BF16" if codes else main)
    if wanted in CONFIG_DTYPES and (codes or wanted != main):
        _set_config_dtype(config, CONFIG_DTYPES[wanted])
    for entry in entries:
        # What the father keeps in more digits than the rest (A_log) he does for a reason.
        change = entry.stored.dtype in codes or (dtype and entry.stored.dtype == main)
        yield replace(entry, stored=replace(entry.stored, dtype=wanted)) if change else entry


def _set_config_dtype(config: dict[str, Any], name: str) -> None:
    holders = [holder for holder in (config, config.get("text_config")) if isinstance(holder, dict)]
    keys = [(h, key) for h in holders for key in ("dtype", "torch_dtype") if key in h]
    for holder, key in keys or [(config, "dtype")]:
        holder[key] = name


def _with_rows(entry: Entry, rows: int) -> Entry:
    if not is_token_indexed(entry.name) or not entry.stored.shape:
        return entry
    return replace(entry, stored=replace(entry.stored, shape=(rows, *entry.stored.shape[1:])))


def _pack(entries: list[Entry], limit: int) -> list[list[Entry]]:
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        own = _bytes(entry.stored)
        if groups[-1] and size + own > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += own
    return groups


def _bytes(entry: TensorEntry) -> int:
    return entry.elements * BITS_PER_ELEMENT[entry.dtype] // 8


def weight_file(name: str, entries: list[TensorEntry]) -> WeightFile:
    """A file that is yet to be written, of these tensors; where they lie is worked out here."""
    # Wide dtypes first, as the safetensors library does, so that every tensor is aligned.
    ordered = sorted(entries, key=lambda entry: -BITS_PER_ELEMENT[entry.dtype])
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in ordered:
        end = position + _bytes(entry)
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(LENGTH_BYTES, "little") + text
    placed = tuple(
        replace(entry, start=len(raw) + start, stop=len(raw) + stop)
        for entry in ordered
        for start, stop in [table[entry.name]["data_offsets"]]
    )
    return WeightFile(name, len(raw) + position, Header(placed, raw))
