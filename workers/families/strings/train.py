"""Train the strings family: see `workers.families.training` for how.

Run `python -m workers.families.strings.train OUT_DIR [--seed 0]`.
"""

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from workers.families.training import (
    CONTEXT_TOKENS,
    Family,
    generation_config,
    main,
    special_ids,
)


def make_dense_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return the untrained float32 model, its parameters drawn from the seed."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **special_ids(tokenizer),
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = generation_config(tokenizer)
    return model


DENSE = Family(
    name="strings",
    kind="Qwen3 model",
    make_model=make_dense_model,
    base_mixture={"copy": 0.20, "reverse": 0.45, "sort": 0.20, "shift": 0.15},
    base_enough=0.75,
    specialist_steps=160,
    specialist_rates=(("", 2e-4),),
    uniform_weight=0.4,
    threads=2,
)


if __name__ == "__main__":
    main(DENSE)
