"""What stored tensors are called, and which component each belongs to, by the names that models have.

Models call the same things otherwise: `transformer.h.3.attn`, `model.language_model.layers.3.self_attn`,
`backbone.layers.3.mixer`. A *canonical name* has no prefix, `layers.N` for a decoder layer and one spelling
for what many models have, so that parents pair by name however they are stored, and a stored tensor finds the
parameter that a library loads it into. Everything else is left as it is stored.
"""

from __future__ import annotations

import re
from typing import Any

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"

COMPONENTS = (
    "embedding",
    "attention",
    "linear_attention",
    "mlp",
    "router",
    "expert",
    "shared_expert",
    "norm",
    "lm_head",
    "vision",
    "mtp",
    "unknown",
)
"""`linear_attention` stands for all that mixes tokens without attention (state spaces, convolutions), `norm`
also for what scales or mixes the residual streams, `vision` for the towers and projectors of all other
modalities, `mtp` for multi-token prediction layers."""

PREFIXES = (
    "model.language_model.model.", "model.language_model.", "language_model.model.",
    "language_model.backbone.", "language_model.", "model.text_model.", "model.", "backbone.",
    "transformer.", "gpt_neox.",
)  # fmt: skip

LAYER_NUMBER = re.compile(r"(\b(?:layers|h|blocks)\.)(\d+)(?=\.)")
"""Where the stored name of a decoder layer's tensor says which layer it is."""

_SPELLINGS = (
    # Outside of layers.
    (r"^(wte|word_embeddings|tok_embeddings|embed_in|embed|embeddings)(?=\.weight$)", "embed_tokens"),
    (r"^(embed_out|output|head)(?=\.(weight|bias)$)", "lm_head"),
    (r"^hc_head_(fn|base|scale)$", r"hc_head.hc_\1"),
    # Experts, as most models name them; Granite and Step have all of a layer in one tensor.
    (r"(\.experts\.\d+|\.shared_experts?|\.feed_forward)\.w1\.", r"\1.gate_proj."),
    (r"(\.experts\.\d+|\.shared_experts?|\.feed_forward)\.w2\.", r"\1.down_proj."),
    (r"(\.experts\.\d+|\.shared_experts?|\.feed_forward)\.w3\.", r"\1.up_proj."),
    (r"\.block_sparse_moe\.input_linear\.", ".mlp.experts.gate_up_proj."),
    (r"\.block_sparse_moe\.output_linear\.", ".mlp.experts.down_proj."),
    (r"\.moe\.((gate|up|down)_proj)\.", r".mlp.experts.\1."),
    (r"\.share_expert\.", ".mlp.shared_experts."),
    (r"^(layers\.\d+)\.(gate|shared_experts?)\.", r"\1.mlp.\2."),
    # A layer of Nemotron-H is one block, whatever it does.
    (r"\.mixer\.([qkvo]_proj)\.", r".self_attn.\1."),
    (r"\.mixer\.(experts|gate|shared_experts|up_proj|down_proj|fc[12]_latent_proj)\.", r".mlp.\1."),
    # What is added to a router's scores, in it or beside it.
    (r"\.ffn\.gate\.bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.(block_sparse_moe|feed_forward|ffn|moe)\.", ".mlp."),
    (
        r"\.mlp\.((gate|router|experts)\.)?(moe_statics\.)?"
        r"(e_score_correction_bias|expert_bias|router_bias)$",
        ".mlp.gate.e_score_correction_bias",
    ),
    (r"\.mlp\.router\.layer\.", ".mlp.router."),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
)  # fmt: skip
SPELLINGS = tuple((re.compile(pattern), spelling) for pattern, spelling in _SPELLINGS)
ANY_SPELLING = re.compile("|".join(f"(?:{pattern})" for pattern, _ in _SPELLINGS))
"""Most of the many names of a mixture's experts need none, which one search tells sooner than twenty."""

OTHER_LAYERS = re.compile(r"^(transformer\.(h|blocks)|h)\.(?=\d)")
"""What GPT-2, Falcon, Bloom or MPT call `layers.`."""

OUTSIDE_LAYERS = (
    ("mtp", re.compile(r"mtp\.")),
    (
        "vision",
        re.compile(
            r"(visual|\w*vision_\w+|(audio|image|video)_\w+|embed_(audio|vision)|multi_modal_\w+|(pre_)?mm_\w+|"
            r"embed_tokens_extend|patch_merge\w*|\w*projector|connector|aligner|merger|\w*resampler\w*|"
            r"sam_model|qformer|query_tokens|mlp1)(\.|$)"
        ),
    ),
    (
        "norm",
        re.compile(r"(\w*norm|\w*layernorm|norm_f|ln_f)(\.norm)?\.(weight|bias)$|hc_head\."),
    ),
    (
        "embedding",
        re.compile(
            r"(embed_tokens|embed_tokens_per_layer|per_layer_model_projection|wpe|altup_\w+)\."
        ),
    ),
    ("lm_head", re.compile(r"lm_head\.")),
)

CONSTANTS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias)$")
CAUSAL_MASK = re.compile(r"(.*\.)?(attn|attention)\.bias$")
"""What old files hold that follows from the configuration. A mask is `[1, 1, n, n]`."""

INSIDE_LAYERS = (
    ("unknown", CONSTANTS),
    ("unknown", CAUSAL_MASK),
    (
        "norm",
        re.compile(
            r"((.*\.)?(\w*(layernorm|norm)(_?\d+|\.\d+)?|ln_?\d|ln_\w+)\.(weight|bias)|layer_scalar|"
            r"\w+_hc\.\w+|cross_attn_\w+_gate|\w*residual\w*(\.\w+)?)$"
        ),
    ),
    ("attention", re.compile(r"(self_attn|self_attention|cross_attn|attention|attn)\.")),
    ("attention", re.compile(r"temporal_block\.[qkvo]_proj\.")),
    ("linear_attention", re.compile(r"(linear_attn|mamba|mixer|conv|temporal_block)\.")),
    ("shared_expert", re.compile(r"mlp\.(shared_experts?|shared_expert_gate|shared_mlp)\.")),
    ("expert", re.compile(r"(mlp\.)?experts\.")),
    ("router", re.compile(r"(mlp\.gate|mlp\.router|router)\.")),
    ("mlp", re.compile(r"(mlp|mlps\.\d+|mlp_block|shared_mlp|laurel)\.")),
    ("embedding", re.compile(r"(per_layer_input_gate|per_layer_projection|altup)\.")),
)

LAYER = re.compile(r"layers\.([0-9]{1,6})\.(.+)")

TOKEN_TABLE = re.compile(r"\.tid2eid$")
"""DeepSeek-V4's routers that look up a token's experts: numbers of experts, which no arithmetic is for."""


def canonical_name(stored: str) -> str:
    """The name without wrapper prefixes and in the common spelling."""
    name = OTHER_LAYERS.sub("layers.", stored, count=1)
    for prefix in PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    if ANY_SPELLING.search(name):
        for pattern, spelling in SPELLINGS:
            name = pattern.sub(spelling, name)
    return name


def classify(name: str, text_config: dict[str, Any]) -> tuple[str, int | None, str]:
    """(component, layer, rest of the name behind the layer) of a canonical name."""
    inside = LAYER.match(name)
    if inside is None:
        for component, pattern in OUTSIDE_LAYERS:
            if pattern.match(name):
                return component, None, name
        return "unknown", None, name
    layer, rest = int(inside[1]), inside[2]
    layers = text_config.get("num_hidden_layers")
    if layers is not None and layer >= layers:
        # DeepSeek stores its multi-token prediction as layers behind the last one.
        return "mtp", None, rest
    for component, pattern in INSIDE_LAYERS:
        if pattern.match(rest):
            if rest.startswith("shared_mlp.") and text_config.get("num_local_experts"):
                component = "shared_expert"  # Granite calls the network of its dense models so, too
            return component, layer, rest
    return "unknown", layer, rest
