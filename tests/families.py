"""Small random families of real architectures, written by transformers: input for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

LETTERS = "abcdefghijklmnopqrstuvwxyz =?"
SPECIAL = ["<pad>", "<s>", "</s>"]

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SLIDING_LAYERS = ["sliding_attention", "full_attention"] * 2
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
OLDER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What the configurations of GPT-2 and its like know by these names, too."""
STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "patch_size": 4,
    "deepstack_visual_indexes": [],
}


def configuration(kind: str) -> Any:
    """A small configuration of an architecture, by the short names used in the tests."""
    if kind == "qwen3":
        return transformers.Qwen3Config(**SMALL, tie_word_embeddings=True)
    if kind == "llama":
        return transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)
    if kind == "qwen3_moe":
        return transformers.Qwen3MoeConfig(**SMALL, **EXPERTS, tie_word_embeddings=False)
    if kind == "mixtral":
        return transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    if kind == "qwen3_5":
        return transformers.Qwen3_5TextConfig(
            **SMALL, **LINEAR_ATTENTION, tie_word_embeddings=False
        )
    if kind == "gemma3":
        return transformers.Gemma3TextConfig(**SMALL, sliding_window=16, layer_types=SLIDING_LAYERS)
    if kind == "gemma4":
        return transformers.Gemma4TextConfig(
            **SMALL,
            sliding_window=16,
            layer_types=SLIDING_LAYERS,
            global_head_dim=32,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=40,
            num_kv_shared_layers=2,
        )
    if kind == "qwen3_5_moe":
        return transformers.Qwen3_5MoeTextConfig(**SMALL, **LINEAR_ATTENTION, **EXPERTS)
    if kind in ("gpt2", "bloom", "falcon"):
        return transformers.AutoConfig.for_model(kind, **OLDER, num_hidden_layers=4)
    if kind == "gpt_neox":
        return transformers.GPTNeoXConfig(**OLDER, num_hidden_layers=4, intermediate_size=48)
    if kind == "lfm2":
        return transformers.Lfm2Config(
            **SMALL, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"] * 2
        )
    if kind == "nemotron_h":
        return transformers.NemotronHConfig(
            **{key: value for key, value in SMALL.items() if key != "num_hidden_layers"},
            layers_block_type=["mamba", "moe", "attention", "mlp"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16,
        )
    if kind == "granitemoehybrid":
        return transformers.GraniteMoeHybridConfig(
            **SMALL | STATE_SPACE,
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=16,
            layer_types=["mamba", "attention"] * 2,
        )
    if kind == "qwen3_5_vision":
        return transformers.Qwen3_5Config(
            text_config=SMALL | LINEAR_ATTENTION,
            vision_config=VISION,
            image_token_id=37,
            video_token_id=38,
            vision_start_token_id=35,
            vision_end_token_id=36,
        )
    raise ValueError(kind)


def build_model(kind: str, seed: int) -> Any:
    """A model with random weights in bf16."""
    config = configuration(kind)
    torch.manual_seed(seed)
    if kind == "qwen3_5_vision":
        model = transformers.Qwen3_5ForConditionalGeneration(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(torch.bfloat16)


def write_tokenizer(folder: Path, tokens: Sequence[str] = (*SPECIAL, *LETTERS)) -> None:
    """A character tokenizer that begins texts with `<s>`; `tokens` in the order of their ids."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_model(folder: Path, kind: str, seed: int, spread: float = 0.0, **save: Any) -> Path:
    """Write a checkpoint. `spread` moves every weight of the model of seed 0 by that much noise,
    so that models of one kind are relatives; `save` goes to `save_pretrained`."""
    model = build_model(kind, 0 if spread else seed)
    if spread:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator) * spread
                weight.copy_(weight.float() + noise)
    model.save_pretrained(folder, **save)
    write_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# random\n")
    return folder


def write_family(folder: Path, kind: str, parents: int = 2, **save: Any) -> list[Path]:
    """A base (first) and its relatives."""
    return [
        write_model(folder / f"m{seed}", kind, seed, spread=0.02 if seed else 0.0, **save)
        for seed in range(parents + 1)
    ]
