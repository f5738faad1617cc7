"""The architecture map: what each stored element of a checkpoint is for.

Parents of one architecture may store the same weights under different names and layouts: with or
without a `model.language_model.` prefix, one file per expert or all experts of a layer fused. The map
cuts every stored tensor into *logical tensors* with canonical names, each a contiguous range of one
stored tensor, so that parents pair by name whatever their layout. Together the logical tensors and the
block scales of quantized ones cover every stored element exactly once: nothing can be lost.

Recognition is by names alone (`names.py`); a tensor that fits no pattern is `unknown`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from workers.checkpoints.adapter import Adapter, AdapterChange, apply_adapter
from workers.checkpoints.checkpoint import Checkpoint, Stored
from workers.checkpoints.names import EMBEDDING, HEAD, canonical_name, classify
from workers.checkpoints.quantization import BlockScales, ScaleTable, quantization_name
from workers.checkpoints.safetensors_format import TensorEntry
from workers.errors import BadInputError

EXPERT = re.compile(r"(?:mlp\.)?experts\.([0-9]{1,6})\.")
MTP_LAYER = re.compile(r"^mtp\.layers\.[0-9]+\.")
FUSED_EXPERTS = re.compile(
    r"(?:mlp\.)?experts\.(gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight)?$"
)

MOST_TENSORS = 1 << 19
"""More logical tensors than any model has; a small file could claim any number of tiny experts."""

TRANSPOSED_FUSED_EXPERTS = {
    "gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text",
}  # fmt: skip
"""Model types whose fused experts are `[E, in, out]`. Gate and up are then interleaved in memory, so
each expert stays one logical tensor; orientation is never guessed from a shape."""

TIED_BY_DEFAULT = {
    "bloom", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "ernie4_5", "ernie4_5_moe",
    "falcon", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text",
    "gemma4_unified_text", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "granite_swa", "jetmoe", "lfm2",
    "lfm2_moe", "lfm3", "mamba", "minicpm3", "mpt", "recurrent_gemma", "smollm3", "starcoder2",
    "vaultgemma", "xglm", "youtu", "zamba", "zamba2", "zaya",
}  # fmt: skip
"""Model types of transformers that tie the head to the embedding unless config.json says otherwise, and whose
configurations therefore often say nothing of it; a test compares them with transformers' own."""


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A named, contiguous part of a stored tensor: the thing that parents pair by."""

    name: str
    component: str
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    """As `[out, in]` for a matrix."""
    dtype: str
    stored: str
    """Name of the stored tensor that holds it."""
    offset: int
    """First element in the stored tensor."""
    scales: BlockScales | None = None
    """The scales of FP8 codes."""
    change: AdapterChange | None = None
    """What an adapter does to it."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_computed(self) -> bool:
        """Whether its values are not the stored bits, so that copying those would be wrong."""
        return self.scales is not None or self.change is not None

    @property
    def values_dtype(self) -> str:
        """What its values are read as: F32 where they are computed, else the dtype they have."""
        if self.change is not None and self.change.low_rank is not None:
            return "F32"
        if self.change is not None and self.change.replacement is not None:
            return self.change.replacement.dtype
        return self.dtype if self.scales is None else "F32"


class ArchitectureMap:
    """The logical tensors of one checkpoint, in the order in which they are stored.

    Raises `BadInputError` if two stored tensors would have one name, or the config is malformed.
    """

    def __init__(self, checkpoint: Stored) -> None:
        self.checkpoint = checkpoint
        self.location = checkpoint.location
        self.model_type = str(checkpoint.config.get("model_type", "unknown"))
        text_config = _text_config(checkpoint)
        scales = ScaleTable(checkpoint)
        self.scales = scales.stored
        """Stored tensors that hold the block scales of others: no weights of their own."""
        self.quantization = quantization_name(checkpoint, scales)
        """How the weights are quantized, for people; None if they are not."""
        weights = (e for e in checkpoint.tensors.values() if e.name not in self.scales)
        self.tensors = tuple(islice(name_tensors(weights, text_config, scales), MOST_TENSORS + 1))
        if len(self.tensors) > MOST_TENSORS:
            raise BadInputError(
                f"{checkpoint.location}: tensor {self.tensors[-1].stored!r} holds more experts than fit "
                f"into {MOST_TENSORS} matrices of a whole model: the file is damaged"
            )
        _check_unique(self.tensors, checkpoint.location)
        if checkpoint.adapter is not None:
            self.tensors = self._adapted(checkpoint.adapter, text_config)

    @staticmethod
    def of(checkpoint: Checkpoint) -> ArchitectureMap:
        """The map of an opened checkpoint, made once."""
        kept = vars(checkpoint)
        if "_architecture_map" not in kept:
            kept["_architecture_map"] = ArchitectureMap(checkpoint)
        found: ArchitectureMap = kept["_architecture_map"]
        return found

    def _adapted(self, adapter: Adapter, text_config: dict[str, Any]) -> tuple[LogicalTensor, ...]:
        renamed = [replace(entry, name=name) for name, entry in adapter.replacements.items()]
        replacements = [
            replace(tensor, stored=adapter.replacements[tensor.stored].name)
            for tensor in name_tensors(renamed, text_config)
        ]
        _check_unique(tuple(replacements), adapter.location)
        low_rank = {canonical_name(f"{m}.weight"): update for m, update in adapter.low_rank.items()}
        if len(low_rank) < len(adapter.low_rank):
            raise BadInputError(f"{adapter.location}: has LoRA factors of one module twice")
        return tuple(
            apply_adapter(
                self.tensors,
                adapter,
                low_rank,
                {tensor.name: tensor for tensor in replacements},
                self.model_type,
                tied=self.ties_head or not any(t.component == "lm_head" for t in self.tensors),
            )
        )

    @cached_property
    def by_name(self) -> dict[str, LogicalTensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    def find(self, name: str) -> LogicalTensor | None:
        """The tensor of this name; for a tied head that is not stored, the embedding, whose values it has."""
        if name == HEAD and name not in self.by_name and self.ties_head:
            return self.by_name.get(EMBEDDING)
        return self.by_name.get(name)

    @cached_property
    def layers(self) -> int:
        """Number of decoder layers: one more than the highest layer of the trunk."""
        return 1 + max((t.layer for t in self.tensors if t.layer is not None), default=-1)

    @cached_property
    def experts(self) -> int:
        """Number of routed experts of a layer; 0 for a dense model."""
        return 1 + max((t.expert for t in self.tensors if t.expert is not None), default=-1)

    @property
    def ties_head(self) -> bool:
        """Whether `lm_head` is the embedding, by the configuration or else by the model type."""
        text = _text_config(self.checkpoint)
        by_type = str(text.get("model_type")) in TIED_BY_DEFAULT
        of_text = text.get("tie_word_embeddings", by_type)
        return bool(self.checkpoint.config.get("tie_word_embeddings", of_text))

    @property
    def unknown(self) -> list[str]:
        """Stored tensors that fit no pattern; a merge carries them over from the father."""
        return sorted({t.stored for t in self.tensors if t.component == "unknown"})


def name_tensors(
    entries: Iterable[TensorEntry],
    text_config: dict[str, Any],
    scales: ScaleTable | None = None,
) -> Iterator[LogicalTensor]:
    """Cut stored tensors into logical ones. `text_config` is the language model's configuration."""
    for entry in entries:
        name = canonical_name(entry.name)
        component, layer, rest = classify(name, text_config)
        inner = MTP_LAYER.sub("", rest, count=1) if component == "mtp" else rest
        fused = FUSED_EXPERTS.match(inner) if component in ("expert", "mtp") else None
        if fused and len(entry.shape) == 3 and entry.elements:
            stem = name[: name.index("experts.") + len("experts")]
            for piece in _split_experts(entry, stem, fused[1], layer, text_config, scales):
                # Carried as one of no layer, and yet paired with a parent's single ones.
                yield replace(piece, component=component, expert=None) if layer is None else piece
            continue
        expert = EXPERT.match(rest) if component == "expert" else None
        yield LogicalTensor(
            name,
            component,
            layer,
            int(expert[1]) if expert else None,
            entry.shape,
            entry.dtype,
            entry.name,
            0,
            scales.of_matrix(entry) if scales else None,
        )


def _split_experts(
    entry: TensorEntry,
    stem: str,
    role: str,
    layer: int | None,
    text_config: dict[str, Any],
    scales: ScaleTable | None,
) -> Iterator[LogicalTensor]:
    """The experts of one fused tensor `[E, 2I, H]` or `[E, H, I]`, as per-expert matrices."""
    experts, rows, columns = entry.shape
    transposed = str(text_config.get("model_type")) in TRANSPOSED_FUSED_EXPERTS
    names = [f"{role}_transposed" if transposed else role]
    if role == "gate_up_proj" and not transposed and rows % 2 == 0:
        names = ["gate_proj", "up_proj"]  # gate rows come first, then up
    if transposed and scales:
        scales.refuse(
            entry, "experts stored [in, out] are not read: dequantize the checkpoint first"
        )
    shape = (rows // len(names), columns)
    for expert in range(experts):
        for part, name in enumerate(names):
            yield LogicalTensor(
                f"{stem}.{expert}.{name}.weight",
                "expert",
                layer,
                expert,
                shape,
                entry.dtype,
                entry.name,
                (expert * len(names) + part) * math.prod(shape),
                scales.of_expert(entry, expert, part, len(names)) if scales else None,
            )


def _text_config(checkpoint: Stored) -> dict[str, Any]:
    """The language model's part of the configuration, what is read of it checked."""
    config = checkpoint.config
    text = config.get("text_config") or config
    layers = text.get("num_hidden_layers") if isinstance(text, dict) else None
    if not isinstance(text, dict) or (layers is not None and type(layers) is not int):
        raise BadInputError(
            f"{checkpoint.place}/config.json: text_config must be an object, and num_hidden_layers "
            "a whole number"
        )
    return {"model_type": config.get("model_type")} | text


def _check_unique(tensors: tuple[LogicalTensor, ...], location: str) -> None:
    owners: dict[str, str] = {}
    for tensor in tensors:
        other = owners.setdefault(tensor.name, tensor.stored)
        if other != tensor.stored:
            raise BadInputError(
                f"{location}: the tensors {other!r} and {tensor.stored!r} are both {tensor.name!r}: "
                "remove the one that the model does not load"
            )
