"""The strings family that ships as package data: its items, its checkpoints and its size."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workers.families.strings import skills
from workers.families.training import training_question

FAMILY = Path(skills.__file__).parent
MODELS = ("base", "reverse", "sort", "shift")
SUCCESSOR = dict(zip("abcdefghijkl", "bcdefghijkla", strict=True))


def read_items(skill: str, split: str) -> list[dict[str, str]]:
    """Read one shipped item file."""
    lines = (FAMILY / "items" / f"{skill}.{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def expected_answer(prompt: str) -> str:
    """Answer a prompt without the code under test."""
    letters = list(prompt[1:-1])
    match prompt[0]:
        case "R":
            return "".join(letters.pop() for _ in range(len(letters)))
        case "S":
            return "".join(letter * letters.count(letter) for letter in SUCCESSOR)
        case "U":
            return "".join(SUCCESSOR[letter] for letter in letters)
    raise ValueError(f"unknown skill in prompt {prompt!r}")


def test_item_files_come_from_their_seeds(tmp_path: Path) -> None:
    skills.write_items(tmp_path)
    shipped = {path.name: path.read_bytes() for path in (FAMILY / "items").iterdir()}
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == shipped


def test_no_prompt_occurs_twice() -> None:
    prompts = [
        item["prompt"]
        for skill in skills.MEASURED_SKILLS
        for split in skills.SPLITS
        for item in read_items(skill, split)
    ]
    assert len(prompts) == 3 * (128 + 512)
    assert len(set(prompts)) == len(prompts)
    assert set(prompts) == skills.item_prompts()


@pytest.mark.parametrize("skill", skills.MEASURED_SKILLS)
@pytest.mark.parametrize(("split", "count"), [("search", 128), ("holdout", 512)])
def test_every_answer_is_right(skill: str, split: str, count: int) -> None:
    items = read_items(skill, split)
    identities = [f"{skill}-{split}-{number:04d}" for number in range(1, count + 1)]
    assert [item["id"] for item in items] == identities
    for item in items:
        assert item["prompt"][0] == skills.SKILLS[skill].tag
        assert item["prompt"][-1] == "="
        assert 5 <= len(item["answer"]) <= 8
        assert item["answer"] == expected_answer(item["prompt"])


def test_training_rejects_forbidden_prompts() -> None:
    drawn, _ = training_question({"sort": 1.0}, random.Random(7), set())
    redrawn, _ = training_question({"sort": 1.0}, random.Random(7), {drawn})
    assert redrawn != drawn
    assert redrawn[0] == drawn[0]


def test_tokenizer_is_one_token_per_character() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "base", local_files_only=True)
    ids = tokenizer("Rabc=")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "R", "a", "b", "c", "="]
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "Rabc="
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_loads(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(FAMILY / name, local_files_only=True)
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / name, local_files_only=True)
    assert len(tokenizer) == model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "license: apache-2.0" in (FAMILY / name / "README.md").read_text()


def test_reverse_specialist_reverses() -> None:
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "reverse", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        FAMILY / "reverse", dtype=torch.float32, local_files_only=True
    )
    items = read_items("reverse", "holdout")[:64]
    batch = tokenizer([item["prompt"] for item in items], padding=True, return_tensors="pt")
    generated = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    answers = tokenizer.batch_decode(
        generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = sum(answer == item["answer"] for answer, item in zip(answers, items, strict=True))
    assert right / len(items) >= 0.9


def test_package_data_is_small() -> None:
    folders = [FAMILY / name for name in (*MODELS, "items")]
    total = sum(path.stat().st_size for folder in folders for path in folder.rglob("*"))
    assert total <= 12e6
