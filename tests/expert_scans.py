"""Scans of mixtures of experts, made up: what the tests of prescriptions and expert spaces read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tests.checkpoint_files import described
from workers.checkpoints import ArchitectureMap, Checkpoint

TOKENS, PER_TOKEN = 1000, 2

Merits = dict[str, dict[int, list[list[float]]]]
"""Parent -> layer -> for each set of prompts the merit of each expert."""


def mixture(
    layers: Sequence[int], experts: int, dense: Sequence[int] = (), shared: bool = False
) -> Checkpoint:
    """A checkpoint of fused experts in `layers`, with routers, attention and norms; headers alone."""
    shapes: dict[str, Sequence[int]] = {"model.embed_tokens.weight": (16, 8)}
    for layer in (*layers, *dense):
        place = f"model.layers.{layer}"
        shapes[f"{place}.self_attn.q_proj.weight"] = (8, 8)
        shapes[f"{place}.input_layernorm.weight"] = (8,)
        if layer in dense:
            shapes[f"{place}.mlp.up_proj.weight"] = (8, 8)
            continue
        shapes[f"{place}.mlp.gate.weight"] = (experts, 8)
        shapes[f"{place}.mlp.experts.gate_up_proj"] = (experts, 8, 8)
        shapes[f"{place}.mlp.experts.down_proj"] = (experts, 8, 4)
        if shared:
            shapes[f"{place}.mlp.shared_expert.up_proj.weight"] = (4, 8)
            shapes[f"{place}.mlp.shared_expert_gate.weight"] = (1, 8)
    return described(shapes, {"num_hidden_layers": 1 + max((*layers, *dense))})


def mixture_map(layers: Sequence[int], experts: int, **arguments: Any) -> ArchitectureMap:
    return ArchitectureMap(mixture(layers, experts, **arguments))


def scan_of(merits: Merits, choices: Merits | None = None) -> dict[str, Any]:
    """A scan whose probe found these merits. Without `choices` each expert with a merit is chosen alike."""

    def routing(parent: str, layer: int, number: int, merit: list[float]) -> dict[str, Any]:
        chosen = [TOKENS * PER_TOKEN // len(merit) if value else 0 for value in merit]
        if choices is not None:
            chosen = [round(count) for count in choices[parent][layer][number]]
        return {"tokens": TOKENS, "per_token": PER_TOKEN, "choices": chosen,
                "weights": [0.1] * len(merit), "merit": merit}  # fmt: skip

    return {
        "format": 1,
        "parents": [{"name": name, "fingerprint": name * 64} for name in merits],
        "base": None,
        "static": [],
        "probe": {
            "sets": {},
            "parents": {
                parent: {
                    f"set{number}": [
                        {"layer": layer, "component": kind, "mean_token": 0.1, "last_token": 0.1}
                        | ({"routing": routing(parent, layer, number, of[number])} if kind == "mlp" else {})
                        for layer, of in layers.items()
                        for kind in ("attention", "mlp")
                    ]
                    for number in range(len(next(iter(layers.values()))))
                }
                for parent, layers in merits.items()
            },
        },
    }  # fmt: skip


def random_merits(
    parents: Sequence[str], layers: Sequence[int], experts: int, seed: int, sets: int = 2
) -> Merits:
    """Merits that differ, with a few experts that nobody, or only some, use."""
    chance = random.Random(seed)
    silent = {
        (layer, expert) for layer in layers for expert in range(experts) if chance.random() < 0.1
    }

    def value(layer: int, expert: int) -> float:
        if (layer, expert) in silent or chance.random() < 0.1:
            return 0.0
        return round(chance.uniform(0.01, 2.0), 4)

    return {
        parent: {
            layer: [[value(layer, expert) for expert in range(experts)] for _ in range(sets)]
            for layer in layers
        }
        for parent in parents
    }
