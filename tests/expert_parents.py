"""Small checkpoints of mixtures of experts with random weights, in either layout, and the same reordered."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tests.checkpoint_files import read_tensors, write_checkpoint

EXPERTS, LAYERS, HIDDEN, INNER = 6, 2, 16, 8
CONFIG = {
    "model_type": "qwen3_5_moe",
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
}
Tensors = dict[str, torch.Tensor]


def random_experts(
    seed: int, near: Tensors | None = None, scale: float = 0.02, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """Fused tensors of a small model; with `near` that model, a little changed."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (20, HIDDEN)}
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        shapes |= {
            f"model.layers.{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{mlp}.gate.weight": (EXPERTS, HIDDEN),
            f"{mlp}.gate.e_score_correction_bias": (EXPERTS,),
            f"{mlp}.experts.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
            f"{mlp}.experts.down_proj": (EXPERTS, HIDDEN, INNER),
            f"{mlp}.shared_expert_gate.weight": (1, HIDDEN),
        }
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if near is not None:
        values = {name: near[name].float() + scale * value for name, value in values.items()}
    return {name: value.to(dtype) for name, value in values.items()}


def reordered(tensors: Tensors, orders: dict[int, Sequence[int]]) -> Tensors:
    """The same model with the experts of each layer renamed: place e holds what was expert `order[e]`."""
    found = dict(tensors)
    for layer, order in orders.items():
        for name in tensors:
            if f".layers.{layer}.mlp.gate." in name or f".layers.{layer}.mlp.experts." in name:
                found[name] = tensors[name][list(order)].contiguous()
    return found


def copy_reordered(source: Path, target: Path, orders: dict[int, Sequence[int]]) -> Path:
    """A written model of single experts, its experts renamed as by `reordered`."""
    shutil.copytree(source, target)
    found: Tensors = {}
    for name, value in read_tensors(source).items():
        layer, expert = (re.search(rf"\.{kind}\.(\d+)\.", name) for kind in ("layers", "experts"))
        order = orders.get(int(layer[1])) if layer else None
        if order is not None and expert:
            place = order.index(int(expert[1]))
            name = name.replace(f".experts.{expert[1]}.", f".experts.{place}.")
        elif order is not None and ".mlp.gate." in name:
            value = value[list(order)].contiguous()
        found[name] = value
    safetensors.torch.save_file(found, target / "model.safetensors", {"format": "pt"})
    return target


def unfused(tensors: Tensors) -> Tensors:
    """The same model with a tensor for each matrix of each expert."""
    found: Tensors = {}
    for name, value in tensors.items():
        stem, _, role = name.rpartition(".")
        if not stem.endswith(".experts"):
            found[name] = value
            continue
        for expert, matrix in enumerate(value):
            if role == "down_proj":
                found[f"{stem}.{expert}.down_proj.weight"] = matrix.contiguous()
            else:
                gate, up = matrix.chunk(2)
                found[f"{stem}.{expert}.gate_proj.weight"] = gate.contiguous()
                found[f"{stem}.{expert}.up_proj.weight"] = up.contiguous()
    return found


FP8_BLOCK = 8


def fp8_pack(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Single experts as FP8 codes with a scale for each block, and the values that these stand for."""
    pack, values = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if ".experts." in name:
            blocks = weight.float().unfold(0, FP8_BLOCK, FP8_BLOCK).unfold(1, FP8_BLOCK, FP8_BLOCK)
            scale = blocks.abs().amax(dim=(2, 3)) / 448
            whole = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
            pack[name] = (weight.float() / whole).to(torch.float8_e4m3fn)
            pack[f"{name}_scale_inv"] = scale
            values[name] = (pack[name].float() * whole).to(weight.dtype)
    return pack, values


FP8_CONFIG = {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
}


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The order that undoes one."""
    return tuple(order.index(place) for place in range(len(order)))


def write_experts(folder: Path, tensors: Tensors, **config: Any) -> Path:
    return write_checkpoint(folder, tensors, config=CONFIG | config)
