"""The architecture mapper: its score against numbers worked out by hand, and which layers it pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.aligning.architecture_mapper import (
    Layer,
    compatibility,
    describe_layers,
    map_layers,
    match_layers,
)
from tests.checkpoint_files import described
from workers.checkpoints import ArchitectureMap

NETWORK = {
    "mlp.gate_proj.weight": (16, 8),
    "mlp.up_proj.weight": (16, 8),
    "mlp.down_proj.weight": (8, 16),
}
LAYER = Layer("full_attention", "dense", "silu", 32, 48, 4, 10_000)


@pytest.mark.parametrize(
    ("other", "score"),
    [
        ({}, 1.0),
        # Two of three kinds: 0.5 * 2/3 less than all.
        ({"mixer": "linear_attention"}, 0.5 * 2 / 3 + 0.3 + 0.2),
        ({"mixer": "sliding_attention", "activation": "gelu_pytorch_tanh"}, 0.5 / 3 + 0.5),
        ({"feed_forward": "experts", "mixer": "x", "activation": None}, 0.5),
        # hidden 32/64, neurons 48/48, heads 2/4: a mean of 2/3.
        ({"hidden": 64, "heads": 2}, 0.5 + 0.3 * 2 / 3 + 0.2),
        ({"intermediate": 96, "parameters": 40_000}, 0.5 + 0.3 * 2.5 / 3 + 0.2 / 4),
    ],
)
def test_compatibility(other: dict[str, Any], score: float) -> None:
    changed = replace(LAYER, **other)
    assert compatibility(LAYER, changed) == pytest.approx(score, abs=1e-12)
    assert compatibility(changed, LAYER) == pytest.approx(score, abs=1e-12)


def decoder(layers: int, hidden: int, neurons: int, **config: Any) -> ArchitectureMap:
    """The headers of a model as large as those that are published: no byte of it exists."""
    kinds = config["layer_types"]
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(layers):
        name = f"model.language_model.layers.{number}"
        shapes |= {
            f"{name}.mlp.gate_proj.weight": (neurons, hidden),
            f"{name}.mlp.up_proj.weight": (neurons, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, neurons),
            f"{name}.post_attention_layernorm.weight": (hidden,),
        }
        if kinds[number] == "linear_attention":
            shapes[f"{name}.linear_attn.in_proj_qkv.weight"] = (8192, hidden)
        else:
            shapes[f"{name}.self_attn.q_proj.weight"] = (config["q_rows"], hidden)
        if config.get("gemma"):
            shapes[f"{name}.pre_feedforward_layernorm.weight"] = (hidden,)
            shapes[f"{name}.post_feedforward_layernorm.weight"] = (hidden,)
            shapes[f"{name}.layer_scalar"] = (1,)
    return ArchitectureMap(described(shapes, {"text_config": config}))


def gemma4_e4b() -> ArchitectureMap:
    return decoder(
        42,
        2560,
        10240,
        hidden_size=2560,
        hidden_activation="gelu_pytorch_tanh",
        num_attention_heads=8,
        num_hidden_layers=42,
        layer_types=[*["sliding_attention"] * 5, "full_attention"] * 7,
        q_rows=2048,
        gemma=True,
    )


def qwen3_5_4b(hidden: int = 2560) -> ArchitectureMap:
    return decoder(
        32,
        hidden,
        9216,
        hidden_size=hidden,
        hidden_act="silu",
        num_attention_heads=16,
        linear_num_value_heads=32,
        num_hidden_layers=32,
        layer_types=[*["linear_attention"] * 3, "full_attention"] * 8,
        q_rows=8192,
    )


def test_layers_are_described_by_headers_and_configuration() -> None:
    gemma, qwen = describe_layers(gemma4_e4b()), describe_layers(qwen3_5_4b())
    assert [layer.mixer for layer in gemma[4:7]] == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    assert (gemma[0].hidden, gemma[0].intermediate, gemma[0].heads) == (2560, 10240, 8)
    assert gemma[0].parameters == 3 * 2560 * 10240 + 2048 * 2560 + 3 * 2560 + 1
    assert gemma[0].scaled and not qwen[0].scaled
    assert [layer.heads for layer in qwen[:4]] == [32, 32, 32, 16]
    assert qwen[0].activation == "silu" and gemma[0].activation == "gelu_pytorch_tanh"


def test_layers_without_layer_types_are_told_apart_by_tensors_and_pattern() -> None:
    shapes = {
        "model.layers.0.linear_attn.in_proj_z.weight": (8, 4),
        "model.layers.1.self_attn.q_proj.weight": (8, 4),
    }
    kinds = describe_layers(ArchitectureMap(described(shapes, {})))
    assert [layer.mixer for layer in kinds] == ["linear_attention", "full_attention"]
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (8, 4) for n in range(3)}
    kinds = describe_layers(ArchitectureMap(described(shapes, {"sliding_window_pattern": 2})))
    assert [layer.mixer for layer in kinds] == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]


def test_a_gemma_father_and_a_qwen_mother() -> None:
    matches = map_layers(gemma4_e4b(), qwen3_5_4b())
    assert [match.layer for match in matches] == list(range(42))
    pairs = [(m.layer, m.mother_layer) for m in matches if m.mother_layer is not None]
    # Each layer once, in order, and near in depth.
    assert [j for _, j in pairs] == sorted({j for _, j in pairs})
    assert all(abs((i + 0.5) / 42 - (j + 0.5) / 32) <= 0.25 for i, j in pairs)
    # Full attention finds full attention: it scores more, so it goes first.
    full = [m for m in matches if m.layer % 6 == 5]
    assert all(m.mother_layer is not None and m.mother_layer % 4 == 3 for m in full)
    # Equal feed-forward kind alone; 2560/2560, 9216/10240, 8/16; all parameters of the layer.
    own = 3 * 2560 * 10240 + 2048 * 2560 + 3 * 2560 + 1
    hers = 3 * 2560 * 9216 + 8192 * 2560 + 2560
    score = 0.5 * 2 / 3 + 0.3 * (1 + 0.9 + 0.5) / 3 + 0.2 * own / hers
    assert full[0].compatibility == pytest.approx(score, abs=1e-12)
    assert {m.option for m in matches if m.mother_layer is not None} == {"neuron_matched"}
    assert all(m.reason for m in matches if m.mother_layer is None)
    said = " / ".join(full[0].not_accounted)
    for word in ("silu neurons run with gelu_pytorch_tanh", "pre_feedforward", "layer_scalar"):
        assert word in said


def test_a_model_and_itself_are_mapped_one_to_one() -> None:
    for parent in (gemma4_e4b(), qwen3_5_4b()):
        matches = map_layers(parent, parent)
        assert [(m.layer, m.mother_layer, m.compatibility) for m in matches] == [
            (number, number, 1.0) for number in range(parent.layers)
        ]
        assert {m.not_accounted for m in matches} == {()}


def test_layers_below_the_threshold_are_skipped() -> None:
    sliding, full = replace(LAYER, mixer="sliding_attention"), LAYER
    own, hers = [full, sliding, full, sliding], [full, full, full, full]
    assert match_layers(own, hers, 0.9) == {0: 0, 2: 2}
    assert match_layers(own, hers, 0.5) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert match_layers(own, hers, 1.1) == {}


def test_far_layers_are_not_matched() -> None:
    odd = replace(LAYER, mixer="linear_attention", activation="gelu")
    # The two that are alike are three layers of four apart.
    assert match_layers([LAYER, odd, odd, odd], [odd, odd, odd, LAYER], 0.9) == {1: 1, 2: 2}


def test_other_hidden_sizes_are_skipped_with_the_reason() -> None:
    matches = map_layers(gemma4_e4b(), qwen3_5_4b(hidden=2048))
    assert {m.option for m in matches} == {"skip"}
    reasons = [m.reason or "" for m in matches if m.mother_layer is not None]
    assert reasons and all("2560" in reason and "2048" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("shapes", "word"),
    [
        ({"mlp.experts.gate_up_proj": (4, 16, 8), "mlp.experts.down_proj": (4, 8, 8)}, "experts"),
        ({"mlp.gate_up_proj.weight": (32, 8), "mlp.down_proj.weight": (8, 16)}, "gate_up_proj"),
        ({"self_attn.q_proj.weight": (8, 8)}, "no feed-forward"),
        (NETWORK | {"mlp.gate_proj.bias": (16,)}, "gate_proj.bias"),
        (NETWORK | {"mlp.up_proj.weight": (15, 8)}, "do not fit"),
        (dict.fromkeys(NETWORK, (0, 0)), "do not fit"),
    ],
)
def test_what_is_no_gated_network_is_skipped_with_the_reason(
    shapes: dict[str, tuple[int, ...]], word: str
) -> None:
    maps = [
        ArchitectureMap(
            described({f"model.layers.0.{name}": shape for name, shape in found.items()}, {})
        )
        for found in (NETWORK, shapes)
    ]
    for father, mother in (maps, reversed(maps)):
        (match,) = map_layers(father, mother, 0.0)
        assert match.option == "skip"
        assert word in (match.reason or "")
