"""Everything in `conf/` can be used as it ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from orchestrator.config import SHIPPED, CampaignConfig, GenomeConfig, find_shipped, load_config
from orchestrator.genome import build_space
from orchestrator.inputs import open_inputs
from orchestrator.search import OPTIMIZERS
from workers.checkpoints import ArchitectureMap, open_checkpoint
from workers.evaluation import load_task
from workers.merging import METHODS, MergeMethod, ParentReference

CHECKED = ("campaign", "genome", "task")
FATHER = "shipped:strings/base"


def shipped(kind: str) -> list[str]:
    return sorted(path.stem for path in (SHIPPED / kind).iterdir())


def test_every_file_is_of_a_kind_that_is_checked_here() -> None:
    files = {path.relative_to(SHIPPED) for path in SHIPPED.rglob("*") if path.is_file()}
    assert files == {Path(kind) / f"{name}.yaml" for kind in CHECKED for name in shipped(kind)}
    assert all(shipped(kind) for kind in CHECKED)


@pytest.mark.parametrize("name", shipped("campaign"))
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


@pytest.mark.parametrize("name", shipped("genome"))
def test_a_genome_space_is_for_methods_that_there_are(name: str) -> None:
    father = ArchitectureMap(open_checkpoint(FATHER))
    parents = tuple(ParentReference(letter, letter * 64) for letter in "ab")
    base = ParentReference("base", "0" * 64)
    searched = yaml.safe_load(find_shipped("genome", name).read_text())["genes"]
    assert searched.keys() <= METHODS.keys()
    for method in searched:
        space = build_space(GenomeConfig(name, method), father, parents, base, 0)
        assert space.decode(space.point(space.start)).rules


@pytest.mark.parametrize("name", shipped("task"))
def test_a_task_has_its_items(name: str) -> None:
    task = load_task(name, find_shipped("task", name).read_text())
    assert task.name == name
    assert all(task.items.values())
