"""The names of the models that transformers has: what each tensor that it stores is taken for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.checkpoint_files import described
from workers.checkpoints import ArchitectureMap
from workers.checkpoints.architecture import name_tensors
from workers.checkpoints.safetensors_format import TensorEntry

conversions = pytest.importorskip("transformers.core_model_loading")

CARRIED = {"vision", "mtp", "unknown"}
DENSE = {"attention", "mlp"}
SPARSE = {"attention", "router", "expert"}

FAMILIES: dict[str, set[str]] = {
    "apertus": DENSE,
    "bamba": {"linear_attention", "mlp"},
    "bloom": DENSE,
    "cohere2": DENSE,
    "deepseek_v4": SPARSE | {"shared_expert"},
    "deepseek_v3": SPARSE | {"shared_expert", "mlp"},
    "ernie4_5_moe": SPARSE | {"shared_expert", "mlp"},
    "exaone4": DENSE,
    "falcon": DENSE,
    "falcon_h1": DENSE | {"linear_attention"},
    "falcon_mamba": {"linear_attention"},
    "gemma2": DENSE,
    "gemma3n_text": DENSE,
    "glm4": DENSE,
    "glm4_moe": SPARSE | {"shared_expert", "mlp"},
    "gpt2": DENSE,
    "gpt_bigcode": DENSE,
    "gpt_neo": DENSE,
    "gpt_neox": DENSE,
    "gpt_oss": SPARSE,
    "gptj": DENSE,
    "granite": DENSE,
    "granitemoe": SPARSE,
    "granitemoehybrid": {"linear_attention", "router", "expert", "shared_expert"},
    "jamba": SPARSE | {"linear_attention", "mlp"},
    "lfm2": DENSE,
    "longcat_flash": SPARSE | {"mlp"},
    "mamba2": {"linear_attention"},
    "minimax_m2": SPARSE,
    "mistral": DENSE,
    "mpt": DENSE,
    "nemotron_h": SPARSE | {"linear_attention", "mlp", "shared_expert"},
    "olmo2": DENSE,
    "olmoe": SPARSE,
    "phi": DENSE,
    "phi3": DENSE,
    "recurrent_gemma": DENSE | {"linear_attention"},
    "seed_oss": DENSE,
    "smollm3": DENSE,
    "stablelm": DENSE,
    "starcoder2": DENSE,
    "step3p7": SPARSE | {"shared_expert", "mlp"},
}
"""Model type -> the components of its layers, besides norms."""

CALLED_OTHERWISE_IN_MEMORY = ("deepseek_v4",)


def build(kind: str) -> Any:
    """A model of the type's default configuration, but with few experts, without memory for its weights."""
    config = CONFIG_MAPPING[kind]()
    text = config.get_text_config()
    for key in ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"):
        if getattr(text, key, None):
            setattr(text, key, 8)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    model = getattr(transformers, name) if name else transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        return model(config) if name else model.from_config(config)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_names_of_a_family_are_known(kind: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {kind}")
    model = build(kind)
    state = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    stored = conversions.revert_weight_conversion(model, state)
    shapes = {name: tuple(weight.shape) for name, weight in stored.items() if name not in tied}
    text = model.config.get_text_config()
    found = ArchitectureMap(described(shapes, model.config.to_dict()))
    assert found.unknown == []
    inside = {tensor.component for tensor in found.tensors if tensor.layer is not None}
    assert inside - {"norm", "embedding"} == FAMILIES[kind]
    assert {tensor.component for tensor in found.tensors if tensor.layer is None} - CARRIED <= {
        "embedding", "norm", "lm_head"
    }  # fmt: skip
    assert found.find("embed_tokens.weight") is not None
    assert found.find("lm_head.weight") is not None
    decoder = max(
        (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)), key=len
    )
    assert found.layers == len(decoder)
    assert (found.experts >= 8) == ("expert" in FAMILIES[kind])

    if kind in CALLED_OTHERWISE_IN_MEMORY:
        return
    # Each finds the parameter that it is loaded into.
    entries = [TensorEntry(name, "BF16", tuple(w.shape), 0, 0) for name, w in state.items()]
    live = {tensor.name: tensor.shape for tensor in name_tensors(entries, text.to_dict())}
    merged = {t.name: t.shape for t in found.tensors if t.component not in CARRIED}
    assert {name: live.get(name) for name in merged} == merged
