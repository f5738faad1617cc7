"""Children whose routers were merged as their experts are bred from without being written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.composition import Composer
from tests.checkpoint_files import open_merger, read_tensors, realize, recipe_for, rule, write_child
from tests.expert_parents import inverse, random_experts, reordered, write_experts
from workers.errors import BadInputError
from workers.merging import ParentReference, Recipe, Rule, Selector
from workers.merging.executor import Merger

PLANTED = {0: (3, 0, 5, 1, 4, 2), 1: (1, 2, 0, 3, 5, 4)}
WANTED = {layer: inverse(order) for layer, order in PLANTED.items()}
ROUTERS = rule("as_experts", Selector(components=("router",)))


def of_experts(first: int, last: int, method: str, **given: object) -> Rule:
    return rule(method, Selector(components=("expert",), experts=(first, last)), **given)


CHILDREN = {
    "one": (
        of_experts(0, 1, "passthrough", source="b"),
        of_experts(2, 4, "linear", weight={"a": 0.3, "b": 0.7}),
        ROUTERS,
    ),
    "two": (
        of_experts(1, 3, "linear", weight={"a": 0.8, "b": 0.2}),
        of_experts(5, 5, "passthrough", source="b"),
        ROUTERS,
    ),
}
OVER = (
    of_experts(0, 0, "passthrough", source="two"),
    of_experts(1, 5, "linear", weight={"one": 0.25, "two": 0.75}),
    ROUTERS,
)


@pytest.fixture
def merger(tmp_path: Path) -> Merger:
    """A father and a donor in fp32, the donor with its experts in another order."""
    father = random_experts(1, dtype=torch.float32)
    donor = reordered(random_experts(2, father, 0.5, torch.float32), PLANTED)
    return open_merger(
        {
            "a": write_experts(tmp_path / "a", father),
            "b": write_experts(tmp_path / "b", donor),
        }
    )


def recipes(merger: Merger) -> dict[str, Recipe]:
    return {
        name: replace(recipe_for(merger, *rules), experts={"b": WANTED})
        for name, rules in CHILDREN.items()
    }


def over(children: dict[str, Recipe], *rules: Rule) -> Recipe:
    return Recipe(tuple(ParentReference(name, one.id) for name, one in children.items()), rules)


def test_the_composed_child_is_that_of_the_written_children(merger: Merger, tmp_path: Path) -> None:
    children = recipes(merger)
    written = open_merger(
        {name: write_child(merger, one, tmp_path / name) for name, one in children.items()}
    )
    expected = realize(written, recipe_for(written, *OVER))
    composed = Composer(children, merger.plan).compose(over(children, *OVER))
    assert composed.experts == {"b": WANTED}
    assert Recipe.from_dict(composed.to_dict()).id == composed.id
    found = realize(merger, composed)
    fathers = read_tensors(tmp_path / "a")
    for name, values in expected.items():
        assert torch.allclose(found[name], values, atol=1e-6), name
    gate = "layers.0.mlp.gate.weight"
    assert not torch.allclose(found[gate], fathers[f"model.{gate}"].view(-1), atol=1e-2)


def test_what_came_by_way_of_each_child(merger: Merger) -> None:
    """Of six rows: one all by `two`, four by weights, one by weights of two copies of the father."""
    children = recipes(merger)
    shares = Composer(children, merger.plan).shares(over(children, *OVER))
    expected = {"one": 5 * 0.25 / 6, "two": (1 + 5 * 0.75) / 6}
    assert shares["router"] == pytest.approx(expected)
    assert shares["expert"] == pytest.approx(expected)


def test_what_does_not_compose(merger: Merger) -> None:
    children = recipes(merger)
    composer = Composer(children, merger.plan)
    with pytest.raises(BadInputError, match=r"mlp.gate.*': is merged as its experts are in some"):
        composer.compose(over(children, rule("linear", weight=0.5)))
    unordered = children | {"two": replace(children["two"], experts={})}
    with pytest.raises(BadInputError, match="two: pairs other experts than the other children"):
        Composer(unordered, merger.plan)
    with pytest.raises(BadInputError, match="the order of experts does not compose"):
        composer.compose(replace(over(children, *OVER), experts={"two": WANTED}))
