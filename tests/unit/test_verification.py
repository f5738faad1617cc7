"""`darwin verify`: it finds what is wrong with a child, and nothing in one that is sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from orchestrator.single_merge import merge_recipe
from orchestrator.verification import verify_child
from tests.campaigns import run_darwin
from tests.checkpoint_files import INDEX, read_tensors, weight_files, write_checkpoint
from workers.errors import BadInputError


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parents")
    folders = {}
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        shards = [
            {
                f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(8, 6, generator=generator),
                f"model.layers.{layer}.input_layernorm.weight": torch.randn(6, generator=generator),
            }
            for layer in range(2)
        ]
        folders[name] = write_checkpoint(root / name, *shards)
    return folders


def child_of(parents: dict[str, Path], folder: Path, **recipe: Any) -> Path:
    places = [{"name": name, "path": str(path)} for name, path in parents.items()]
    rules = [{"method": "linear", "parameters": {"weight": 0.5}}]
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"parents": places, "rules": rules} | recipe))
    merge_recipe(str(file), str(folder / "child"))
    return folder / "child"


def problems(child: Path, *parents: Path) -> list[str]:
    found: list[str] = verify_child(str(child), [str(parent) for parent in parents])["problems"]
    return found


def test_a_child_is_sound(parents: dict[str, Path], tmp_path: Path) -> None:
    child = child_of(parents, tmp_path)
    result = verify_child(str(child), [str(parents["a"])])
    assert (result["status"], result["problems"]) == ("sound", [])
    assert result["changed"] == {"a": 108, "b": 108}


def test_a_byte_that_is_another_is_found(parents: dict[str, Path], tmp_path: Path) -> None:
    child = child_of(parents, tmp_path)
    file = weight_files(child)[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (found,) = problems(child)
    assert found.startswith(f"{file.name}: has SHA-256")


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_child_that_cannot_be_opened_any_more_is_damaged(
    damage: str, parents: dict[str, Path], tmp_path: Path
) -> None:
    child = child_of(parents, tmp_path)
    file = weight_files(child)[1]
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    result = verify_child(str(child), [])
    assert result["status"] == "damaged"
    (problem,) = result["problems"]
    assert file.name in problem
    assert run_darwin("verify", str(child), expect=1)["problems"] == result["problems"]
    with pytest.raises(BadInputError):
        verify_child(str(tmp_path / "nowhere"), [])


def test_a_tensor_that_is_gone_is_found(parents: dict[str, Path], tmp_path: Path) -> None:
    child = child_of(parents, tmp_path)
    file = weight_files(child)[1]
    tensors = safetensors.torch.load_file(file)
    lost = next(iter(tensors))
    del tensors[lost]
    safetensors.torch.save_file(tensors, file)
    index = json.loads((child / INDEX).read_text())
    del index["weight_map"][lost]
    (child / INDEX).write_text(json.dumps(index))
    found = problems(child, parents["a"])
    name = lost.removeprefix("model.")
    assert f"tensor {name!r}: was merged, but is not there" in found
    assert f"tensor {name!r} of the father a is not in the child" in found


def test_a_child_that_is_its_father_is_found(parents: dict[str, Path], tmp_path: Path) -> None:
    child = child_of(parents, tmp_path, rules=[])
    for given in ((), (parents["a"],)):
        (found,) = problems(child, *given)
        assert found.startswith("the child has the values of a:")


@pytest.mark.parametrize("layers", [[0, 1, 0, 1], [0], [0, 1, 1]])
def test_layers_of_one_parent_are_another_model(
    layers: list[int], parents: dict[str, Path], tmp_path: Path
) -> None:
    """Every tensor is the parent's own, but there are more of them, or fewer."""
    stack = [{"a": [layer, layer]} for layer in layers]
    child = child_of({"a": parents["a"]}, tmp_path, rules=[], layers=stack)
    assert len(read_tensors(child)) == 2 * len(layers)
    assert problems(child) == problems(child, parents["a"]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"tensors": {}},
        {"tensors": [{"name": "x"}]},
        {"tensors": ["x"]},
        {"parents": []},
        {"parents": ["a"]},
        {"recipe": None},
        {"format": 3},
    ],
    ids=str,
)
def test_a_lineage_that_is_none_is_an_error(
    change: dict[str, Any], parents: dict[str, Path], tmp_path: Path
) -> None:
    child = child_of(parents, tmp_path)
    lineage = json.loads((child / "lineage.json").read_text())
    (child / "lineage.json").write_text(json.dumps(lineage | change))
    with pytest.raises(BadInputError, match=r"lineage\.json"):
        problems(child, parents["a"])
