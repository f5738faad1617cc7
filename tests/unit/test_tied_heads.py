"""Heads that are their embedding: which configurations say so, and what is merged of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from orchestrator.single_merge import merge_recipe
from orchestrator.verification import verify_child
from tests.checkpoint_files import assert_same_bits, read_tensors, write_checkpoint
from tests.families import write_tokenizer
from workers.checkpoints import ArchitectureMap, open_checkpoint
from workers.checkpoints.architecture import TIED_BY_DEFAULT
from workers.checkpoints.names import canonical_name
from workers.errors import BadInputError

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def write(folder: Path, name: str, head: str, config: dict[str, Any]) -> Path:
    """A checkpoint with a head of its `own`, its embedding `again` as one, or `none`."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    embedding, own = torch.randn(2, 6, 4, generator=generator)
    tensors = {EMBEDDING: embedding, NORM: torch.ones(4)}
    if head != "none":
        tensors[HEAD] = own if head == "own" else embedding.clone()
    return write_checkpoint(folder / name, tensors, config={"num_hidden_layers": 0} | config)


def merge(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The tensors of the even mean of `father` and `mother`."""
    recipe = {
        "parents": [{"name": name, "path": str(folder / name)} for name in ("father", "mother")],
        "rules": [{"method": "linear", "parameters": {"weight": 1}}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
    merge_recipe(str(folder / "recipe.yaml"), str(folder / "child"))
    return read_tensors(folder / "child")


def tied_in_transformers() -> set[str]:
    """Language models with the names that we know, whose configurations tie their heads by default."""
    found = set()
    for kind, classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if "text_config" in CONFIG_MAPPING[kind].sub_configs:
            continue  # its text model is looked at by itself
        name = classes if isinstance(classes, str) else classes[0]
        keys = getattr(getattr(transformers, name, None), "_tied_weights_keys", None)
        names = {canonical_name(k): canonical_name(v) for k, v in dict(keys or {}).items()}
        is_named_so = names.get("lm_head.weight") == "embed_tokens.weight"
        if is_named_so and CONFIG_MAPPING[kind]().tie_word_embeddings:
            found.add(kind)
    return found


def test_the_model_types_that_tie_by_default_do_so_in_transformers() -> None:
    """Of what this release of it has; of the architectures that are known by name, all that do are listed."""
    there = TIED_BY_DEFAULT & set(CONFIG_MAPPING)
    assert {kind for kind in there if CONFIG_MAPPING[kind]().tie_word_embeddings} == there
    named = (
        "llama", "qwen", "gemma", "mixtral", "deepseek", "gpt", "bloom", "falcon", "mpt", "mamba",
        "nemotron", "granite", "lfm",
    )  # fmt: skip
    assert {kind for kind in tied_in_transformers() if kind.startswith(named)} <= TIED_BY_DEFAULT


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "gemma2"}, True),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, False),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, True),
        (
            {
                "model_type": "gemma3",
                "text_config": {"model_type": "gemma3_text", "tie_word_embeddings": False},
            },
            False,
        ),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({}, False),
    ],
)
def test_what_the_configuration_says_counts_before_the_default(
    tmp_path: Path, config: dict[str, Any], tied: bool
) -> None:
    folder = write(tmp_path, "model", "again", config)
    assert ArchitectureMap.of(open_checkpoint(str(folder))).ties_head == tied


@pytest.mark.parametrize(("fathers", "mothers"), [("none", "again"), ("again", "none")])
def test_a_redundant_head_of_a_model_that_ties_by_default_is_none_of_its_own(
    tmp_path: Path, fathers: str, mothers: str
) -> None:
    gemma = {"model_type": "gemma2"}
    father, mother = (
        read_tensors(write(tmp_path, name, head, gemma))
        for name, head in (("father", fathers), ("mother", mothers))
    )
    child = merge(tmp_path)
    assert (HEAD in child) == (fathers == "again")
    mean = (father[EMBEDDING] + mother[EMBEDDING]) / 2
    for name in child.keys() & {EMBEDDING, HEAD}:
        torch.testing.assert_close(child[name], mean)


@pytest.mark.parametrize(
    "head", [HEAD, "embed_out.weight", "output.weight", "language_model.lm_head.weight"]
)
def test_a_head_of_a_mothers_own_is_refused_beside_a_tied_one(head: str, tmp_path: Path) -> None:
    write(tmp_path, "father", "none", {"model_type": "gemma2"})
    config = {"model_type": "gemma2", "tie_word_embeddings": False, "num_hidden_layers": 0}
    tensors = read_tensors(write(tmp_path, "mother", "own", config))
    tensors[head] = tensors.pop(HEAD)
    shutil.rmtree(tmp_path / "mother")
    write_checkpoint(tmp_path / "mother", tensors, config=config)
    with pytest.raises(BadInputError, match=r"^mother .* an lm_head of its own, which father ties"):
        merge(tmp_path)


LLAMA = {"model_type": "llama"}
TIED = LLAMA | {"tie_word_embeddings": True}


@pytest.mark.parametrize("with_base", [False, True])
def test_the_head_of_a_tied_mother_is_her_embedding(tmp_path: Path, with_base: bool) -> None:
    father = read_tensors(write(tmp_path, "father", "own", LLAMA))
    mother = read_tensors(write(tmp_path, "mother", "none", TIED))
    base = read_tensors(write(tmp_path, "base", "none", TIED))
    task = {"method": "task_arithmetic", "parameters": {"weight": 1}}
    changes = {"base": str(tmp_path / "base"), "rules": [task]} if with_base else {}
    child = merge(tmp_path, **changes)
    expected = (father[HEAD] + mother[EMBEDDING]) / 2
    if with_base:
        expected = father[HEAD] + mother[EMBEDDING] - base[EMBEDDING]
    torch.testing.assert_close(child[HEAD], expected)
    lineage = json.loads((tmp_path / "child" / "lineage.json").read_text())
    (head,) = [tensor for tensor in lineage["tensors"] if tensor["name"] == HEAD]
    assert head["changed"] == {"father": 24, "mother": 24}
    places = [str(tmp_path / name) for name in ("father", "mother")]
    assert verify_child(str(tmp_path / "child"), places)["problems"] == []


def test_a_head_that_was_not_compared_with_a_tied_mother_is_verified_so(tmp_path: Path) -> None:
    """Children are older than the mother's head: their lineages count all of it as changed."""
    head = {"where": {"names": [HEAD]}, "method": "passthrough", "parameters": {"source": "father"}}
    father = read_tensors(write(tmp_path, "father", "own", LLAMA))
    mother = write(tmp_path, "mother", "none", TIED)
    tensors = read_tensors(mother) | {EMBEDDING: father[HEAD]}
    shutil.rmtree(mother)
    write_checkpoint(mother, tensors, config={"num_hidden_layers": 0} | TIED)
    rest = {"method": "linear", "parameters": {"weight": 1}}
    merge(tmp_path, rules=[head, rest])
    file = tmp_path / "child" / "lineage.json"
    lineage = json.loads(file.read_text())
    (head,) = [tensor for tensor in lineage["tensors"] if tensor["name"] == HEAD]
    assert head["changed"].pop("mother") == 0
    for child in (lineage, json.loads(file.read_text())):
        file.write_text(json.dumps(child))
        places = [str(tmp_path / name) for name in ("father", "mother")]
        assert verify_child(str(tmp_path / "child"), places)["problems"] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"vocabulary": "union"},
        {"vocabulary": "mother"},
        {"rules": [{"method": "passthrough", "parameters": {"source": "mother"}}]},
        {"dtype": "BF16"},
    ],
)
def test_a_tied_mother_is_merged_as_if_she_stored_her_head(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    children = []
    for head, config in (("none", TIED), ("again", LLAMA)):
        folder = tmp_path / head
        father = write(folder, "father", "own", LLAMA)
        mother = write(folder, "mother", head, config)
        write_tokenizer(father, ["<pad>", *"abcd"])
        write_tokenizer(mother, ["<pad>", *"adce"])
        if "vocabulary" not in changes:
            shutil.copy(father / "tokenizer.json", mother)
        children.append(merge(folder, **changes))
    assert HEAD in children[0]
    assert_same_bits(*children)
