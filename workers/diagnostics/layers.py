"""The decoder layers of a live transformers model, and where each adds to the residual stream.

They are found by the names of the modules (`layers.N.self_attn`, `layers.N.mlp`, ... behind the prefixes
that the architecture map knows), so that any model that is spelt as others are works; for those who need
no more than the layers, also by their number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from workers.checkpoints.names import PREFIXES
from workers.errors import BadInputError

COMPONENTS = ("attention", "mlp")

MIXERS = ("self_attn", "linear_attn", "attention", "attn", "mamba", "mixer")
FEED_FORWARDS = ("mlp", "block_sparse_moe", "feed_forward")

NORMS_OF_OUTPUTS = (
    # Where this one is, the other is applied to attention's output (Gemma 2 to 4, OLMo 2, EXAONE 4); else
    # `post_attention_layernorm` belongs to the input of the mlp.
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),  # GLM 4
)
"""Norms between a sub-module and the residual stream: what they give is what is added."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer and the modules whose outputs it adds to the residual stream."""

    index: int
    name: str
    """Of the module in the model."""
    module: torch.nn.Module
    outputs: dict[str, torch.nn.Module]
    """By component: attention (or what stands for it, such as Gated DeltaNet) and mlp (or experts)."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """The part of a model that turns tokens into hidden states."""

    name: str
    """Of the module in the model; empty if it is the model."""
    module: torch.nn.Module
    layers: tuple[DecoderLayer, ...]


def find_decoder(model: torch.nn.Module) -> Decoder:
    """The decoder of a causal language model; towers of other modalities are passed over.

    Raises `BadInputError` naming the model's class if it is not built of decoder layers with attention
    and mlp modules.
    """
    kind = type(model).__name__
    found = find_layers(model)
    if not found or any(_number(name) is None for name in found):
        raise BadInputError(
            f"{kind}: no decoder layers found in it (modules named layers.0, layers.1, ...): it cannot be "
            "probed; without a probe (scan.probe: false) it is scanned all the same"
        )
    layers = tuple(
        DecoderLayer(index, name, module, _outputs(module, f"{kind}, {name}"))
        for index, (name, module) in enumerate(found.items())
    )
    holder = layers[0].name.removesuffix("layers.0").removesuffix(".")
    return Decoder(holder, model.get_submodule(holder), layers)


def find_layers(model: Any) -> dict[str, torch.nn.Module]:
    """The decoder layers by their names in the model, the lowest first; empty if they are not found.

    Where no modules are named `layers.0`, `layers.1`, ... they are the decoder's list of as many modules as
    the configuration says there are layers (`transformer.h`, `gpt_neox.layers`, `backbone.layers`).
    """
    named = {
        number: (name, module)
        for name, module in model.named_modules()
        if (number := _number(name)) is not None
    }
    if named and sorted(named) == list(range(len(named))):
        return dict(named[number] for number in range(len(named)))
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    inside = set(model.get_decoder().modules())
    for name, module in model.named_modules():
        if module in inside and isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return {f"{name}.{number}": layer for number, layer in enumerate(module)}
    return {}


def _number(name: str) -> int | None:
    """Of a decoder layer of this name, which it is."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    match = re.fullmatch(r"layers\.(\d+)", name)
    return int(match[1]) if match else None


def _outputs(layer: torch.nn.Module, where: str) -> dict[str, torch.nn.Module]:
    children = dict(layer.named_children())
    for attention, mlp in NORMS_OF_OUTPUTS:
        if attention in children and mlp in children:
            return {"attention": children[attention], "mlp": children[mlp]}
    found = {
        component: next((children[name] for name in names if name in children), None)
        for component, names in (("attention", MIXERS), ("mlp", FEED_FORWARDS))
    }
    for component, module in found.items():
        if module is None:
            raise BadInputError(
                f"{where}: no {component} module found in it (it has {', '.join(children)}): it cannot be "
                "probed"
            )
    return {component: module for component, module in found.items() if module is not None}


@contextmanager
def observed(layers: tuple[DecoderLayer, ...]) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    """What the layers add to the residual stream, by (layer, component), of the run that is made inside.

    Of a run of one prompt of `tokens` tokens: `[tokens, hidden]`, the outputs as they are, on the
    model's device.
    """
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def hook(key: tuple[int, str]) -> Any:
        def keep(module: Any, arguments: Any, output: Any) -> None:
            assert key not in seen, f"{key} has run twice"
            tensor = output[0] if isinstance(output, tuple) else output
            seen[key] = tensor.detach().reshape(-1, tensor.shape[-1])

        return keep

    handles = [
        module.register_forward_hook(hook((layer.index, component)))
        for layer in layers
        for component, module in layer.outputs.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
