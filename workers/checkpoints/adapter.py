"""LoRA adapters as PEFT writes them: what a folder of one adds to which weights of a base.

`adapter_config.json` says how the factors are scaled, `adapter_model.safetensors` holds them: for a
linear layer `lora_A.weight` `[r, in]` and `lora_B.weight` `[out, r]`, for an embedding table
`lora_embedding_A` `[r, rows]` and `lora_embedding_B` `[columns, r]`, and whole tensors of modules that
were trained beside them. The adapted weight is W + scaling * B A (LoRA, arXiv 2106.09685), scaling =
alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732). Nothing in the file is passed over:
what is not understood is a `BadInputError`.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workers.checkpoints.checkpoint import Checkpoint, open_weight_file, read_json
from workers.checkpoints.names import EMBEDDING, HEAD
from workers.checkpoints.quantization import FLOAT_DTYPES
from workers.checkpoints.safetensors_format import TensorEntry
from workers.errors import BadInputError
from workers.storage import Store
from workers.storage.locations import find_store

if TYPE_CHECKING:
    from workers.checkpoints.architecture import LogicalTensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

PREFIX = "base_model.model."
LINEAR_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<factor>[AB])(\.default)?")
WRAPPERS = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")

HANDLED_KEYS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "bias", "init_lora_weights",
}  # fmt: skip
KEYS_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
}  # fmt: skip
"""Of training only, or said again by the names of the stored tensors."""

PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights too."""

CONV1D_MODEL_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Layers of those models that store `[in, out]`. PEFT goes by the layer too, whatever `fan_in_fan_out`
says."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to one weight: `scaling` times the product of two stored factors."""

    a: TensorEntry
    b: TensorEntry
    scaling: float
    of_embedding: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """What an adapter does to one logical tensor of its base."""

    low_rank: LowRank | None
    transposed: bool
    """Whether the weight `[in, out]` gets the transpose of B A `[out, in]`."""
    replacement: LogicalTensor | None
    """The tensor of the adapter's file that takes the place of the base's."""


@dataclass(frozen=True)
class Adapter:
    """An opened adapter, known by its header and configuration alone."""

    weights: Checkpoint
    fan_in_fan_out: bool
    low_rank: dict[str, LowRank]
    """By the module's name in the model, such as `model.layers.0.self_attn.q_proj`."""
    replacements: dict[str, TensorEntry]
    """By the tensor's name in the model."""

    @property
    def location(self) -> str:
        return self.weights.location


def open_adapter(location: str) -> Adapter:
    """Open the adapter at `location`, any place that `find_store` takes.

    Reads `adapter_config.json` and the header of the weights, no tensor. Raises `BadInputError` naming
    the file, and the key or tensor, for anything that is missing, damaged or not understood.
    """
    return open_adapter_files(find_store(location))


def open_adapter_files(store: Store) -> Adapter:
    """Open the adapter that `store` holds; see `open_adapter`."""
    found = {info.key: info for info in store.list_objects() if "/" not in info.key}
    if CONFIG_FILE not in found:
        raise BadInputError(f"{store.uri}: no {CONFIG_FILE}: not a LoRA adapter in PEFT's format")
    if WEIGHTS_FILE not in found:
        raise BadInputError(
            f"{store.uri}: no {WEIGHTS_FILE}: save the adapter as safetensors (a pickle such as "
            "adapter_model.bin is never read)"
        )
    config = read_json(store, CONFIG_FILE)
    file = open_weight_file(store, found[WEIGHTS_FILE])
    if not isinstance(config, dict):
        raise BadInputError(f"{store.uri}/{CONFIG_FILE}: not a JSON object")
    weights = Checkpoint(store, config, (file,), (CONFIG_FILE,))
    scaling = _Scaling(config, f"{store.uri}/{CONFIG_FILE}")
    return Adapter(weights, config.get("fan_in_fan_out") is True, *_sort(weights, scaling))


def apply_adapter(
    tensors: Sequence[LogicalTensor],
    adapter: Adapter,
    low_rank: Mapping[str, LowRank],
    replacements: Mapping[str, LogicalTensor],
    model_type: str,
    tied: bool,
) -> Iterator[LogicalTensor]:
    """The base's logical tensors, with what the adapter changes in them.

    `low_rank` and `replacements` are the adapter's, by canonical names. Raises `BadInputError` for what
    fits no tensor of the base, in name or shape.
    """
    file = f"{adapter.location}/{WEIGHTS_FILE}"
    if adapter.fan_in_fan_out and model_type not in CONV1D_MODEL_TYPES:
        raise BadInputError(
            f"{adapter.location}/{CONFIG_FILE}: fan_in_fan_out is for weights stored [in, out], which a "
            f"model of type {model_type!r} has none of: set it to false"
        )
    keys = {name: update.a.name for name, update in low_rank.items()}
    keys |= {name: tensor.stored for name, tensor in replacements.items()}
    known = {tensor.name for tensor in tensors}
    for name, key in keys.items():
        if tied and name in (EMBEDDING, HEAD):  # PEFT would change one of the two
            raise BadInputError(
                f"{file}: tensor {key!r} changes one of embedding and head, which are one tensor in the "
                "base: give the base a head of its own (tie_word_embeddings: false)"
            )
        if name not in known:
            raise BadInputError(f"{file}: tensor {key!r} matches no tensor of the base ({name!r})")
    for tensor in tensors:
        if tensor.name not in keys:
            yield tensor
            continue
        update, replacement = low_rank.get(tensor.name), replacements.get(tensor.name)
        layer = tensor.name.rpartition(".weight")[0].rpartition(".")[2]
        conv1d = model_type in CONV1D_MODEL_TYPES and layer in CONV1D_MODULES
        transposed = update is not None and (update.of_embedding or conv1d)
        if update is not None:
            outer = (update.b.shape[0], update.a.shape[1])
            _check_shape(file, update.a, outer[::-1] if transposed else outer, tensor)
            if replacement is None and tensor.scales is None and tensor.dtype not in FLOAT_DTYPES:
                raise BadInputError(
                    f"{file}: tensor {update.a.name!r} is for {tensor.stored!r} of the base, which is "
                    f"{tensor.dtype} without block scales: dequantize the base first"
                )
        if replacement is not None:
            key_entry = adapter.weights.tensors[replacement.stored]
            _check_shape(file, key_entry, replacement.shape, tensor)
        yield replace(tensor, change=AdapterChange(update, transposed, replacement))


def _check_shape(
    file: str, entry: TensorEntry, shape: tuple[int, ...], tensor: LogicalTensor
) -> None:
    """`shape` is that of the weight that the adapter's tensor `entry` is for."""
    if shape != tensor.shape:
        raise BadInputError(
            f"{file}: tensor {entry.name!r} is for a weight of shape {list(shape)}, but {tensor.stored!r} "
            f"of the base has {list(tensor.shape)}: the adapter is for another base"
        )


def _sort(
    weights: Checkpoint, scaling: _Scaling
) -> tuple[dict[str, LowRank], dict[str, TensorEntry]]:
    """The stored tensors as low-rank updates by module, and replacements by tensor."""
    file = f"{weights.location}/{WEIGHTS_FILE}"
    factors: dict[tuple[str, bool], dict[str, TensorEntry]] = {}
    replacements: dict[str, TensorEntry] = {}
    for entry in weights.tensors.values():
        if entry.dtype not in FLOAT_DTYPES:
            raise BadInputError(
                f"{file}: tensor {entry.name!r} is {entry.dtype}, not floating point"
            )
        name = entry.name.removeprefix(PREFIX)
        linear, embedding = LINEAR_FACTOR.fullmatch(name), EMBEDDING_FACTOR.fullmatch(name)
        found = linear or embedding
        if name == entry.name or (found is None and ".lora_" in name):
            raise BadInputError(
                f"{file}: tensor {entry.name!r} is not understood: only LoRA factors A and B, and whole "
                f"tensors under {PREFIX}, are; merge the adapter into its base with PEFT first"
            )
        if found is not None:
            place: dict[str, TensorEntry] = factors.setdefault(
                (found["module"], embedding is not None), {}
            )
            key = found["factor"]
        else:
            place, key = replacements, WRAPPERS.sub("", name)
            scaling.check_bias(file, entry.name)
        if key in place:
            raise BadInputError(
                f"{file}: tensors {place[key].name!r} and {entry.name!r} are the same thing"
            )
        place[key] = entry
    updates = {}
    for (module, of_embedding), pair in factors.items():
        if module in updates:
            raise BadInputError(f"{file}: {module!r} has LoRA factors of two kinds")
        updates[module] = _low_rank(file, module, of_embedding, pair, scaling)
    return updates, replacements


def _low_rank(
    file: str, module: str, of_embedding: bool, pair: dict[str, TensorEntry], scaling: _Scaling
) -> LowRank:
    if set(pair) != {"A", "B"}:
        (entry,) = pair.values()
        raise BadInputError(
            f"{file}: tensor {entry.name!r} has no counterpart: the file is damaged"
        )
    a, b = pair["A"], pair["B"]
    rank, factor = scaling.of(module)
    for entry, side in ((a, 0), (b, 1)):
        if len(entry.shape) != 2 or entry.shape[side] != rank:
            raise BadInputError(
                f"{file}: tensor {entry.name!r} has shape {list(entry.shape)}, which is no factor of the "
                f"rank {rank} that {CONFIG_FILE} says"
            )
    return LowRank(a, b, factor, of_embedding)


class _Scaling:
    """What the configuration says of a module: its rank and the factor of its product."""

    def __init__(self, config: dict[str, Any], file: str) -> None:
        self._config = config
        self._file = file
        self._check_keys()
        self.rank = self._whole("r", config.get("r"))
        self.alpha = self._number("lora_alpha", config.get("lora_alpha"))
        self.ranks = self._pattern("rank_pattern", self._whole)
        self.alphas = self._pattern("alpha_pattern", self._number)

    def of(self, module: str) -> tuple[int, float]:
        """(rank, scaling) of a module."""
        rank = next((r for key, r in self.ranks if key.fullmatch(module)), self.rank)
        alpha = next((a for key, a in self.alphas if key.fullmatch(module)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def check_bias(self, file: str, tensor: str) -> None:
        bias = self._config.get("bias") or "none"
        if bias != "none" and tensor.endswith(".bias"):
            raise BadInputError(
                f"{file}: tensor {tensor!r} is a trained bias ({CONFIG_FILE}: bias {bias!r}), which is "
                "not read: merge the adapter into its base with PEFT first"
            )

    def _check_keys(self) -> None:
        kind = self._config.get("peft_type")
        if kind != "LORA":
            raise self._refusal("peft_type", "only LORA is read")
        for key in ("use_rslora", "fan_in_fan_out"):
            if self._config.get(key) not in (True, False, None):
                raise self._refusal(key, "it must be true or false")
        start = self._config.get("init_lora_weights", True)
        if start not in PLAIN_INITIALIZATIONS:
            raise self._refusal(
                "init_lora_weights",
                "it changes the base's weights too: convert the adapter to plain LoRA with PEFT "
                "(path_initial_model_for_weight_conversion)",
            )
        for key in sorted(set(self._config) - HANDLED_KEYS - KEYS_WITHOUT_EFFECT):
            if self._config[key]:
                raise self._refusal(
                    key, "this is not supported: merge the adapter into its base with PEFT first"
                )

    def _pattern(self, key: str, parse: Any) -> list[tuple[re.Pattern[str], Any]]:
        """A table of PEFT: each pattern matches module names from their end, at a dot."""
        table = self._config.get(key) or {}
        if not isinstance(table, dict):
            raise self._refusal(key, "it must be a table")
        try:
            return [
                (re.compile(rf"(.*\.)?({pattern})"), parse(f"{key}.{pattern}", value))
                for pattern, value in table.items()
            ]
        except (re.error, OverflowError, RecursionError) as error:
            raise self._refusal(key, f"a key is no regular expression ({error})") from error

    def _whole(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise BadInputError(
                f"{self._file}: {key} is {reprlib.repr(value)}, not a rank of at least 1"
            )
        return value

    def _number(self, key: str, value: Any) -> float:
        # A whole number may be too large for a float.
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise BadInputError(
                f"{self._file}: {key} is {reprlib.repr(value)}, not a finite number"
            )
        return float(value)

    def _refusal(self, key: str, reason: str) -> BadInputError:
        return BadInputError(
            f"{self._file}: {key} is {reprlib.repr(self._config.get(key))}: {reason}"
        )
