"""`darwin merge` of parents with different tokenizers: the child is a model that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer

from orchestrator.descent.attribution import attribute_checkpoint
from orchestrator.single_merge import merge_recipe
from tests.checkpoint_files import read_tensors, to_float64
from tests.families import SMALL
from tests.vocabularies import (
    EMBEDDING,
    ENGLISH,
    HEAD,
    JAPANESE,
    SlowRows,
    byte_level,
    meanings,
    permuted,
)
from workers.errors import BadInputError


def tokenizers() -> dict[str, Tokenizer]:
    return {
        "father": byte_level(ENGLISH, 290),
        "mother": permuted(byte_level(JAPANESE, 320, ["<|end|>", "<|tool|>"]), 4),
        "base": byte_level([*ENGLISH, "a cat"], 300),
    }


PADDING = {"father": 2, "mother": 5, "base": 0}


@pytest.fixture(scope="module", params=[False, True], ids=["two tables", "tied"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    for seed, (name, tokenizer) in enumerate(tokenizers().items()):
        rows = tokenizer.get_vocab_size(with_added_tokens=True) + PADDING[name]
        end = tokenizer.token_to_id("<|end|>")
        config = transformers.LlamaConfig(
            **SMALL | {"vocab_size": rows, "eos_token_id": end}, tie_word_embeddings=request.param
        )
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder / name)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|end|>"
        ).save_pretrained(folder / name)
    return folder


def merge(family: Path, out: Path, **recipe: object) -> Path:
    file = out.with_suffix(".yaml")
    parents = [{"name": name, "path": str(family / name)} for name in ("father", "mother")]
    data = {"parents": parents, "base": str(family / "base"), **recipe}
    file.write_text(yaml.safe_dump(data))
    merge_recipe(str(file), str(out))
    return out


@pytest.mark.parametrize("choice", ["union", "mother", "base"])
def test_the_child_speaks_the_chosen_vocabulary(family: Path, tmp_path: Path, choice: str) -> None:
    weights = {"father": 0.75, "mother": 0.5}
    rules = [{"method": "task_arithmetic", "parameters": {"weight": weights}}]
    child = merge(family, tmp_path / "child", rules=rules, vocabulary=choice)

    tokenizer = Tokenizer.from_file(str(child / "tokenizer.json"))
    owner = "father" if choice == "union" else choice
    merged = read_tensors(child)
    tied = HEAD not in read_tensors(family / "father")
    assert (HEAD in merged) == (not tied)
    for name in [EMBEDDING, *([] if tied else [HEAD])]:
        speakers = {
            parent: (own, to_float64(read_tensors(family / parent)[name]).tolist())
            for parent, own in tokenizers().items()
        }
        slow = SlowRows(speakers, owner, meanings(tokenizer), len(merged[name]))
        for row, found in enumerate(to_float64(merged[name])):
            base = numpy.array(slow.value("base", row))
            wanted = base + sum(
                weight * (numpy.array(slow.value(parent, row)) - base)
                for parent, weight in weights.items()
            )
            numpy.testing.assert_allclose(found, wanted, rtol=2**-8, atol=1e-6)

    config = json.loads((child / "config.json").read_text())
    assert config["vocab_size"] == len(merged[EMBEDDING])
    model = transformers.AutoModelForCausalLM.from_pretrained(child)
    loaded = transformers.AutoTokenizer.from_pretrained(child)
    assert model.config.eos_token_id == loaded.eos_token_id == tokenizer.token_to_id("<|end|>")
    assert model.generation_config.eos_token_id == loaded.eos_token_id
    text = "the quick fox 名前は<|tool|>"
    ids = loaded(text, return_tensors="pt")["input_ids"]
    assert loaded.decode(ids[0]) == text
    assert int(ids.max()) < len(merged[EMBEDDING])
    assert model(ids).logits.isfinite().all()


def test_rows_are_attributed_token_by_token(family: Path, tmp_path: Path) -> None:
    rules = [{"method": "linear", "parameters": {"weight": {"father": 0.7, "mother": 0.3}}}]
    child = merge(family, tmp_path / "child", rules=rules, vocabulary="union")
    parents = {name: str(family / name) for name in ("father", "mother")}
    found = attribute_checkpoint(str(child), parents, str(family / "base"))
    embedding = next(part for part in found["components"] if part["component"] == "embedding")
    wanted = {"father": 0.7, "mother": 0.3, "base": 0.0}
    assert embedding["coefficients"] == pytest.approx(wanted, abs=2e-3)
    assert embedding["explained"] > 0.999


def test_a_parent_is_taken_over_row_by_row(family: Path, tmp_path: Path) -> None:
    rules = [{"method": "passthrough", "parameters": {"source": "mother"}}]
    child = merge(family, tmp_path / "child", rules=rules, vocabulary="union")
    tokenizer = Tokenizer.from_file(str(child / "tokenizer.json"))
    mother, mothers = tokenizers()["mother"], read_tensors(family / "mother")[EMBEDDING]
    found = read_tensors(child)[EMBEDDING]
    for content in ("<|tool|>", "<|end|>", "名前は", "Ġ"):
        own = mother.token_to_id(content)
        if own is None:
            (own,) = mother.encode(content).ids
        assert torch.equal(found[tokenizer.token_to_id(content)], mothers[own]), content


def test_without_a_vocabulary_the_parents_are_refused(family: Path, tmp_path: Path) -> None:
    rules = [{"method": "linear", "parameters": {"weight": 0.5}}]
    with pytest.raises(BadInputError, match="vocabulary: union"):
        merge(family, tmp_path / "child", rules=rules)
    assert not (tmp_path / "child").exists()
