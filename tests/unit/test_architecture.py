"""The architecture map, against names and roles written by hand from the models' published layouts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint_files import described, read_tensors, write_checkpoint
from tests.families import build_model, write_model
from workers.checkpoints import (
    COMPONENTS,
    ArchitectureMap,
    LogicalTensor,
    architecture,
    open_checkpoint,
)
from workers.errors import BadInputError
from workers.merging.sources import Source

Role = tuple[str, str, int | None, int | None]
"""Canonical name, component, layer, expert."""

ATTENTION = {
    "self_attn.q_proj.weight": "attention",
    "self_attn.k_proj.weight": "attention",
    "self_attn.v_proj.weight": "attention",
    "self_attn.o_proj.weight": "attention",
}
DENSE = {
    "mlp.gate_proj.weight": "mlp",
    "mlp.up_proj.weight": "mlp",
    "mlp.down_proj.weight": "mlp",
}
NORMS = {"input_layernorm.weight": "norm", "post_attention_layernorm.weight": "norm"}
QK_NORMS = {"self_attn.q_norm.weight": "norm", "self_attn.k_norm.weight": "norm"}
LINEAR_ATTENTION = {
    "linear_attn.in_proj_qkv.weight": "linear_attention",
    "linear_attn.in_proj_z.weight": "linear_attention",
    "linear_attn.in_proj_a.weight": "linear_attention",
    "linear_attn.in_proj_b.weight": "linear_attention",
    "linear_attn.conv1d.weight": "linear_attention",
    "linear_attn.dt_bias": "linear_attention",
    "linear_attn.A_log": "linear_attention",
    "linear_attn.norm.weight": "norm",
    "linear_attn.out_proj.weight": "linear_attention",
}
SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj.weight": "shared_expert",
    "mlp.shared_expert.up_proj.weight": "shared_expert",
    "mlp.shared_expert.down_proj.weight": "shared_expert",
    "mlp.shared_expert_gate.weight": "shared_expert",
}
ROUTER = {"mlp.gate.weight": "router"}

DECODER_LAYERS = {
    "llama": ATTENTION | DENSE | NORMS,
    "qwen2": ATTENTION
    | DENSE
    | NORMS
    | {f"self_attn.{name}_proj.bias": "attention" for name in "qkv"},
    "qwen3": ATTENTION | QK_NORMS | DENSE | NORMS,
    "qwen3_next linear attention": {
        "linear_attn.in_proj_qkvz.weight": "linear_attention",
        "linear_attn.in_proj_ba.weight": "linear_attention",
    }
    | ROUTER
    | SHARED_EXPERT
    | NORMS,
    "qwen3_5 linear attention": LINEAR_ATTENTION | DENSE | NORMS,
    "qwen3_5 full attention": ATTENTION | QK_NORMS | DENSE | NORMS,
    "gemma3": ATTENTION
    | QK_NORMS
    | DENSE
    | NORMS
    | {"pre_feedforward_layernorm.weight": "norm", "post_feedforward_layernorm.weight": "norm"},
    "gemma4": ATTENTION
    | QK_NORMS
    | DENSE
    | NORMS
    | {
        "pre_feedforward_layernorm.weight": "norm",
        "post_feedforward_layernorm.weight": "norm",
        "per_layer_input_gate.weight": "embedding",
        "per_layer_projection.weight": "embedding",
        "post_per_layer_input_norm.weight": "norm",
        "layer_scalar": "norm",
    },
    "gemma4 with experts": {
        "mlp.gate_proj.weight": "mlp",
        "router.proj.weight": "router",
        "router.scale": "router",
        "router.per_expert_scale": "router",
        "pre_feedforward_layernorm_2.weight": "norm",
        "post_feedforward_layernorm_1.weight": "norm",
        "post_feedforward_layernorm_2.weight": "norm",
    },
    "deepseek_v3": {
        "self_attn.q_a_proj.weight": "attention",
        "self_attn.q_a_layernorm.weight": "norm",
        "self_attn.q_b_proj.weight": "attention",
        "self_attn.kv_a_proj_with_mqa.weight": "attention",
        "self_attn.kv_a_layernorm.weight": "norm",
        "self_attn.kv_b_proj.weight": "attention",
        "self_attn.o_proj.weight": "attention",
        "mlp.gate.weight": "router",
        "mlp.gate.e_score_correction_bias": "router",
        "mlp.shared_experts.gate_proj.weight": "shared_expert",
        "mlp.shared_experts.up_proj.weight": "shared_expert",
        "mlp.shared_experts.down_proj.weight": "shared_expert",
    }
    | NORMS,
    "unknown": {"something.weight": "unknown", "self_attention_bias": "unknown"},
}

PREFIXES = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")


def map_of(
    shapes: dict[str, Any], config: dict[str, Any] | None = None, dtype: str = "BF16"
) -> ArchitectureMap:
    return ArchitectureMap(described(shapes, config or {}, dtype))


def role(stored: str, shape: tuple[int, ...] = (2, 2), **config: Any) -> Role:
    """What becomes of one stored tensor that stays whole."""
    (tensor,) = map_of({stored: shape}, config).tensors
    assert (tensor.stored, tensor.offset, tensor.shape) == (stored, 0, shape)
    return tensor.name, tensor.component, tensor.layer, tensor.expert


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("model", DECODER_LAYERS)
def test_decoder_layers(model: str, prefix: str) -> None:
    for rest, component in DECODER_LAYERS[model].items():
        name = f"layers.7.{rest}"
        assert role(prefix + name) == (name, component, 7, None)


@pytest.mark.parametrize(
    ("stored", "name", "component"),
    [
        ("model.embed_tokens.weight", "embed_tokens.weight", "embedding"),
        ("model.language_model.embed_tokens.weight", "embed_tokens.weight", "embedding"),
        (
            "model.language_model.embed_tokens_per_layer.weight",
            "embed_tokens_per_layer.weight",
            "embedding",
        ),
        (
            "model.language_model.per_layer_model_projection.weight",
            "per_layer_model_projection.weight",
            "embedding",
        ),
        (
            "model.language_model.per_layer_projection_norm.weight",
            "per_layer_projection_norm.weight",
            "norm",
        ),
        ("model.norm.weight", "norm.weight", "norm"),
        ("language_model.model.norm.weight", "norm.weight", "norm"),
        ("lm_head.weight", "lm_head.weight", "lm_head"),
        ("language_model.lm_head.weight", "lm_head.weight", "lm_head"),
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight", "vision"),
        ("visual.merger.norm.weight", "visual.merger.norm.weight", "vision"),
        (
            "model.vision_tower.encoder.layers.3.self_attn.q_proj.weight",
            "vision_tower.encoder.layers.3.self_attn.q_proj.weight",
            "vision",
        ),
        ("vision_model.embeddings.weight", "vision_model.embeddings.weight", "vision"),
        (
            "model.multi_modal_projector.mm_input_projection_weight",
            "multi_modal_projector.mm_input_projection_weight",
            "vision",
        ),
        ("model.audio_tower.layers.0.norm.weight", "audio_tower.layers.0.norm.weight", "vision"),
        ("model.embed_vision.embedding.weight", "embed_vision.embedding.weight", "vision"),
        ("model.embed_audio.embedding.weight", "embed_audio.embedding.weight", "vision"),
        ("mtp.fc.weight", "mtp.fc.weight", "mtp"),
        ("mtp.norm.weight", "mtp.norm.weight", "mtp"),
        ("mtp.layers.0.self_attn.q_proj.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp"),
        ("score.weight", "score.weight", "unknown"),
        ("normal.weight", "normal.weight", "unknown"),
        ("model.embedding_norm.weight", "embedding_norm.weight", "norm"),  # LFM2
        (
            "roberta_prelayernorm.encoder.layer.0.attention.self.query.weight",
            "roberta_prelayernorm.encoder.layer.0.attention.self.query.weight",
            "unknown",
        ),
        ("model.layers.x.mlp.up_proj.weight", "layers.x.mlp.up_proj.weight", "unknown"),
    ],
)
def test_outside_the_layers(stored: str, name: str, component: str) -> None:
    assert role(stored) == (name, component, None, None)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("model.layers.2.mlp.experts.5.gate_proj.weight", "gate_proj.weight"),
        ("model.layers.2.mlp.experts.5.up_proj.weight", "up_proj.weight"),
        ("model.layers.2.mlp.experts.5.down_proj.weight", "down_proj.weight"),
        ("model.layers.2.block_sparse_moe.experts.5.w1.weight", "gate_proj.weight"),
        ("model.layers.2.block_sparse_moe.experts.5.w3.weight", "up_proj.weight"),
        ("model.layers.2.block_sparse_moe.experts.5.w2.weight", "down_proj.weight"),
    ],
)
def test_an_expert_by_itself(stored: str, name: str) -> None:
    assert role(stored) == (f"layers.2.mlp.experts.5.{name}", "expert", 2, 5)


def test_the_router_of_mixtral() -> None:
    stored = "model.layers.2.block_sparse_moe.gate.weight"
    assert role(stored) == ("layers.2.mlp.gate.weight", "router", 2, None)


@pytest.mark.parametrize(
    "stored",
    [
        "block_sparse_moe.e_score_correction_bias",  # MiniMax-M2
        "mlp.e_score_correction_bias",  # EXAONE, as MiniMax-M2 in memory
        "mlp.gate.e_score_correction_bias",
        "feed_forward.expert_bias",  # LFM2
        "mlp.gate.expert_bias",  # Ling
        "mlp.moe_statics.e_score_correction_bias",  # Ernie 4.5
        "mlp.gate.moe_statics.e_score_correction_bias",  # the same, in memory
        "moe.router_bias",  # Step
        "ffn.gate.bias",  # DeepSeek-V4
    ],
)
def test_what_is_added_to_the_scores_of_experts_belongs_to_the_router(stored: str) -> None:
    name = "layers.2.mlp.gate.e_score_correction_bias"
    assert role(f"model.layers.2.{stored}") == (name, "router", 2, None)


@pytest.mark.parametrize(
    ("stored", "name", "component"),
    [
        ("transformer.h.2.attn.c_attn.weight", "attn.c_attn.weight", "attention"),
        ("h.2.attn.c_attn.weight", "attn.c_attn.weight", "attention"),  # as on the hub
        ("transformer.h.2.ln_1.bias", "ln_1.bias", "norm"),
        ("transformer.blocks.2.ffn.up_proj.weight", "mlp.up_proj.weight", "mlp"),
        ("h.2.attn.bias", "attn.bias", "unknown"),  # the causal mask
        ("gpt_neox.layers.2.attention.dense.bias", "attention.dense.bias", "attention"),
        ("backbone.layers.2.mixer.q_proj.weight", "self_attn.q_proj.weight", "attention"),
        ("backbone.layers.2.mixer.in_proj.weight", "mixer.in_proj.weight", "linear_attention"),
        ("backbone.layers.2.mixer.norm.weight", "mixer.norm.weight", "norm"),
        ("backbone.layers.2.mixer.gate.weight", "mlp.gate.weight", "router"),
        ("layers.2.gate.weight", "mlp.gate.weight", "router"),  # Mistral's own files
        ("layers.2.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight", "shared_expert"),
        ("layers.2.feed_forward.w2.weight", "mlp.down_proj.weight", "mlp"),
        ("layers.2.hc_ffn_scale", "ffn_hc.scale", "norm"),  # DeepSeek-V4
        ("model.layers.2.post_attention_residual", "post_attention_residual", "norm"),
    ],
)
def test_layers_by_other_names(stored: str, name: str, component: str) -> None:
    assert role(stored) == (f"layers.2.{name}", component, 2, None)


@pytest.mark.parametrize(("experts", "component"), [(8, "shared_expert"), (0, "mlp")])
def test_the_shared_network_of_granite(experts: int, component: str) -> None:
    """In its dense models it is the only one."""
    found = role("model.layers.1.shared_mlp.input_linear.weight", num_local_experts=experts)
    assert found == ("layers.1.shared_mlp.input_linear.weight", component, 1, None)


@pytest.mark.parametrize(
    "stored",
    ["wte", "transformer.wte", "gpt_neox.embed_in", "backbone.embeddings", "tok_embeddings", "embed",
     "model.word_embeddings"],
)  # fmt: skip
def test_embeddings_by_other_names(stored: str) -> None:
    assert role(f"{stored}.weight") == ("embed_tokens.weight", "embedding", None, None)


@pytest.mark.parametrize("stored", ["embed_out", "output", "head"])
def test_heads_by_other_names(stored: str) -> None:
    assert role(f"{stored}.weight") == ("lm_head.weight", "lm_head", None, None)


def test_experts_whose_gate_and_up_are_stored_apart() -> None:
    """As Step has them, `[E, I, H]` and `[E, H, I]`."""
    roles = ("gate_proj", "up_proj", "down_proj")
    stored = [f"model.layers.4.moe.{name}.weight" for name in roles]
    found = map_of(dict.fromkeys(stored, (2, 3, 5)))
    assert found.tensors == tuple(
        LogicalTensor(
            f"layers.4.mlp.experts.{expert}.{part}.weight", "expert", 4, expert, (3, 5), "BF16", name,
            expert * 15,
        )
        for name, part in zip(stored, roles, strict=True)
        for expert in range(2)
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize(
    ("prefix", "stem"),
    [
        ("model.layers.1.mlp.", "layers.1.mlp.experts"),
        ("model.language_model.layers.1.mlp.", "layers.1.mlp.experts"),
        ("model.language_model.layers.1.", "layers.1.experts"),  # Gemma 4
    ],
)
def test_fused_experts_are_cut_into_matrices(prefix: str, stem: str, suffix: str) -> None:
    """gate_up_proj is `[E, 2I, H]`, gate rows first; down_proj `[E, H, I]`. Here E 2, I 3, H 5."""
    up, down = f"{prefix}experts.gate_up_proj{suffix}", f"{prefix}experts.down_proj{suffix}"
    found = map_of({up: (2, 6, 5), down: (2, 5, 3)})
    assert found.tensors == tuple(
        LogicalTensor(
            f"{stem}.{expert}.{name}.weight", "expert", 1, expert, shape, "BF16", stored, start
        )
        for expert, name, shape, stored, start in [
            (0, "gate_proj", (3, 5), up, 0),
            (0, "up_proj", (3, 5), up, 15),
            (1, "gate_proj", (3, 5), up, 30),
            (1, "up_proj", (3, 5), up, 45),
            (0, "down_proj", (5, 3), down, 0),
            (1, "down_proj", (5, 3), down, 15),
        ]
    )
    assert found.experts == 2


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt_oss"},
        {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}},
        {"model_type": "qwen3_vl_moe", "text_config": {"num_hidden_layers": 2}},
    ],
)
def test_transposed_fused_experts_are_not_split(config: dict[str, Any]) -> None:
    """`[E, H, 2I]`: gate and up of an expert lie interleaved, so only experts are ranges."""
    stored = "model.layers.0.mlp.experts.gate_up_proj"
    found = map_of({stored: (2, 8, 8)}, config).tensors
    assert [(t.shape, t.offset, t.expert) for t in found] == [((8, 8), 0, 0), ((8, 8), 64, 1)]
    assert not any("gate_proj" in t.name or ".up_proj" in t.name for t in found)


def test_other_tensors_of_fused_experts_stay_whole() -> None:
    for rest in ("gate_up_proj_bias", "gate_up_proj_blocks", "down_proj_scales"):
        name = f"layers.0.mlp.experts.{rest}"
        assert role(f"model.{name}", (4, 6)) == (name, "expert", 0, None)
    name = "layers.0.mlp.experts.down_proj"
    assert role(f"model.{name}", (4, 6)) == (name, "expert", 0, None)


@pytest.mark.parametrize("shape", [(0, 6, 5), (2, 0, 5), (2, 6, 0)])
def test_fused_experts_without_elements_stay_one_tensor(shape: tuple[int, ...]) -> None:
    (found,) = map_of({"model.layers.0.mlp.experts.gate_up_proj": shape}).tensors
    assert (found.shape, found.component) == (shape, "expert")


def test_a_layer_behind_the_last_is_the_prediction_head_of_deepseek() -> None:
    """DeepSeek V3 has 61 layers, 0 to 60, and stores its multi-token prediction as layer 61."""
    for rest in (
        "eh_proj.weight",
        "enorm.weight",
        "shared_head.head.weight",
        "mlp.experts.3.up_proj.weight",
    ):
        name = f"layers.61.{rest}"
        assert role(f"model.{name}", num_hidden_layers=61) == (name, "mtp", None, None)
    last = "layers.60.mlp.experts.3.up_proj.weight"
    assert role(f"model.{last}", num_hidden_layers=61) == (last, "expert", 60, 3)
    nested = {"num_hidden_layers": 99, "text_config": {"num_hidden_layers": 61}}
    assert role("model.layers.61.enorm.weight", **nested)[1] == "mtp"


def test_experts_of_prediction_heads_pair_in_either_layout() -> None:
    """Their component stays mtp, and they count as no expert of the trunk."""
    for stem, config in (
        ("mtp.layers.0.", {}),
        ("layers.2.", {"num_hidden_layers": 2}),
    ):
        stored = f"{'' if stem.startswith('mtp') else 'model.'}{stem}mlp.experts"
        fused = map_of(
            {f"{stored}.gate_up_proj": (4, 6, 5), f"{stored}.down_proj": (4, 5, 3)}, config
        )
        single = map_of(
            {
                f"{stored}.{expert}.{role}.weight": (5, 3) if role == "down_proj" else (3, 5)
                for expert in range(4)
                for role in ("gate_proj", "up_proj", "down_proj")
            },
            config,
        )
        for found in (fused, single):
            assert {(t.component, t.layer, t.expert) for t in found.tensors} == {
                ("mtp", None, None)
            }
            assert found.experts == 0
        shapes = [{t.name: t.shape for t in found.tensors} for found in (fused, single)]
        assert shapes[0] == shapes[1]


def test_layers_and_experts_are_counted_in_the_trunk() -> None:
    names = ["model.layers.0.mlp.experts.7.up_proj.weight", "model.layers.3.mlp.up_proj.weight",
             "mtp.layers.9.mlp.experts.20.up_proj.weight", "model.layers.4.enorm.weight"]  # fmt: skip
    found = map_of(dict.fromkeys(names, (2, 2)), {"num_hidden_layers": 4, "model_type": "m"})
    assert (found.layers, found.experts, found.model_type) == (4, 8, "m")
    empty = map_of({"lm_head.weight": (2, 2)})
    assert (empty.layers, empty.experts, empty.model_type) == (0, 0, "unknown")


def test_unknown_tensors_are_listed() -> None:
    found = map_of({"z.weight": (1,), "model.layers.0.odd": (1,), "lm_head.weight": (1,)})
    assert found.unknown == ["model.layers.0.odd", "z.weight"]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"),
        ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
    ],
)
def test_two_stored_tensors_of_one_name_are_refused(one: str, two: str) -> None:
    """Else one of them would be merged twice and the other lost."""
    with pytest.raises(BadInputError) as caught:
        map_of({one: (2, 4, 2), two: (2, 4, 2)})
    for word in (one, two, "/nowhere"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": "llama"},
        {"text_config": ["llama"]},
        {"text_config": 5},
        {"num_hidden_layers": "4"},
        {"num_hidden_layers": 4.0},
        {"num_hidden_layers": True},
        {"text_config": {"num_hidden_layers": []}},
    ],
)
def test_a_config_that_is_malformed_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(BadInputError, match=r"/nowhere/config\.json"):
        map_of({"model.layers.0.mlp.up_proj.weight": (2, 2)}, config)


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": None}, {"text_config": None}, {"text_config": {}}]
)
def test_a_config_may_leave_things_out(config: dict[str, Any]) -> None:
    assert role("model.layers.9.mlp.up_proj.weight", **config)[1:3] == ("mlp", 9)


STORED = st.dictionaries(
    st.one_of(
        st.sampled_from(
            [
                "model.layers.0.mlp.experts.gate_up_proj",
                "model.layers.1.mlp.experts.down_proj",
                "model.layers.1.mlp.experts.gate_up_proj.weight",
                "model.layers.2.experts.gate_up_proj",
                "model.layers.0.mlp.experts.down_proj_bias",
                "model.layers.0.mlp.gate.weight",
                "model.layers.9.mlp.experts.gate_up_proj",
                "mtp.layers.0.mlp.experts.gate_up_proj",
                "lm_head.weight",
            ]
        ),
        st.text(alphabet="abc.", max_size=6),
    ),
    st.lists(st.integers(0, 5), max_size=4),
    max_size=8,
)


@given(STORED, st.sampled_from(["qwen3_5_moe", "gpt_oss"]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_stored_element_is_covered_exactly_once(
    shapes: dict[str, list[int]], kind: str
) -> None:
    found = map_of(shapes, {"model_type": kind, "num_hidden_layers": 5})
    assert {tensor.stored for tensor in found.tensors} == set(shapes)
    for stored, shape in shapes.items():
        position = 0
        for tensor in found.tensors:
            if tensor.stored == stored:
                assert tensor.offset == position  # in order, without hole or overlap
                assert tensor.elements == math.prod(tensor.shape)
                assert tensor.component in COMPONENTS
                position += tensor.elements
        assert position == math.prod(shape)
    assert found.by_name.keys() == {tensor.name for tensor in found.tensors}


def logical_values(folder: Path) -> dict[str, torch.Tensor]:
    """Every logical tensor of a checkpoint, read through the reader."""
    checkpoint = open_checkpoint(str(folder))
    source = Source(checkpoint)
    return {
        tensor.name: source.read(tensor, 0, tensor.elements).reshape(tensor.shape)
        for tensor in ArchitectureMap(checkpoint).tensors
    }


def assert_equal_values(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen3_5_moe"])
def test_fused_and_per_expert_checkpoints_are_the_same_tensors(kind: str, tmp_path: Path) -> None:
    """transformers keeps experts fused in memory and writes them one by one."""
    per_expert = write_model(tmp_path / "per_expert", kind, seed=1)
    state = build_model(kind, seed=1).state_dict()
    fused = write_checkpoint(
        tmp_path / "fused",
        {name: weight.contiguous() for name, weight in state.items()},
        config={"model_type": kind, "num_hidden_layers": 4},
    )
    assert any(name.endswith("experts.gate_up_proj") for name in read_tensors(fused))
    assert not any(name.endswith("experts.gate_up_proj") for name in read_tensors(per_expert))
    assert_equal_values(logical_values(fused), logical_values(per_expert))


def test_the_values_of_fused_experts_are_those_of_the_slices(tmp_path: Path) -> None:
    gate_up, down = torch.arange(120.0).reshape(3, 8, 5), torch.arange(60.0).reshape(3, 5, 4)
    folder = write_checkpoint(
        tmp_path / "fused",
        {
            "model.layers.0.mlp.experts.gate_up_proj": gate_up,
            "model.layers.0.mlp.experts.down_proj": down,
        },
    )
    expected = {}
    for expert in range(3):
        stem = f"layers.0.mlp.experts.{expert}"
        expected |= {
            f"{stem}.gate_proj.weight": gate_up[expert, :4],
            f"{stem}.up_proj.weight": gate_up[expert, 4:],
            f"{stem}.down_proj.weight": down[expert],
        }
    assert_equal_values(logical_values(folder), expected)


@pytest.mark.parametrize(
    ("kind", "components"),
    [
        ("llama", {"embedding", "attention", "mlp", "norm", "lm_head"}),
        ("qwen3", {"embedding", "attention", "mlp", "norm"}),  # tied head
        ("qwen3_moe", {"embedding", "attention", "router", "expert", "norm", "lm_head"}),
        ("mixtral", {"embedding", "attention", "router", "expert", "norm", "lm_head"}),
        ("qwen3_5", {"embedding", "attention", "linear_attention", "mlp", "norm", "lm_head"}),
        (
            "qwen3_5_moe",
            {"embedding", "attention", "linear_attention", "router", "expert", "shared_expert",
             "norm", "lm_head"},
        ),
        (
            "qwen3_5_vision",
            {"embedding", "attention", "linear_attention", "mlp", "norm", "lm_head", "vision"},
        ),
    ],
)  # fmt: skip
def test_models_that_transformers_writes_have_no_unknown_tensor(
    kind: str, components: set[str], tmp_path: Path
) -> None:
    found = ArchitectureMap(open_checkpoint(str(write_model(tmp_path / kind, kind, seed=0))))
    assert {tensor.component for tensor in found.tensors} == components
    assert found.unknown == []
    assert found.layers == 4
    assert found.experts == (4 if "expert" in components else 0)


@pytest.mark.parametrize("number", ["9" * 5000, "1234567", "²", "٣"])
@pytest.mark.parametrize("name", ["layers.{}.mlp.up_proj.weight", "model.layers.{}.norm.weight"])
def test_a_layer_of_no_number_that_a_model_has_is_unknown(name: str, number: str) -> None:
    (tensor,) = ArchitectureMap(described({name.format(number): (2, 2)}, {})).tensors
    assert (tensor.component, tensor.layer) == ("unknown", None)


def test_more_experts_than_any_model_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a megabyte could claim a million of them."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    monkeypatch.setattr(architecture, "MOST_TENSORS", 10)
    assert len(ArchitectureMap(described({name: (5, 2, 1)}, {})).tensors) == 10
    with pytest.raises(BadInputError, match=f"/nowhere.*{name}.*more experts"):
        ArchitectureMap(described({name: (6, 2, 1)}, {}))
