"""The checkpoints that `make bench-merge` merges: made once into a folder, the same bits every time.

`python -m tests.benchmarks.models FOLDER` makes them alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch

from tests.families import write_tokenizer

BASE_SPREAD, TUNED_SPREAD = 0.02, 0.002

DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 20,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 16,
    "num_experts": 256,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Family:
    """A base and its relatives: `base`, `tuned1`, `tuned2`, ... in a folder."""

    name: str
    config: dict[str, object] = field(repr=False)
    relatives: int
    files: int


FAMILIES = (
    Family("dense", DENSE, 2, 5),
    Family("large", DENSE | {"num_hidden_layers": 88}, 2, 5),
    Family("experts", EXPERTS, 1, 1),
)
"""1.2 GB in 183 tensors, three times; 4.6 GB in 795, three times; and 12,435 tiny tensors, twice."""


def make_family(family: Family, folder: Path) -> list[Path]:
    """The family's models below `folder`, base first; made if they are not there yet."""
    names = ["base", *(f"tuned{number}" for number in range(1, family.relatives + 1))]
    return [_make_model(family, folder / family.name / name, name) for name in names]


def _make_model(family: Family, target: Path, name: str) -> Path:
    if (target / "config.json").is_file():
        return target
    # A folder that has its last name is complete: nothing merges half a model.
    unfinished = target.with_name(f"{name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    shapes = dict(_shapes(family.config))
    weight_map = {}
    for number, names in enumerate(_cut(shapes, family.files), 1):
        file = f"model-{number:05}-of-{family.files:05}.safetensors"
        tensors = {tensor: _values(tensor, shapes[tensor], name) for tensor in names}
        safetensors.torch.save_file(tensors, unfinished / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * rows * columns for rows, columns in map(_rows_columns, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(unfinished)
    (unfinished / "config.json").write_text(json.dumps(family.config, indent=1))
    unfinished.rename(target)
    return target


def _shapes(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensor names and shapes, in file order."""
    size = {key: value for key, value in config.items() if isinstance(value, int)}
    hidden, vocabulary, head = size["hidden_size"], size["vocab_size"], size["head_dim"]
    queries, keys = (size[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(size["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (queries, hidden)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        if "num_experts" not in size:
            yield from _mlp(prefix + "mlp.", size["intermediate_size"], hidden)
            continue
        yield prefix + "self_attn.q_norm.weight", (head,)
        yield prefix + "self_attn.k_norm.weight", (head,)
        yield prefix + "mlp.gate.weight", (size["num_experts"], hidden)
        for expert in range(size["num_experts"]):
            yield from _mlp(f"{prefix}mlp.experts.{expert}.", size["moe_intermediate_size"], hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def _mlp(prefix: str, inner: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (inner, hidden)
    yield prefix + "up_proj.weight", (inner, hidden)
    yield prefix + "down_proj.weight", (hidden, inner)


def _cut(shapes: dict[str, tuple[int, ...]], files: int) -> list[list[str]]:
    """The names, in order, in parts of nearly the same number."""
    names = list(shapes)
    bounds = [len(names) * part // files for part in range(files + 1)]
    return [names[start:stop] for start, stop in pairwise(bounds)]


def _values(tensor: str, shape: tuple[int, ...], model: str) -> torch.Tensor:
    values = _normal(tensor, shape, "base").mul_(BASE_SPREAD).bfloat16()
    if model == "base":
        return values
    return values.float().add_(_normal(tensor, shape, model), alpha=TUNED_SPREAD).bfloat16()


def _normal(tensor: str, shape: tuple[int, ...], model: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(f"{model}/{tensor}".encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _rows_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])


if __name__ == "__main__":
    for wanted in FAMILIES:
        for made in make_family(wanted, Path(sys.argv[1])):
            print(made)
