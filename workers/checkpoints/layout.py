"""The form of a child: which files it has, and which tensors of which shape and dtype lie in them.

By default that is the father's, header by header. A child whose layers are stacked anew, whose dtype or
shard size is chosen, or whose father is quantised, gets files of its own, in the father's order.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from workers.checkpoints.architecture import LAYER, ArchitectureMap, LogicalTensor
from workers.checkpoints.checkpoint import SINGLE_FILE, WeightFile
from workers.checkpoints.safetensors_format import (
    BITS_PER_ELEMENT,
    LENGTH_BYTES,
    Header,
    TensorEntry,
)
from workers.checkpoints.vocabulary import ChildVocabulary, is_token_indexed
from workers.errors import BadInputError

LAYER_NUMBER = re.compile(r"(\blayers\.)(\d+)(?=\.)")

CONFIG_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

PER_LAYER_KEYS = ("layer_types", "mlp_layer_types")
"""Configuration lists that have an entry for each layer."""

UNSTACKABLE_KEYS = (
    "num_kv_shared_layers",
    "mlp_only_layers",
    "no_rope_layers",
    "moe_layers",
    "first_k_dense_replace",
    "cross_attention_layers",
    "layers_block_type",
    "hybrid_override_pattern",
)
"""Configuration keys that speak of layers by number; stacked layers would get another meaning."""

PERIODIC_KEYS = (
    "decoder_sparse_step",
    "moe_layer_freq",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
)
"""The same, where they say that each layer of so many is of another kind."""


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


def child_layout(
    maps: dict[str, ArchitectureMap], form: Form, vocabulary: ChildVocabulary | None
) -> Layout:
    """The layout of a child of these parents, the father first, with the `vocabulary` of its form.

    Raises `BadInputError` if the father's configuration does not allow what the form asks for.
    """
    father = next(iter(maps.values()))
    checkpoint = father.checkpoint
    location = f"the child of {checkpoint.location}"
    if form == Form() and not father.scales:
        return Layout(checkpoint.weight_files, checkpoint.config, checkpoint.location, True)
    config = copy.deepcopy(checkpoint.config)
    if vocabulary is not None:
        config = vocabulary.config_changes(config)
    entries = list(_entries(father))
    if form.layers:
        entries = list(_stack(entries, maps, form.layers))
        _stack_config(config, maps, form.layers, checkpoint.location)
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
        _weight_file(name, [entry.stored for entry in group])
        for name, group in zip(names, groups, strict=True)
        if group
    )
    return Layout(files, config, location, False)


@dataclass(frozen=True)
class _Entry:
    """A stored tensor of the child, and what is known of it."""

    stored: TensorEntry
    layer: int | None
    component: str
    name: str
    """Logical name of its first element."""


def _entries(parent: ArchitectureMap) -> Iterator[_Entry]:
    firsts: dict[str, LogicalTensor] = {}
    for tensor in parent.tensors:
        firsts.setdefault(tensor.stored, tensor)
    for stored, tensor in firsts.items():
        entry = parent.checkpoint.tensors[stored]
        yield _Entry(entry, tensor.layer, tensor.component, tensor.name)


def _stack(
    entries: list[_Entry],
    maps: dict[str, ArchitectureMap],
    slices: Iterable[dict[str, tuple[int, int]]],
) -> Iterator[_Entry]:
    """The father's tensors, with the layers of the slices in the place of his own.

    Whoever's layer it is, it is stored as the father stores one of its kind: in his names, his dtype,
    fused or not as with him.
    """
    father, *_ = maps
    by_layer: dict[str, dict[int, list[_Entry]]] = {}
    for name, parent in maps.items():
        layers = by_layer.setdefault(name, {})
        for entry in _entries(parent):
            if entry.layer is not None:
                layers.setdefault(entry.layer, []).append(entry)
    kinds = {name: _kinds_of_layers(parent) for name, parent in maps.items()}
    fathers = {kind: layer for layer, kind in reversed(kinds[father].items())}
    stacked = False
    for entry in entries:
        if entry.layer is None:
            if LAYER.match(entry.name):
                raise BadInputError(
                    f"{maps[father].location}: tensor {entry.stored.name!r} is counted behind the last "
                    "layer, so the layers of this model cannot be stacked"
                )
            yield entry
            continue
        if stacked:
            continue
        stacked = True
        prefix, _ = _at_layer(entry)
        number = 0
        for part in slices:
            name = next(name for name in part if name in maps)
            first, last = part[name]
            for layer in range(first, last + 1):
                if layer not in by_layer[name]:
                    raise BadInputError(
                        f"layers: {name} ({maps[name].checkpoint.location}) has no layer {layer}: it "
                        f"has {maps[name].layers}, counted from 0"
                    )
                alike = fathers.get(kinds[name][layer])
                own = by_layer[name][layer]
                if name != father and alike is not None:
                    own = by_layer[father][alike]
                for one in own:
                    renamed = f"{prefix}{number}{_at_layer(one)[1]}"
                    yield replace(one, stored=replace(one.stored, name=renamed), layer=number)
                number += 1


def _kinds_of_layers(parent: ArchitectureMap) -> dict[int, frozenset[tuple[str, tuple[int, ...]]]]:
    """Layer -> the names, within the layer, and shapes of its tensors."""
    found: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    for tensor in parent.tensors:
        if tensor.layer is not None:
            rest = tensor.name.removeprefix(f"layers.{tensor.layer}.")
            found.setdefault(tensor.layer, set()).add((rest, tensor.shape))
    return {layer: frozenset(kind) for layer, kind in found.items()}


def _at_layer(entry: _Entry) -> tuple[str, str]:
    """What stands before and behind the number of the layer in a stored name."""
    number = LAYER_NUMBER.search(entry.stored.name)
    assert number is not None, entry.stored.name
    return entry.stored.name[: number.start(2)], entry.stored.name[number.end(2) :]


def _stack_config(
    config: dict[str, Any],
    maps: dict[str, ArchitectureMap],
    slices: tuple[dict[str, tuple[int, int]], ...],
    location: str,
) -> None:
    text = _text(config)
    by_number = [key for key in UNSTACKABLE_KEYS if text.get(key)]
    by_number += [key for key in PERIODIC_KEYS if text.get(key) not in (None, 0, 1)]
    if _kinds_in(text, "layer_types") is None:
        by_number += [key for key in ("sliding_window_pattern",) if text.get(key)]
        by_number += [key for key in ("max_window_layers",) if text.get("use_sliding_window")]
    if by_number:
        raise BadInputError(
            f"{location}/config.json: {by_number[0]} speaks of layers by number, so the layers of this "
            "model cannot be stacked"
        )
    for key in PER_LAYER_KEYS:
        own = _kinds_in(text, key)
        if own is not None:
            values = []
            for part in slices:
                name = next(name for name in part if name in maps)
                first, last = part[name]
                found = _kinds_in(_text(maps[name].checkpoint.config), key)
                values += (own if found is None else found)[first : last + 1]
            text[key] = values
    text["num_hidden_layers"] = sum(last - first + 1 for first, last in (
        next(iter(part.values())) for part in slices
    ))  # fmt: skip


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration."""
    text: dict[str, Any] = config.get("text_config") or config
    return text


def _kinds_in(text: dict[str, Any], key: str) -> list[Any] | None:
    """What a configuration says of each layer; None if it says nothing."""
    if isinstance(text.get(key), list):
        return list(text[key])
    every, layers = text.get("full_attention_interval"), text.get("num_hidden_layers")
    if key == "layer_types" and type(every) is int and every > 0 and layers:
        # As transformers reads Qwen3-Next's configuration, which has no list.
        kinds = ("linear_attention", "full_attention")
        return [kinds[number % every == 0] for number in range(1, layers + 1)]
    return None


def _retyped(entries: list[_Entry], dtype: str | None, config: dict[str, Any]) -> Iterator[_Entry]:
    """With `dtype` in the place of the dtype of most of the weights, and no codes but values."""
    sizes: dict[str, int] = {}
    for entry in entries:
        if entry.stored.dtype in (*CONFIG_DTYPES, "F64") or entry.stored.dtype.startswith("F8"):
            sizes[entry.stored.dtype] = sizes.get(entry.stored.dtype, 0) + entry.stored.elements
    if not sizes:
        yield from entries
        return
    main = max(sizes, key=lambda name: sizes[name])
    has_codes = any(name.startswith("F8") for name in sizes)
    wanted = dtype or ("BF16" if has_codes else main)
    if has_codes:
        for holder in (config, _text(config)):
            holder.pop("quantization_config", None)
    if wanted in CONFIG_DTYPES and wanted != main:
        _set_config_dtype(config, CONFIG_DTYPES[wanted])
    for entry in entries:
        is_code = entry.stored.dtype.startswith("F8")
        # What the father keeps in more digits than the rest (A_log) he does for a reason.
        change = is_code or entry.stored.dtype == main
        yield replace(entry, stored=replace(entry.stored, dtype=wanted)) if change else entry


def _set_config_dtype(config: dict[str, Any], name: str) -> None:
    holders = [holder for holder in (config, config.get("text_config")) if isinstance(holder, dict)]
    keys = [(h, key) for h in holders for key in ("dtype", "torch_dtype") if key in h]
    for holder, key in keys or [(config, "dtype")]:
        holder[key] = name


def _with_rows(entry: _Entry, rows: int) -> _Entry:
    if not is_token_indexed(entry.name) or not entry.stored.shape:
        return entry
    return replace(entry, stored=replace(entry.stored, shape=(rows, *entry.stored.shape[1:])))


def _pack(entries: list[_Entry], limit: int) -> list[list[_Entry]]:
    groups: list[list[_Entry]] = [[]]
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


def _weight_file(name: str, entries: list[TensorEntry]) -> WeightFile:
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
