"""The winner's curse: what the estimate expects is what choosing by luck does lose."""

from __future__ import annotations

import random
from statistics import mean
from typing import Any

import pytest

from orchestrator.statistics import objective
from orchestrator.winners_curse import expected_shrinkage
from tests.unit.test_statistics import results


def draw(
    chance: random.Random, shares: list[float], items: int, tasks: int
) -> list[dict[str, Any]]:
    """One candidate for each share: it answers each item right with that probability."""
    return [
        {f"t{task}": results([float(chance.random() < share) for _ in range(items)]) for task in range(tasks)}
        for share in shares
    ]  # fmt: skip


def fitness(candidate: dict[str, Any], kind: str) -> float:
    return objective(
        (mean(r["score"] for r in items.values()) for items in candidate.values()), kind
    )


@pytest.mark.parametrize(("kind", "tasks"), [("mean", 1), ("worst", 2)])
def test_of_equal_candidates_all_that_the_best_has_more_is_luck(kind: str, tasks: int) -> None:
    """Compared with what is really lost: the truth is known, and the same for all."""
    chance, expected, lost = random.Random(3), [], []
    for _ in range(12):
        candidates = draw(chance, [0.5] * 40, 100, tasks)
        expected.append(expected_shrinkage(candidates, kind, {}))
        chosen = max(candidates, key=lambda candidate: fitness(candidate, kind))
        again = [fitness(draw(chance, [0.5], 100, tasks)[0], kind) for _ in range(20)]
        lost.append(fitness(chosen, kind) - mean(again))
    assert mean(lost) > 0.06
    assert mean(expected) == pytest.approx(mean(lost), rel=0.25)


def test_where_one_candidate_is_far_better_little_is_luck() -> None:
    chance = random.Random(4)
    found = expected_shrinkage(draw(chance, [0.9] + [0.3] * 20, 100, 1), "mean", {})
    assert 0.0 <= found < 0.01


def test_of_candidates_that_answer_alike_nothing_is_luck() -> None:
    (candidate,) = draw(random.Random(5), [0.5], 50, 1)
    assert expected_shrinkage([candidate] * 30, "mean", {}) < 0.02


@pytest.mark.parametrize("items", [2, 3, 4, 8])
def test_of_candidates_that_are_always_right_nothing_is_luck(items: int) -> None:
    """Many draws of so few items leave none out; these say nothing of items that did not choose."""
    candidates = draw(random.Random(6), [1.0] * 3, items, 2)
    assert expected_shrinkage(candidates, "mean", {}) == 0


def test_with_a_single_item_it_is_unknown() -> None:
    assert expected_shrinkage(draw(random.Random(7), [1.0] * 3, 1, 1), "mean", {}) is None
