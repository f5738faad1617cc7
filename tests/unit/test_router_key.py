"""The key `router` of a recipe file: its rules, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.experts.router import HELD_OUT_EVERY, split_prompts
from orchestrator.recipe_file import RecipeFile, load_recipe_file
from orchestrator.recipe_spelling import respell
from tests.checkpoint_files import read_tensors, write_child
from tests.families import write_model
from tests.mixtures import write_recipe
from workers.diagnostics.calibration import CalibrationSet, PromptPair
from workers.errors import BadInputError
from workers.merging.executor import Merger


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("case"))


def load(case: Path, tmp_path: Path, **changes: Any) -> RecipeFile:
    data = yaml.safe_load(case.read_text()) | changes
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_recipe_file(str(file))


def prompts(count: int) -> CalibrationSet:
    pairs = tuple(PromptPair(str(n), f"do {n}", f"say {n}") for n in range(count))
    return CalibrationSet("own", pairs, "hash")


def test_kept_routers_are_the_fathers_whatever_the_rules_say(case: Path, tmp_path: Path) -> None:
    loaded = load(case, tmp_path, router="keep")
    assert loaded.harc is None
    write_child(Merger(loaded.parents, loaded.base), loaded.recipe, tmp_path / "child")
    child, father = read_tensors(tmp_path / "child"), read_tensors(case.parent / "base")
    routers = [name for name in father if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    assert all(child[name].equal(father[name]) for name in routers)
    assert not any(child[name].equal(father[name]) for name in father if ".experts." in name)


def test_rows_can_be_merged_as_their_experts(case: Path, tmp_path: Path) -> None:
    rules = [{"method": "linear", "parameters": {"weight": {"donor1": 0.25, "donor2": 0.75}},
              "parents": ["donor1", "donor2"]}]  # fmt: skip
    loaded = load(case, tmp_path, router="as_experts", rules=rules)
    write_child(Merger(loaded.parents, loaded.base), loaded.recipe, tmp_path / "child")
    child = read_tensors(tmp_path / "child")
    one, two = (read_tensors(case.parent / f"donor{n}") for n in (1, 2))
    for name in (name for name in child if name.endswith("mlp.gate.weight")):
        wanted = (0.25 * one[name].float() + 0.75 * two[name].float()).bfloat16()
        assert child[name].equal(wanted)


def test_each_donor_has_its_own_sets_or_all_have_all(case: Path, tmp_path: Path) -> None:
    own = load(case, tmp_path).harc
    assert own is not None
    assert {name: [s.name for s in sets] for name, sets in own.sets.items()} == {
        "donor1": ["donor1_prompts"],
        "donor2": ["donor2_prompts"],
    }
    assert {name: len(texts) for name, texts in own.texts.items()} == {"donor1": 32, "donor2": 32}
    assert own.holds_out
    files = [str(case.parent / f"donor{n}_prompts.jsonl") for n in (1, 2)]
    shared = load(case, tmp_path, router={"harc": {"sets": files}}).harc
    assert shared is not None
    assert list(shared.sets) == [
        "donor1",
        "donor2",
    ]  # the father is the base: it has learnt nothing
    assert {len(texts) for texts in shared.texts.values()} == {64}
    chosen = {"sets": files, "donors": ["donor2", "father"], "iterations": 5, "shrink": 1}
    asked = load(case, tmp_path, router={"harc": chosen}).harc
    assert asked is not None
    assert list(asked.sets) == ["father", "donor2"]
    assert asked.options == {"iterations": 5, "shrink": 1.0}


def test_every_fifth_prompt_is_held_out() -> None:
    used, held_out = split_prompts(prompts(12))
    assert held_out == ("do 4", "do 9") and len(used) == 10 and not set(used) & set(held_out)
    few = split_prompts(prompts(HELD_OUT_EVERY - 1))
    assert few[0] == few[1] == tuple(f"do {n}" for n in range(HELD_OUT_EVERY - 1))


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        ("average", "router: 'average' is none of keep, as_experts"),
        ({"harc": {"sets": []}}, "router.harc.sets: must be a list"),
        ({"harc": None}, "router.harc: needs the key sets"),
        ({"harc": {"sets": ["nothing"]}}, "router.harc.sets: 'nothing' is no calibration"),
        ({"harc": {"sets": {"donor9": ["code"]}}}, "'donor9' is none of the parents"),
        ({"harc": {"sets": ["code"], "donors": []}}, "there are no donors"),
        ({"harc": {"sets": ["code"], "donors": "donor1"}}, "donors: 'donor1' is no list"),
        ({"harc": {"sets": {"donor1": ["code"]}, "donors": ["donor1"]}}, "harc.donors: those"),
        ({"harc": {"sets": ["code"], "shrink": 1.5}}, "shrink: 1.5 is not from 0.0 to 1.0"),
        ({"harc": {"sets": ["code"], "iterations": 0}}, "iterations: 0 is not from 1"),
        ({"harc": {"sets": ["code"], "dtype": "int8"}}, "dtype: 'int8' is no dtype"),
        ({"harc": {"sets": ["code"], "device": 0}}, "device: 0 is not a text"),
        ({"harc": {"sets": ["code"], "device": "gpu"}}, "device: 'gpu' is neither cpu nor cuda"),
        ({"harc": {"sets": ["code"], "donors": [["donor1"]]}}, "donors: [['donor1']] is no list"),
        ({"harc": {"sets": ["code"], "steps": 5}}, "unknown key 'steps'"),
    ],
)
def test_a_mistake_is_refused_with_file_and_key(
    router: Any, reason: str, case: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError) as refused:
        load(case, tmp_path, router=router)
    assert str(refused.value).startswith(str(tmp_path / "recipe.yaml"))
    assert reason in str(refused.value)


def test_models_without_experts_have_no_routers(case: Path, tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense", "qwen3", 1)
    parents = [{"name": "father", "path": str(dense)}]
    with pytest.raises(BadInputError, match=r"router: father .* has no routers"):
        load(case, tmp_path, parents=parents, base=None, rules=[], router="keep")


def test_a_child_of_other_layers_is_not_calibrated(case: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="not for recipes with `layers`"):
        load(case, tmp_path, layers=[{"father": [0, 1], "donor1": [0, 1], "donor2": [0, 1]}])


def test_mergekit_has_no_spelling_of_it(case: Path) -> None:
    with pytest.raises(BadInputError, match="router"):
        respell(str(case), "mergekit")
