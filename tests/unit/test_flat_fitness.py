"""Flat fitness: how many items would have been needed, and the search that is stopped for it."""

from __future__ import annotations

import json
import random
from math import comb
from pathlib import Path

import pytest

from orchestrator.flat_fitness import LEAST_CANDIDATES, LEAST_GENERATIONS
from orchestrator.ledger.ledger import Ledger
from orchestrator.statistics import compare, items_needed, smallest_difference
from tests.scripted_campaign import scripted
from workers.evaluation.task import Item
from workers.merging import Recipe

GENOME = {"space": "darwin14", "method": "linear"}
NO_SCAN = {"static": False}
SEARCH = {"optimizer": "cma_es", "evaluations": 40, "population": 5}


def power(items: int, difference: float) -> float:
    """Probability that McNemar's exact test is significant, summed up outcome by outcome."""
    total = 0.0
    for differing in range(items + 1):
        if 2 * 0.5**differing <= 0.05:
            total += (
                comb(items, differing)
                * difference**differing
                * (1 - difference) ** (items - differing)
            )
    return total


@pytest.mark.parametrize("items", [6, 7, 12, 50, 72, 198])
def test_the_smallest_difference_has_a_power_of_80_percent(items: int) -> None:
    found = smallest_difference(items)
    assert found is not None
    assert power(items, found) == pytest.approx(0.8, abs=1e-9)


def test_with_fewer_than_six_items_nothing_can_be_significant() -> None:
    assert smallest_difference(5) is None
    assert power(5, 1.0) == 0.0


@pytest.mark.parametrize("difference", [0.01, 0.02, 0.05, 0.3, 0.999])
def test_the_items_needed_are_the_fewest(difference: float) -> None:
    found = items_needed(difference)
    assert power(found, difference) >= 0.8
    assert found == 6 or power(found - 1, difference) < 0.8


def test_the_power_is_that_of_the_campaigns_own_test() -> None:
    """Pairs of models drawn at random, compared as a child is with its parent."""
    items = 60
    difference = smallest_difference(items)
    assert difference is not None
    chance = random.Random(3)

    def answer(score: float) -> dict:
        return {"score": score, "unparsed": False, "truncated": False}

    significant = 0
    for _ in range(400):
        better = [chance.random() < difference for _ in range(items)]
        child = {str(n): answer(1.0) for n in range(items)}
        parent = {str(n): answer(float(not b)) for n, b in enumerate(better)}
        significant += compare(child, parent, "p", "t").p_value < 0.05
    assert 0.74 <= significant / 400 <= 0.86


def test_a_flat_search_is_stopped_and_says_what_it_would_have_needed(tmp_path: Path) -> None:
    """All candidates answer the same items: the published 10 generations of 5 that all scored alike."""
    campaign = scripted(
        tmp_path, lambda recipe, item: int(item.id.split("-")[-1]) % 3 == 0,
        genome=GENOME, scan=NO_SCAN, search=SEARCH,
    )  # fmt: skip
    result = campaign.run()
    assert result["evaluations"] == 15 == LEAST_GENERATIONS * 5 >= LEAST_CANDIDATES
    searched = Ledger(campaign.store).last("searched")
    assert searched is not None
    assert searched["flat"]["items"] == 72
    assert searched["flat"]["smallest_difference"] == pytest.approx(0.107, abs=0.001)
    assert searched["flat"]["items_needed"] == {"0.02": items_needed(0.02)}
    for text in (
        searched["reason"],
        result["search_ended"],
        (campaign.store.read("report.html")).decode(),
        campaign.store.read(f"child-{result['recipe_id'][:12]}/README.md").decode(),
    ):
        assert "15 candidates of 3 generations" in text
        assert f"one of 0.02 needs {items_needed(0.02)} items" in text
    assert any("fitness is flat" in name for name in campaign.watcher.names)  # type: ignore[attr-defined]
    lineage = json.loads(campaign.store.read(f"child-{result['recipe_id'][:12]}/lineage.json"))
    assert lineage["search"]["flat"] == searched["flat"]


def test_the_worst_of_the_tasks_rests_on_the_items_of_one(tmp_path: Path) -> None:
    campaign = scripted(
        tmp_path, lambda recipe, item: False,
        genome=GENOME, scan=NO_SCAN, search=SEARCH, objective="worst",
    )  # fmt: skip
    campaign.run()
    assert campaign.search.flat is not None
    assert campaign.search.flat.items == 24


def test_a_single_candidate_that_differs_keeps_the_search_going(tmp_path: Path) -> None:
    seen: list[str] = []

    def answers(recipe: Recipe, item: Item) -> bool:
        if recipe.id not in seen:
            seen.append(recipe.id)
        return seen.index(recipe.id) == 11 and item.id == "sort-search-0001"

    campaign = scripted(tmp_path, answers, genome=GENOME, scan=NO_SCAN, search=SEARCH)
    assert campaign.run()["evaluations"] == 40
    searched = Ledger(campaign.store).last("searched")
    assert searched is not None
    assert "flat" not in searched
    assert searched["reason"] == "the budget is spent"


def test_too_few_candidates_are_not_called_flat(tmp_path: Path) -> None:
    campaign = scripted(
        tmp_path, lambda recipe, item: True,
        genome=GENOME, scan=NO_SCAN, search=SEARCH | {"evaluations": 10},
    )  # fmt: skip
    assert campaign.run()["search_ended"] == "the budget is spent"
    assert campaign.search.flat is None


def test_a_replay_does_not_stop_before_a_generation_that_was_only_asked_for(tmp_path: Path) -> None:
    """The driver is stopped before the first generation that is not flat is scored."""
    seen: list[str] = []
    is_stopped = True

    def answers(recipe: Recipe, item: Item) -> bool:
        if recipe.id not in seen:
            seen.append(recipe.id)
        number = seen.index(recipe.id) - 2  # the parents come first
        if number == 12 and is_stopped:
            raise KeyboardInterrupt
        return number >= 12

    search = SEARCH | {"population": 6, "evaluations": 18}
    given = {"genome": GENOME, "scan": NO_SCAN, "search": search}
    with pytest.raises(KeyboardInterrupt):
        scripted(tmp_path, answers, **given).run()
    is_stopped = False
    resumed = scripted(tmp_path, answers, **given)
    assert resumed.run()["search_ended"] == "the budget is spent"
    assert resumed.search.flat is None
