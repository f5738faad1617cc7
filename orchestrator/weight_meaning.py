"""What configurations say of how weights are read: compared, whichever transformers wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from workers.checkpoints.checkpoint import Stored

MEANING_KEYS = (
    "model_type",
    # How matrices are cut into heads and groups.
    "num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "multi_query", "new_decoder_architecture", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "mamba_num_heads",
    "mamba_n_heads", "mamba_head_dim", "mamba_d_head", "n_groups", "mamba_n_groups", "ssm_state_size",
    "mamba_d_state", "state_size",
    # What is done between them.
    "hidden_act", "hidden_activation", "activation_function", "activation", "mlp_hidden_act",
    "mamba_hidden_act", "swiglu_limit", "parallel_attn", "use_parallel_residual",
    "apply_residual_connection_post_layernorm", "layer_types", "layers_block_type",
    "hybrid_override_pattern", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
    # Positions.
    "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved", "rotary_dim",
    "rope_interleave", "compress_rope_theta", "no_rope_layers", "position_embedding_type", "alibi",
    # How experts are chosen and weighed.
    "num_experts_per_tok", "moe_topk", "moe_k", "norm_topk_prob", "n_group", "topk_group", "scoring_func",
    "routed_scaling_factor", "router_scaling_factor",
    # What activations are multiplied by.
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale",
    "scale_emb", "scale_depth", "dim_model_base", "attention_in_multiplier", "attention_out_multiplier",
    "key_multiplier", "lm_head_multiplier", "mlp_multipliers", "ssm_in_multiplier", "ssm_out_multiplier",
    "ssm_multipliers",
)  # fmt: skip
"""Configuration keys that change what equally shaped weights mean. What else is said of rotary positions is
how longer texts are scaled, which many switch on or off with the same weights (YaRN)."""

TOLERATED_KEYS = ("rms_norm_eps", "query_pre_attn_scalar")
"""What may differ: some of Qwen2.5's base models have 1e-5 where the instruction-tuned ones have 1e-6, and
Gemma-2-9B's configuration said 224 for a month before it was mended to 256."""

SAME_ACTIVATION = {
    "swish": "silu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
}
"""Names of one function."""

UNREAD: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("use_sliding_window", False, ("sliding_window",)),
    ("topk_method", "greedy", ("n_group", "topk_group")),
)
"""(key, value, the keys that are not read where it has that): such as Qwen2.5 ships, and they differ."""

OLD_ROPE_TYPES = {"su": "longrope", "mrope": "default"}
"""What transformers once called the ways to scale positions."""

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


class Difference(NamedTuple):
    """A key that the configurations of father and mother both have, with other values."""

    key: str
    father: Any
    mother: Any


def contradictions(father: Stored, mother: Stored) -> Iterator[Difference]:
    """The differences by which equally shaped weights mean something else."""
    return (found for found in _differences(father, mother) if _matters(found.key))


def meaning_warnings(parents: Mapping[str, Stored]) -> list[str]:
    """What the user should know of differences to the first of `parents`, though they may be mixed."""
    (first, father), *others = parents.items()
    return [
        f"{name} ({mother.location}): config.json has {key} {other!r}, but {first} has {own!r}, which the "
        "child keeps"
        for name, mother in others
        for key, own, other in _differences(father, mother)
        if not _matters(key)
    ]


def _matters(key: str) -> bool:
    return key.partition(" of ")[0] in MEANING_KEYS


def _differences(father: Stored, mother: Stored) -> Iterator[Difference]:
    """What only one of them says is none: the other's model may have just that as its default."""
    configs = [_text_config(checkpoint) for checkpoint in (father, mother)]
    own, other = (_meaning(config) for config in configs)
    for switch, off, unread in UNREAD:
        if all(config.get(switch) == off for config in configs):
            for key in unread:
                own.pop(key, None)
    for key, value in own.items():
        if key in other and other[key] != value:
            yield Difference(key, value, other[key])


def _text_config(checkpoint: Stored) -> dict[str, Any]:
    text = checkpoint.config.get("text_config")
    return text if isinstance(text, dict) else checkpoint.config


def _meaning(config: dict[str, Any]) -> dict[str, Any]:
    """Key -> value of all that is said; null and "auto" say nothing."""
    found = {key: _plain(config.get(key)) for key in (*MEANING_KEYS, *TOLERATED_KEYS)}
    for layers, parameters in _rope_parameters(config).items():
        of = "" if layers == FULL_ATTENTION else f" of {layers}"
        found |= {f"{key}{of}": value for key, value in parameters.items()}
    return {key: value for key, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    """One spelling for what has several."""
    if isinstance(value, str):
        return SAME_ACTIVATION.get(value, None if value == "auto" else value)
    is_uniform = (
        isinstance(value, list) and value and type(value[0]) is int and len(set(value)) == 1
    )
    return (
        value[0] if is_uniform else value
    )  # Hunyuan has how many experts are chosen for each layer


def _rope_parameters(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Kind of layers -> the parameters of their rotary positions, as transformers 5 spells them.

    transformers 4 wrote `rope_theta`, `partial_rotary_factor` and `rope_scaling` beside one another, for
    GPT-NeoX `rotary_emb_base` and `rotary_pct`, for the sliding windows of Gemma 3 `rope_local_base_freq`.
    Parameters of no kind stand under full attention: so Gemma 3 meant them.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters")
    given = given if isinstance(given, dict) else {}
    by_layers = {layers: own for layers, own in given.items() if isinstance(own, dict)}
    by_layers = by_layers or {FULL_ATTENTION: given}
    if config.get("rope_local_base_freq") is not None:
        by_layers.setdefault(SLIDING_ATTENTION, {"rope_theta": config["rope_local_base_freq"]})
    beside = {
        "rope_theta": config.get("rope_theta", config.get("rotary_emb_base")),
        "partial_rotary_factor": config.get("partial_rotary_factor", config.get("rotary_pct")),
    }
    return {layers: _in_new_spelling(beside | own) for layers, own in by_layers.items()}


def _in_new_spelling(parameters: dict[str, Any]) -> dict[str, Any]:
    """One kind's parameters, with the type `default` where they name none; none at all if nothing is said."""
    said = {key: value for key, value in parameters.items() if value is not None}
    old = said.pop("type", "default")
    if said:
        kind = said.get("rope_type", old)
        said["rope_type"] = OLD_ROPE_TYPES.get(str(kind), kind)
    return said
