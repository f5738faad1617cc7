"""Layers stacked anew: whose they are, how they are stored, and what the configuration says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from workers.checkpoints.architecture import ArchitectureMap, LogicalTensor
from workers.checkpoints.names import LAYER, LAYER_NUMBER
from workers.checkpoints.safetensors_format import TensorEntry
from workers.errors import BadInputError

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Configuration keys that say how many layers there are."""

PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "attn_type_list")
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
    "num_dense_layers",
    "num_hash_layers",
    "compress_ratios",
    "moe_layer_start_index",
    "moe_layers_enum",
    "full_attn_idxs",
    "attn_layer_indices",
    "hybrid_layer_ids",
    "scale_attn_by_inverse_layer_idx",
    "linear_attn_config.kda_layers",
    "linear_attn_config.full_attn_layers",
)
"""Configuration keys that speak of layers by number; stacked layers would get another meaning. `table.key` is
a key of a table in the configuration."""

PERIODIC_KEYS = (
    "decoder_sparse_step",
    "moe_layer_freq",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "attn_layer_period",
    "expert_layer_period",
    "moe_layer_interval",
)
"""The same, where they say that each layer of so many is of another kind. Which of so many it is
(Jamba's `attn_layer_offset`) means nothing without them."""

PERIODS_OF_LAYER_TYPES = ("sliding_window_pattern", "global_attn_every_n_layers")
"""The same, where `layer_types` is not given."""

LISTS_OF_TOKENS = ("token_id", "token_ids")
"""Ends of keys whose lists are short, and of as many entries as a small model has layers only by chance."""


@dataclass(frozen=True)
class Entry:
    """A stored tensor of the child, and what is known of it."""

    stored: TensorEntry
    layer: int | None
    component: str
    name: str
    """Logical name of its first element."""


def entries_of(parent: ArchitectureMap) -> Iterator[Entry]:
    firsts: dict[str, LogicalTensor] = {}
    for tensor in parent.tensors:
        firsts.setdefault(tensor.stored, tensor)
    for stored, tensor in firsts.items():
        entry = parent.checkpoint.tensors[stored]
        yield Entry(entry, tensor.layer, tensor.component, tensor.name)


def stack_layers(
    entries: list[Entry],
    maps: dict[str, ArchitectureMap],
    slices: Iterable[dict[str, tuple[int, int]]],
) -> Iterator[Entry]:
    """The father's tensors, with the layers of the slices in the place of his own.

    Whoever's layer it is, it is stored as the father stores one of its kind: in his names, his dtype,
    fused or not as with him.
    """
    father, *_ = maps
    by_layer: dict[str, dict[int, list[Entry]]] = {}
    for name, parent in maps.items():
        layers = by_layer.setdefault(name, {})
        for entry in entries_of(parent):
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


def _at_layer(entry: Entry) -> tuple[str, str]:
    """What stands before and behind the number of the layer in a stored name."""
    number = LAYER_NUMBER.search(entry.stored.name)
    assert number is not None, entry.stored.name
    return entry.stored.name[: number.start(2)], entry.stored.name[number.end(2) :]


def stack_config(
    config: dict[str, Any],
    maps: dict[str, ArchitectureMap],
    slices: tuple[dict[str, tuple[int, int]], ...],
    location: str,
) -> None:
    text = text_of(config)
    by_number = [key for key in UNSTACKABLE_KEYS if _said(text, key)]
    by_number += [key for key in PERIODIC_KEYS if text.get(key) not in (None, 0, 1)]
    # -1 is the last layer, whichever that is.
    by_number += [key for key in ("moe_layer_end_index",) if text.get(key) not in (None, -1)]
    if _kinds_in(text, "layer_types") is None:
        by_number += [key for key in PERIODS_OF_LAYER_TYPES if text.get(key)]
        by_number += [key for key in ("max_window_layers",) if text.get("use_sliding_window")]
    if by_number:
        raise BadInputError(
            f"{location}/config.json: {by_number[0]} speaks of layers by number, so the layers of this "
            "model cannot be stacked"
        )
    _check_other_lists(config, maps, slices, location)
    for key in PER_LAYER_KEYS:
        own = _kinds_in(text, key)
        if own is not None:
            values = []
            for part in slices:
                name = next(name for name in part if name in maps)
                first, last = part[name]
                found = _kinds_in(text_of(maps[name].checkpoint.config), key)
                values += (own if found is None else found)[first : last + 1]
            text[key] = values
    counts = [key for key in LAYER_COUNT_KEYS if key in text] or LAYER_COUNT_KEYS[:1]
    for key in counts:
        text[key] = sum(last - first + 1 for first, last in (
            next(iter(part.values())) for part in slices
        ))  # fmt: skip


def _check_other_lists(
    config: dict[str, Any],
    maps: dict[str, ArchitectureMap],
    slices: tuple[dict[str, tuple[int, int]], ...],
    location: str,
) -> None:
    """Refuse a list that may have an entry for each layer, unless each layer stays at its place."""
    father, *_ = maps
    layers = maps[father].layers
    spans = [part.get(father, (-1, -1)) for part in slices]
    places = [layer for first, last in spans for layer in range(first, last + 1)]
    if layers == 1 or places == list(range(layers)):
        return  # a list of one entry may be of anything
    text = text_of(config)
    for holder in (config, text):
        for key, value in holder.items():
            is_known = holder is text and key in PER_LAYER_KEYS
            if is_known or key.endswith(LISTS_OF_TOKENS) or not isinstance(value, list):
                continue
            if len(value) == layers:
                raise BadInputError(
                    f"{location}/config.json: {key} has as many entries as layers, {layers}, and is not "
                    "known: if it says something of each layer, the layers of this model cannot be stacked; "
                    "if not, take it out of the configuration for the merge"
                )


def _said(text: dict[str, Any], key: str) -> Any:
    """What a configuration has under `key`, or under `table.key`."""
    table, _, inner = key.rpartition(".")
    holder = text.get(table) if table else text
    return holder.get(inner) if isinstance(holder, dict) else None


def text_of(config: dict[str, Any]) -> dict[str, Any]:
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
