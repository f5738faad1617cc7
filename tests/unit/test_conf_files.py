"""Everything in `conf/` can be used as it ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from orchestrator.config import SHIPPED, CampaignConfig, GenomeConfig, find_shipped, load_config
from orchestrator.genomes.build import build_space
from orchestrator.genomes.expert_file import is_expert_file
from orchestrator.genomes.ratio_file import is_ratio_file
from orchestrator.inputs import open_inputs
from orchestrator.mri.prescription import Prescription
from orchestrator.mri.probe import load_calibration_sets
from orchestrator.planning.cluster import load_cluster
from orchestrator.recipe_file import load_recipe_file
from orchestrator.search import OPTIMIZERS
from tests.expert_scans import mixture_map
from workers.checkpoints import ArchitectureMap, open_checkpoint
from workers.evaluation import load_task
from workers.merging import METHODS, MergeMethod, ParentReference
from workers.merging.plan import Plan

CHECKED = {
    "campaign": ".yaml",
    "checkpoint": ".yaml",  # tests/unit/test_description.py
    "cluster": ".yaml",
    "genome": ".yaml",
    "recipe": ".yaml",
    "task": ".yaml",
    "calibration": ".jsonl",
    "health": ".txt",  # tests/unit/test_gates.py
}
CHECKED_ELSEWHERE = ("grafana.json", "kuberay.yaml", "secrets.sh", "slurm.sh", "s3_policy.json")
"""In tests/unit/test_watching.py and tests/unit/test_deployment_files.py; the policy in
tests/end_to_end/test_campaign.py."""
FATHER = "shipped:strings/base"


def shipped(kind: str) -> list[str]:
    return sorted(p.stem for p in (SHIPPED / kind).iterdir() if p.name not in CHECKED_ELSEWHERE)


def test_every_file_is_of_a_kind_that_is_checked_here() -> None:
    files = {path.relative_to(SHIPPED) for path in SHIPPED.rglob("*") if path.is_file()}
    files = {file for file in files if file.name not in CHECKED_ELSEWHERE}
    assert files == {Path(kind) / f"{n}{CHECKED[kind]}" for kind in CHECKED for n in shipped(kind)}
    assert all(shipped(kind) for kind in CHECKED)


TO_COMPLETE = [
    name for name in shipped("campaign") if "CHOOSE" in find_shipped("campaign", name).read_text()
]
"""Campaigns with places that users fill in: tests/unit/test_planning.py."""


@pytest.mark.parametrize("name", TO_COMPLETE)
def test_a_campaign_to_complete_names_tasks_that_ship(name: str) -> None:
    """Their data are elsewhere: tests/unit/test_shipped_tasks.py."""
    named = [
        task["name"] for task in yaml.safe_load(find_shipped("campaign", name).read_text())["tasks"]
    ]
    assert named and set(named) <= set(shipped("task"))


@pytest.mark.parametrize("name", sorted({*shipped("campaign")} - {*TO_COMPLETE}))
def test_a_campaign_names_what_there_is(name: str) -> None:
    config = load_config(name)
    assert isinstance(config, CampaignConfig)
    assert config.search.optimizer in OPTIMIZERS
    inputs = open_inputs(config)
    space = build_space(
        config.genome, inputs.father_map, inputs.references, inputs.base_reference, config.seed
    )
    assert space.genes
    for given, task in zip(config.tasks, inputs.tasks, strict=True):
        assert len(task.items["search"]) == given.search_items or given.search_items is None
        assert len(task.items["holdout"]) == given.holdout_items or given.holdout_items is None


def has_something_to_search(method: MergeMethod) -> bool:
    """Numbers that it must be given, and that it uses cheaply enough for a candidate."""
    numbers = [p for p in method.parameters if p.scope in ("shared", "per_parent")]
    needed = any(parameter.default is None for parameter in numbers)
    return needed and method.grain != "matrix"


RATIO_SPACES = [name for name in shipped("genome") if is_ratio_file(GenomeConfig(name))]


def takes_shares(method: MergeMethod) -> bool:
    return method.name == "slerp" or method.parameter("weight") is not None


EXPERT_SPACES = [name for name in shipped("genome") if is_expert_file(GenomeConfig(name))]


@pytest.mark.parametrize("name", sorted({*shipped("genome")} - {*RATIO_SPACES, *EXPERT_SPACES}))
def test_a_genome_space_is_for_methods_that_there_are(name: str) -> None:
    father = ArchitectureMap(open_checkpoint(FATHER))
    parents = tuple(ParentReference(letter, letter * 64) for letter in "ab")
    base = ParentReference("base", "0" * 64)
    searched = yaml.safe_load(find_shipped("genome", name).read_text())["genes"]
    assert searched.keys() <= METHODS.keys()
    for method in searched:
        space = build_space(GenomeConfig(name, method), father, parents, base, 0)
        assert space.decode(space.point(space.start)).rules


@pytest.mark.parametrize("name", RATIO_SPACES)
@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if takes_shares(m)])
def test_a_ratio_space_is_for_every_method_that_takes_shares(name: str, method: str) -> None:
    father = ArchitectureMap(open_checkpoint(FATHER))
    parents = tuple(ParentReference(letter, letter * 64) for letter in "ab")
    base = ParentReference("base", "0" * 64)
    half = Prescription(
        {tensor.name: {"a": 0.5, "b": 0.5} for tensor in father.tensors}, 0.1, is_telling=True
    )
    starts = yaml.safe_load(find_shipped("genome", name).read_text()).get("starts", {})
    for start in [None, *starts]:
        config = GenomeConfig(name, method, start=start)
        space = build_space(config, father, parents, base, 0, True, half)
        plan = Plan({"a": father, "b": father}, father)
        assigned = plan.assign(space.decode(space.point(space.start)))
        assert {way.method.name for way in assigned.values()} - {"passthrough"} == {method}


@pytest.mark.parametrize("name", EXPERT_SPACES)
@pytest.mark.parametrize(
    "method", [name for name, m in METHODS.items() if takes_shares(m) and m.grain != "matrix"]
)
def test_an_expert_space_is_for_every_method_that_takes_shares(name: str, method: str) -> None:
    father = mixture_map((0, 1, 2), 4)
    parents = tuple(ParentReference(letter, letter * 64) for letter in "ab")
    base = ParentReference("base", "0" * 64)
    advice = {layer: {"b": (0.2, 0.4, 0.6, 0.8)} for layer in range(3)}
    advised = Prescription({}, 0.2, is_telling=True, experts=advice)
    space = build_space(GenomeConfig(name, method), father, parents, base, 0, True, advised, True)
    plan = Plan({"a": father, "b": father}, father)
    assigned = plan.assign(space.decode(space.point(space.start)))
    assert {way.method.name for way in assigned.values()} == {method, "as_experts", "passthrough"}


@pytest.mark.parametrize("name", shipped("recipe"))
def test_a_recipe_merges_any_parents(name: str) -> None:
    data = yaml.safe_load(find_shipped("recipe", name).read_text())
    places = {
        p["name"]: f"shipped:strings/{s}"
        for p, s in zip(data["parents"], ("sort", "shift"), strict=True)
    }
    loaded = load_recipe_file(name, places)
    plan = Plan({n: ArchitectureMap.of(parent) for n, parent in loaded.parents.items()}, None)
    assert {way.method.name for way in plan.assign(loaded.recipe).values()} - {"passthrough"}


@pytest.mark.parametrize("name", shipped("cluster"))
def test_a_cluster_is_complete(name: str) -> None:
    assert load_cluster(name, {"nodes": 3}).nodes == 3


@pytest.mark.parametrize("name", shipped("task"))
def test_a_task_has_its_items(name: str) -> None:
    definition = find_shipped("task", name).read_text()
    if "  dataset:" in definition:
        pytest.skip("its data are the user's to fetch; see test_shipped_tasks")
    if "  reasoning_gym:" in definition:
        pytest.importorskip("reasoning_gym")
    task = load_task(name, definition)
    assert task.name == name
    assert all(task.items.values())


@pytest.mark.parametrize("name", shipped("calibration"))
def test_a_calibration_set_has_pairs_that_are_told_apart(name: str) -> None:
    (calibration,) = load_calibration_sets([name])
    assert calibration.name == name
    assert all(pair.id.startswith(name.replace("_", "-")) for pair in calibration.pairs)
    assert all(pair.conditioned != pair.generic for pair in calibration.pairs)
