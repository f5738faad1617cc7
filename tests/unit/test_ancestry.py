"""The ancestry of children over generations: whose shares it holds, and that it trusts nobody."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.descent.ancestry import (
    MOST_ANCESTORS,
    Ancestor,
    Ancestry,
    Descent,
    join,
    parse_ancestry,
)
from orchestrator.descent.family_tree import add_ancestry
from orchestrator.descent.lineage import LINEAGE_FILE
from orchestrator.reporting.ancestry_view import MOST_LINES, founders, licences, tree_lines
from orchestrator.reporting.card import build_card
from orchestrator.single_merge import merge_recipe
from tests.checkpoint_files import write_checkpoint
from tests.unit.test_publish import front_matter
from tests.unit.test_publish import lineage as made_up_lineage
from workers.checkpoints import open_checkpoint

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
UP_ELEMENTS, NORM_ELEMENTS = 12, 4


def founder(folder: Path, name: str, licence: str | None) -> Path:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    tensors = {
        UP: torch.randn(3, 4, generator=generator),
        NORM: torch.randn(4, generator=generator),
    }
    write_checkpoint(folder / name, tensors)
    if licence:
        (folder / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return folder / name


def merge(
    target: Path, parents: dict[str, Path], up: list[float], norm: list[float]
) -> dict[str, Any]:
    """Merge by weights of the mlp and of the norm, in the parents' order; the child's lineage."""
    rules = [
        {
            "where": {"components": [component]},
            "method": "linear",
            "parameters": {"weight": dict(zip(parents, weights, strict=True))},
        }
        for component, weights in (("mlp", up), ("norm", norm))
    ]
    places = [{"name": name, "path": str(path)} for name, path in parents.items()]
    recipe = target.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({"parents": places, "rules": rules}))
    merge_recipe(str(recipe), str(target))
    lineage: dict[str, Any] = json.loads((target / LINEAGE_FILE).read_text())
    return lineage


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    """Grandchild of (child of wolf and dog) and wolf; of the child nothing is left but its lineage."""
    wolf, dog = founder(tmp_path, "wolf", "mit"), founder(tmp_path, "dog", "gpl-3.0")
    merge(tmp_path / "pup", {"wolf": wolf, "dog": dog}, [1.0, 3.0], [0.2, 0.8])
    grandchild = merge(
        tmp_path / "grand", {"pup": tmp_path / "pup", "isengrim": wolf}, [0.6, 0.4], [1.0, 0.0]
    )
    shutil.rmtree(tmp_path / "pup")
    shutil.rmtree(dog)
    fox = founder(tmp_path, "fox", None)
    lineage = merge(tmp_path / "last", {"fox": fox, "grand": tmp_path / "grand"}, [1, 1], [0, 2.0])
    return {"lineage": lineage, "grandchild": grandchild, "folder": tmp_path}


def test_shares_multiply_down_the_generations_and_add_up_over_ways(family: dict[str, Any]) -> None:
    ancestry = parse_ancestry(family["lineage"]["ancestry"])
    found = {f.name: f for f in founders(ancestry)}
    # pup: mlp 1/4 wolf, 3/4 dog; norm 1/5, 4/5. grand: mlp 0.6 pup, 0.4 wolf; norm all pup.
    # last: mlp half grand, half fox; norm all grand. The wolf is reached by two ways.
    mlp = {"wolf": 0.5 * (0.6 * 0.25 + 0.4), "dog": 0.5 * 0.6 * 0.75, "fox": 0.5}
    norm = {"wolf": 0.2, "dog": 0.8, "fox": 0.0}
    assert found.keys() == mlp.keys()
    for name, one in found.items():
        assert one.shares == pytest.approx({"mlp": mlp[name], "norm": norm[name]}, abs=1e-5)
        whole = (UP_ELEMENTS * mlp[name] + NORM_ELEMENTS * norm[name]) / 16
        assert one.share == pytest.approx(whole, abs=1e-5)
    assert sum(one.share for one in found.values()) == pytest.approx(1.0, abs=1e-5)


def test_the_tree_outlives_the_ancestors(family: dict[str, Any]) -> None:
    """Names, recipes and licences of all generations are in the last one's lineage alone."""
    ancestry = parse_ancestry(family["lineage"]["ancestry"])
    assert [name for name, _ in licences(ancestry)] == ["gpl-3.0", "mit", "not declared"]
    by_name = {one.name: one for one in ancestry.ancestors.values()}
    assert by_name.keys() == {"fox", "grand", "pup", "wolf", "dog"} or by_name.keys() == {
        "fox", "grand", "pup", "isengrim", "dog",
    }  # fmt: skip
    assert by_name["grand"].recipe_id == family["grandchild"]["recipe_id"]
    assert by_name["pup"].elements == {"mlp": UP_ELEMENTS, "norm": NORM_ELEMENTS}
    assert "tensors" not in json.dumps(family["lineage"]["ancestry"])


def test_the_tree_in_text(family: dict[str, Any]) -> None:
    lines = tree_lines(parse_ancestry(family["lineage"]["ancestry"]))
    assert lines == [
        "merge (this child)",
        "├──  37.5% fox",
        "└──  62.5% grand, merged",
        "    ├──  47.5% pup, merged",
        "    │   ├──  10.6% wolf",
        "    │   └──  36.9% dog",
        "    └──  15.0% isengrim",
    ]


def test_a_card_shows_all_generations_and_declares_no_licence_for_them(
    family: dict[str, Any],
) -> None:
    ancestry = family["lineage"]["ancestry"]
    card = build_card(made_up_lineage(ancestry=ancestry))
    assert "├──  37.5% fox" in card
    assert "| gpl-3.0 | dog |" in card
    assert "license" not in front_matter(card)  # though both of its own parents declare mit
    for one in ancestry["ancestors"].values():
        one["license"] = "mit"
    assert front_matter(build_card(made_up_lineage(ancestry=ancestry)))["license"] == "mit"


def test_measured_shares_stand_in_for_the_recipes(family: dict[str, Any], tmp_path: Path) -> None:
    lineage = family["lineage"]
    parents = {name: open_checkpoint(str(tmp_path / name)) for name in ("fox", "grand")}
    measured = {"mlp": {"fox": 0.9, "grand": 0.1}, "norm": {"fox": 0.0, "grand": 1.0}}
    add_ancestry(lineage, parents, None, measured)
    ancestry = parse_ancestry(lineage["ancestry"])
    assert ancestry.child.based_on == "measured"
    dog = next(f for f in founders(ancestry) if f.name == "dog")
    assert dog.shares == pytest.approx({"mlp": 0.1 * 0.45, "norm": 0.8}, abs=1e-5)


def test_what_a_lineage_has_measured_counts(family: dict[str, Any], tmp_path: Path) -> None:
    """By component; where the parents could not be told apart, the recipe's weights go on to count."""
    lineage = family["lineage"]
    lineage["attribution"] = [
        {"component": "mlp", "shares": {"fox": 0.75, "grand": 0.25}},
        {"component": "norm", "shares": None},
    ]
    parents = {name: open_checkpoint(str(tmp_path / name)) for name in ("fox", "grand")}
    add_ancestry(lineage, parents, None)
    ancestry = parse_ancestry(lineage["ancestry"])
    assert ancestry.child.based_on == "measured"
    assert [descent.shares["mlp"] for descent in ancestry.child.parents] == [0.75, 0.25]
    assert [descent.shares["norm"] for descent in ancestry.child.parents] == [0.0, 1.0]


def test_a_lineage_without_ancestry_tells_of_one_generation(tmp_path: Path) -> None:
    wolf, dog = founder(tmp_path, "wolf", "mit"), founder(tmp_path, "dog", "mit")
    lineage = merge(tmp_path / "pup", {"wolf": wolf, "dog": dog}, [1.0, 3.0], [0.2, 0.8])
    del lineage["ancestry"]
    (tmp_path / "pup" / LINEAGE_FILE).write_text(json.dumps(lineage))
    later = merge(tmp_path / "next", {"pup": tmp_path / "pup", "wolf": wolf}, [1.0, 1.0], [1, 1])
    found = {f.name: f.share for f in founders(parse_ancestry(later["ancestry"]))}
    assert found == pytest.approx({"wolf": 0.5 + (12 * 0.125 + 4 * 0.1) / 16,
                                   "dog": (12 * 0.375 + 4 * 0.4) / 16}, abs=1e-5)  # fmt: skip


@pytest.mark.parametrize("content", [
    "", "[]", "{}", "null", "[" * 100_000, '{"format": 99}', '{"format": "2"}',
    '{"format": 2, "parents": 5, "recipe_id": "x", "tensors": []}',
    '{"format": 2, "parents": [], "recipe_id": "x", "tensors": [{"component": []}]}',
    '{"format": 2, "ancestry": {"child": {"name": 5}}}',
])  # fmt: skip
def test_a_lineage_that_cannot_be_read_is_noted(tmp_path: Path, content: str) -> None:
    wolf, dog = founder(tmp_path, "wolf", "mit"), founder(tmp_path, "dog", "mit")
    (dog / LINEAGE_FILE).write_text(content)
    lineage = merge(tmp_path / "pup", {"wolf": wolf, "dog": dog}, [1.0, 1.0], [1.0, 1.0])
    ancestry = parse_ancestry(lineage["ancestry"])
    by_name = {one.name: one for one in ancestry.ancestors.values()}
    assert not by_name["dog"].parents
    assert "cannot be read" in (by_name["dog"].note or "")
    assert "cannot be read" in "\n".join(tree_lines(ancestry))


# -- made-up families ------------------------------------------------------------------------------


def random_ancestry(chance: random.Random, size: int) -> Ancestry:
    """Nodes 0..size-1, each with up to three parents of a greater number; the child is node 0."""
    ancestors: dict[str, Ancestor] = {}
    for number in range(size):
        later = range(number + 1, size)
        parents = chance.sample(later, min(len(later), chance.randrange(4))) if later else []
        if number == 0 and later and not parents:
            parents = [1]
        elements = {part: chance.randrange(1, 9) for part in chance.sample("abc", 2)}
        weights = {part: [chance.random() for _ in parents] for part in elements}
        descents = tuple(
            Descent(str(parent), f"p{parent}", "father",
                    {part: w[place] / sum(w) for part, w in weights.items()})
            for place, parent in enumerate(parents)
        )  # fmt: skip
        ancestors[str(number)] = Ancestor(
            f"n{number}", str(number), elements=elements, parents=descents
        )
    return Ancestry(ancestors.pop("0"), ancestors)


def by_all_ways(ancestry: Ancestry) -> dict[str, float]:
    """Each founder's overall share, way by way, from the rule alone."""
    total: dict[str, float] = {}
    size = sum((ancestry.child.elements or {}).values())

    def follow(node: Ancestor, component: str, share: float) -> None:
        for descent in node.parents:
            elements = node.elements or {}
            part = (
                descent.shares[component]
                if component in elements
                else sum(n * descent.shares[c] for c, n in elements.items())
                / sum(elements.values())
            )
            parent = ancestry.ancestors[descent.node]
            if parent.parents:
                follow(parent, component, share * part)
            else:
                total[descent.node] = total.get(descent.node, 0.0) + share * part

    for component, count in (ancestry.child.elements or {}).items():
        follow(ancestry.child, component, count / size)
    return total


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 10))
def test_shares_are_those_of_all_ways(seed: int, size: int) -> None:
    ancestry = random_ancestry(random.Random(seed), size)
    expected = by_all_ways(ancestry)
    shares = ancestry.shares()
    found = {key: ancestry.child.overall(shares[key]) for key in ancestry.founders()}
    assert found == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(1.0)
    assert parse_ancestry(json.loads(json.dumps(ancestry.to_dict()))).ancestors.keys() == (
        ancestry.ancestors.keys()
    )
    assert len(tree_lines(ancestry)) <= MOST_LINES + 2


def damaged(chance: random.Random, data: Any) -> Any:
    """The data with one value in it replaced or one key removed."""
    if isinstance(data, dict) and data and chance.random() < 0.8:
        key = chance.choice(list(data))
        rest = {k: v for k, v in data.items() if k != key}
        return rest if chance.random() < 0.2 else {**data, key: damaged(chance, data[key])}
    if isinstance(data, list) and data and chance.random() < 0.8:
        place = chance.randrange(len(data))
        return [damaged(chance, v) if n == place else v for n, v in enumerate(data)]
    return chance.choice([None, 5, -1e999, "x", [], {}, True, ["1"], {"1": 2}, "1", "0"])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_damaged_ancestries_are_refused_or_whole(seed: int) -> None:
    chance = random.Random(seed)
    data = damaged(chance, random_ancestry(chance, 6).to_dict())
    try:
        ancestry = parse_ancestry(data)
    except ValueError:
        return
    build = made_up_lineage(ancestry=ancestry.to_dict())
    assert "### Ancestors" in build_card(build)


def test_nobody_is_its_own_ancestor() -> None:
    one = Ancestor("a", "a", elements={"mlp": 1}, parents=(Descent("b", "b", "father", {}),))
    other = Ancestor("b", "b", elements={"mlp": 1}, parents=(Descent("a", "a", "father", {}),))
    with pytest.raises(ValueError, match="its own ancestor"):
        parse_ancestry(Ancestry(one, {"a": one, "b": other}).to_dict())


def test_a_thousand_generations(tmp_path: Path) -> None:
    """A chain that is longer than what is kept: the nearest stay, and the cut is noted."""
    told = Ancestry(Ancestor("0", "0"), {})
    for number in range(1, MOST_ANCESTORS + 50):
        descent = Descent(told.child.fingerprint or "", "p", "father", {"mlp": 1.0})
        child = Ancestor(str(number), str(number), elements={"mlp": 1}, parents=(descent,))
        told = join(child, [(descent.node, told)])
    assert len(told.ancestors) == MOST_ANCESTORS
    parsed = parse_ancestry(json.loads(json.dumps(told.to_dict())))
    (oldest,) = founders(parsed)
    assert oldest.share == pytest.approx(1.0)
    assert oldest.ancestor.note == "earlier ancestors are left out"
    assert tree_lines(parsed)[-1] == "..."
