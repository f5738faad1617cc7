"""Pareto fronts: hypervolumes against other ways to count them, ranks, and whole campaigns that seek one."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ledger.ledger import Ledger
from orchestrator.objectives import task_weights
from orchestrator.overview import campaign_overview
from orchestrator.pareto import (
    Scores,
    dominates,
    exclusive_hypervolume,
    front_of,
    fronts,
    hypervolume,
    rank_fitness,
    ranked,
)
from tests.scripted_campaign import run_search, scripted
from workers.errors import BadInputError
from workers.evaluation.task import Item
from workers.merging import Recipe


def drawn(draw: random.Random, count: int, objectives: int, steps: int = 8) -> list[Scores]:
    """Scores as tasks have them: shares of few items, with equals among them."""
    return [
        tuple(draw.randrange(steps + 1) / steps for _ in range(objectives)) for _ in range(count)
    ]


def by_inclusion_and_exclusion(points: list[Scores]) -> float:
    """The volume of a union of boxes: sums over all sets of them, added and subtracted in turn."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            corner = [min(values) for values in zip(*chosen, strict=True)]
            total -= (-1) ** size * math.prod(corner)
    return total


def by_cells(points: list[Scores], steps: int) -> float:
    """The share of the unit cube's cells that some point covers."""
    cells = itertools.product(range(steps), repeat=len(points[0]))
    covered = sum(
        any(all(cell < value * steps for cell, value in zip(at, p, strict=True)) for p in points)
        for at in cells
    )
    return covered / steps ** len(points[0])


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5])
def test_the_hypervolume_is_that_of_the_union_of_boxes(objectives: int) -> None:
    draw = random.Random(objectives)
    for count in (1, 2, 5, 9):
        points = drawn(draw, count, objectives)
        assert hypervolume(points) == pytest.approx(by_inclusion_and_exclusion(points), abs=1e-9)
    many = drawn(draw, 40, objectives, steps=5)
    assert hypervolume(many) == pytest.approx(by_cells(many, 5), abs=1e-9)


def test_a_published_example_of_a_hypervolume() -> None:
    """Three points by hand: 3 x 1 + 2 x 1 + 1 x 1 boxes of a staircase."""
    assert hypervolume([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]) == 6.0
    assert hypervolume([]) == 0.0
    assert hypervolume([(0.0, 1.0)]) == 0.0


def test_what_a_point_contributes_is_what_is_lost_without_it() -> None:
    draw = random.Random(4)
    points = drawn(draw, 12, 3)
    for point in points:
        others = [other for other in points if other != point]
        lost = by_cells(points, 8) - by_cells(others, 8)
        assert exclusive_hypervolume(point, others) == pytest.approx(lost, abs=1e-9)


def test_fronts_are_peeled_one_after_the_other() -> None:
    draw = random.Random(5)
    points = drawn(draw, 60, 3)
    left, found = set(points), fronts(points)
    assert front_of(points) == sorted(found[0], reverse=True)
    for front in found:
        assert set(front) == {p for p in left if not any(dominates(o, p) for o in left)}
        assert front == sorted(front, key=points.index)
        left -= set(front)
    assert not left


def test_ranks_are_those_of_removing_the_least_contributor_first() -> None:
    """SMS-EMOA's selection, done the plain way: all contributions anew after each removal."""
    draw = random.Random(6)
    for objectives in (2, 3):
        points = list(dict.fromkeys(drawn(draw, 25, objectives)))
        order = ranked(points)
        assert sorted(order) == sorted(points)
        left = list(points)
        for removed in reversed(order):
            last = fronts(left)[-1]
            assert removed in last
            parts = {p: by_cells(last, 8) - by_cells([q for q in last if q != p], 8) if len(last) > 1
                     else 0.0 for p in last}  # fmt: skip
            assert parts[removed] == pytest.approx(min(parts.values()), abs=1e-9)
            left.remove(removed)


def test_a_rank_says_how_many_come_after_it() -> None:
    earlier = [(0.5, 0.5), (0.1, 0.9), (0.2, 0.2)]
    told = [(0.6, 0.6), (0.1, 0.1), (0.6, 0.6), (0.1, 0.9)]
    best, worst, again, on_front = rank_fitness(told, earlier)
    assert best == again == pytest.approx(1 - 1 / 5)
    assert worst == 0.0
    assert on_front == pytest.approx(1 - 2 / 5)
    assert rank_fitness([], earlier) == []


# -- campaigns -------------------------------------------------------------------------------

TASKS = [{"name": skill, "search_items": 8, "holdout_items": 8} for skill in ("reverse", "sort")]
GIVEN: dict[str, Any] = {
    "genome": {"space": "components", "method": "linear"},
    "tasks": TASKS,
    "objective": "pareto",
    "search": {"optimizer": "cma_es", "evaluations": 12, "population": 4},
}


def traded(recipe: Recipe, item: Item) -> bool:
    """The more of one task, the less of the other; how much of both depends on the recipe."""
    bits = int(recipe.id[:8], 16)
    share, quality = bits % 9, 4 + bits // 9 % 5
    number = int(item.id.split("-")[-1])
    return number * 8 <= (share if item.id.startswith("sort") else 8 - share) * quality


@pytest.mark.parametrize("optimizer", ["cma_es", "archive"])
def test_a_front_is_found_recorded_and_shown(tmp_path: Path, optimizer: str) -> None:
    campaign = scripted(
        tmp_path, traded, **GIVEN | {"search": GIVEN["search"] | {"optimizer": optimizer}}
    )
    result = campaign.run()
    ledger = Ledger(campaign.store)
    asked = [c["recipe"] for r in ledger.of_kind("asked") for c in r["candidates"]]
    scores: dict[str, Scores] = {}
    for record in ledger.of_kind("scored"):
        if record["recipe"] in asked and record["split"] == "search":
            scores[record["recipe"]] = tuple(
                sum(item["score"] for item in record["items"][task]) / 8
                for task in ("reverse", "sort")
            )
    best = {r for r in scores if not any(dominates(other, scores[r]) for other in scores.values())}
    front = ledger.last("front")
    assert front is not None
    assert len(front["members"]) > 1
    assert {m["recipe"] for m in front["members"]} <= best
    assert {scores[m["recipe"]] for m in front["members"]} == {scores[r] for r in best}
    assert front["hypervolume"] == pytest.approx(by_cells(list(scores.values()), 8))
    # The child is the member with the best mean, and it is judged by its mean.
    means = {recipe: sum(scores[recipe]) / 2 for recipe in best}
    assert means[result["recipe_id"]] == max(means.values())
    lineage = json.loads((Path(result["child"]) / "lineage.json").read_text())
    assert lineage["search"]["front"]["members"] == front["members"]
    card = (Path(result["child"]) / "README.md").read_text()
    report = (Path(campaign.store.uri) / "report.html").read_text()
    for text in (card, report):
        assert "The Pareto front" in text
        assert f"{len(front['members'])} of those scored are" in text
        assert f"hypervolume of {front['hypervolume']:.4f}" in text
        assert "mean of tasks" in text
    for member in front["members"]:
        assert f"`{member['recipe'][:12]}`" in card
    shown = campaign_overview(campaign.store.uri)
    assert shown["front"]["hypervolume"] == front["hypervolume"]
    assert len(shown["front"]["members"]) == len(front["members"])
    assert shown["steady"] == (optimizer == "archive")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"tasks": TASKS[:1]}, "objective"),
        ({"breeding": {"rounds": 2}}, r"breeding\.rounds"),
        ({"tasks": [TASKS[0] | {"weight": 2.0}, TASKS[1]]}, r"tasks\.0\.weight"),
        ({"objective": "mean", "tasks": [TASKS[0], TASKS[1] | {"weight": 2}]}, r"tasks\.1\.weight"),
        ({"objective": "weighted", "tasks": [TASKS[0] | {"weight": 0}]}, r"tasks\.0\.weight"),
        ({"objective": "median"}, "objective: 'median' is none of mean, worst, weighted, pareto"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(BadInputError, match=key):
        scripted(tmp_path, traded, **GIVEN | changes)


def test_weights_decide_which_child_wins(tmp_path: Path) -> None:
    """Of the same candidates, by random search, another one for each weight."""
    winners = {}
    for weight in (0.25, 4.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        tasks = [TASKS[0] | {"weight": weight}, TASKS[1]]
        search = {"optimizer": "random", "evaluations": 12, "population": 4}
        campaign = scripted(
            folder, traded, **GIVEN | {"objective": "weighted", "tasks": tasks, "search": search}
        )
        assert task_weights(campaign.config) == pytest.approx(
            {"reverse": weight / (1 + weight), "sort": 1 / (1 + weight)}
        )
        if weight < 1:
            run_search(campaign)
        else:
            result = campaign.run()
        best = campaign.state.best(12)
        assert best is not None
        recipe_id, fitness = best[0].recipe_id, best[1]
        scores = campaign.state.evaluation(recipe_id, "search").scores()
        assert fitness == pytest.approx(
            (weight * scores["reverse"] + scores["sort"]) / (1 + weight)
        )
        every = [c.recipe_id for generation in campaign.state.generations for c in generation]
        assert fitness == max(campaign.state.fitness(recipe) or 0.0 for recipe in every)
        winners[weight] = scores
    assert winners[4.0]["reverse"] > winners[0.25]["reverse"]
    # The judgement and the card say the same.
    assert result["recipe_id"] == recipe_id
    held_out = result["holdout"]["child"]
    assert result["holdout_fitness"]["child"] == pytest.approx(
        0.8 * held_out["reverse"]["score"] + 0.2 * held_out["sort"]["score"]
    )
    card = (Path(result["child"]) / "README.md").read_text()
    assert "weighted mean of the tasks (reverse 0.8, sort 0.2)" in card
    # Other weights are another campaign.
    tasks = [TASKS[0] | {"weight": 3.0}, TASKS[1]]
    other = scripted(
        folder, traded, **GIVEN | {"objective": "weighted", "tasks": tasks, "search": search}
    )
    with pytest.raises(BadInputError, match=r"these keys differ: .*tasks\.0\.weight"):
        other.run()
