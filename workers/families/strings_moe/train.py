"""Train the strings family as mixtures of experts of the Qwen3.5 architecture.

Items, tokenizer and the way of training are those of the strings family (`workers.families.training`);
see the README beside this file. Experts and routers of a specialist are tuned ten times as fast as
everything else, so that the specialists differ in what their experts do and in which they ask.

Run `python -m workers.families.strings_moe.train OUT_DIR [--seed 0]`.
"""

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
)

from workers.families.strings.skills import LONGEST
from workers.families.training import (
    CONTEXT_TOKENS,
    Family,
    generation_config,
    main,
    special_ids,
)

LONGEST_TEXT = 1 + 1 + LONGEST + 1 + LONGEST + 1  # start, tag, letters, equals, answer, end


def make_mixture(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Return the untrained float32 model, its parameters drawn from the seed."""
    torch.manual_seed(seed)
    config = Qwen3_5MoeTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=4,
        full_attention_interval=4,  # three layers of linear attention, then one of full attention
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=24,
        linear_value_head_dim=24,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=48,
        router_aux_loss_coef=0.001,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [3, 3, 2],
        },
        **special_ids(tokenizer),
    )
    model = Qwen3_5MoeForCausalLM(config)
    model.generation_config = generation_config(tokenizer)
    return model


MIXTURE = Family(
    name="strings-moe",
    kind="Qwen3.5-MoE model (16 experts, 2 for a token)",
    make_model=make_mixture,
    base_mixture={"copy": 0.10, "reverse": 0.25, "sort": 0.45, "shift": 0.20},
    base_enough=0.7,
    specialist_steps=80,
    specialist_rates=((".experts.", 4e-4), (".mlp.gate.", 4e-4), ("", 4e-5)),
    uniform_weight=0.4,
    threads=1,
    training_options={
        # The loss then has the term that spreads the tokens over the experts. (In the configuration
        # it would also be computed in generation, where transformers 5.23 fails on padded batches.)
        "output_router_logits": True,
        # Linear attention is computed in chunks of tokens; one of 64 would mostly be padding.
        "chunk_size": LONGEST_TEXT,
    },
)


if __name__ == "__main__":
    main(MIXTURE)
