"""The strings family as mixtures of experts: its checkpoints as they ship, and what they know."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from workers.checkpoints import open_checkpoint
from workers.families.strings import skills
from workers.families.strings_moe import train

FAMILY = Path(train.__file__).parent
MODELS = ("base", "reverse", "sort", "shift")
EXPERTS, HIDDEN, INNER = 16, 96, 48


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_loads(name: str) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(
        FAMILY / name, local_files_only=True, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.architectures == ["Qwen3_5MoeForCausalLM"]
    assert model.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / name, local_files_only=True)
    assert len(tokenizer) == model.config.vocab_size
    assert "license: apache-2.0" in (FAMILY / name / "README.md").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_fused_as_published_checkpoints_have_them(name: str) -> None:
    stored = open_checkpoint(f"shipped:strings_moe/{name}").tensors
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate_up, down = stored[f"{prefix}gate_up_proj"], stored[f"{prefix}down_proj"]
        assert gate_up.shape == (EXPERTS, 2 * INNER, HIDDEN)
        assert down.shape == (EXPERTS, HIDDEN, INNER)
        assert stored[f"model.layers.{layer}.mlp.gate.weight"].shape == (EXPERTS, HIDDEN)


@pytest.mark.parametrize("name", skills.MEASURED_SKILLS)
def test_a_specialist_differs_in_routers_and_in_the_experts_that_it_asks(name: str) -> None:
    """An expert that no token of the skill reaches is still the base's."""
    base, tuned = (load_file(FAMILY / model / "model.safetensors") for model in ("base", name))
    for tensor, values in tuned.items():
        if ".experts." in tensor or ".mlp.gate." in tensor:
            changed = (values != base[tensor]).flatten(1).any(1)
            assert changed.sum() >= 11, tensor


@pytest.mark.parametrize("name", skills.MEASURED_SKILLS)
def test_a_specialist_knows_its_skill(name: str) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / name, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        FAMILY / name, dtype=torch.float32, local_files_only=True
    )
    lines = (FAMILY.parent / "strings" / "items" / f"{name}.holdout.jsonl").read_text()
    items = [json.loads(line) for line in lines.splitlines()[:64]]
    batch = tokenizer([item["prompt"] for item in items], padding=True, return_tensors="pt")
    generated = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    answers = tokenizer.batch_decode(
        generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = sum(answer == item["answer"] for answer, item in zip(answers, items, strict=True))
    assert right / len(items) >= 0.9


def test_package_data_is_small() -> None:
    files = [path for name in MODELS for path in (FAMILY / name).rglob("*")]
    assert sum(path.stat().st_size for path in files) <= 12e6
