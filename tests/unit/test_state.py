"""What a ledger says: fitness, budget and the best candidate, read from made-up records."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import pytest

from orchestrator.ledger.ledger import Record
from orchestrator.ledger.state import CampaignState, scored_record


def asked(*recipes: str) -> Record:
    candidates = [{"genome": {"weight": float(n)}, "recipe": r} for n, r in enumerate(recipes)]
    return {"kind": "asked", "epoch": 1, "candidates": candidates}


def items(scores: dict[str, str], first: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Task -> results, from a text of 1 and 0 per task; ids count from `first`."""
    return {
        task: [
            {"id": f"{first + n}", "score": float(digit), "unparsed": False, "truncated": False}
            for n, digit in enumerate(digits)
        ]
        for task, digits in scores.items()
    }


def scored(
    recipe: str, complete: bool = True, split: str = "search", first: int = 0, **scores: str
) -> Record:
    return {
        "kind": "scored", "epoch": 1, "recipe": recipe, "split": split, "worker": 0,
        "items": items(scores, first), "complete": complete,
        "realize_seconds": 0.5, "score_seconds": 1.0,
    }  # fmt: skip


def failed(recipe: str, given_up: bool, split: str = "search") -> Record:
    return {
        "kind": "failed", "epoch": 1, "recipe": recipe, "split": split, "worker": 0,
        "error": f"{recipe} broke", "given_up": given_up,
    }  # fmt: skip


def state(*records: Record, objective: str = "mean") -> CampaignState:
    return CampaignState(objective, records)


def recipes(generations: list[Any]) -> list[list[str]]:
    return [[candidate.recipe_id for candidate in generation] for generation in generations]


# -- fitness ---------------------------------------------------------------------------------


def test_fitness_is_the_mean_or_the_worst_of_the_tasks() -> None:
    record = scored("r", one="1110", two="10")
    assert state(record).fitness("r") == 0.625
    assert state(record, objective="worst").fitness("r") == 0.5


def test_an_unknown_unfinished_or_failed_recipe_has_no_fitness() -> None:
    found = state(
        scored("begun", complete=False, one="11"),
        scored("begun then lost", complete=False, one="11"),
        failed("begun then lost", given_up=True),
        failed("tried again", given_up=False),
        scored("held out", split="holdout", one="11"),
    )
    for recipe in ("nobody", "begun", "begun then lost", "tried again", "held out"):
        assert found.fitness(recipe) is None, recipe
    assert found.failures == 2
    assert found.evaluation("begun then lost", "search").failed == "begun then lost broke"
    assert found.evaluation("tried again", "search").failed is None


def test_partial_records_add_up_to_one_evaluation() -> None:
    whole = state(scored("r", one="1101", two="001"))
    parts = state(
        scored("r", complete=False, one="11"),
        scored("r", complete=False, first=2, one="01"),
        scored("r", complete=False, two="0"),
        failed("r", given_up=False),
        scored("r", first=1, two="01"),
    )
    assert parts.fitness("r") == whole.fitness("r")
    assert parts.evaluation("r", "search").results == whole.evaluation("r", "search").results
    assert parts.evaluation("r", "search").seconds == 4 * 1.5
    assert parts.evaluation("r", "search").finished_items == {
        "one": ["0", "1", "2", "3"], "two": ["0", "1", "2"],
    }  # fmt: skip


def test_an_item_that_is_recorded_twice_counts_once() -> None:
    found = state(scored("r", complete=False, one="10"), scored("r", one="100"))
    assert found.fitness("r") == pytest.approx(1 / 3)


def test_an_item_twice_in_a_candidates_only_record_counts_once() -> None:
    twice = scored("r", one="10")
    twice["items"]["one"] += items({"one": "1"})["one"]
    found = state(asked("r"), twice)
    assert found.fitness("r") == 0.5
    assert found.items == 2
    assert found.evaluation("r", "search").repeated


def test_scores_that_were_asked_for_too_soon_are_forgotten() -> None:
    found = state(asked("r"))
    assert found.evaluation("r", "search").scores() == {}
    found.apply(scored("r", one="10"))
    assert found.fitness("r") == 0.5


def test_the_order_in_which_parts_came_does_not_reach_the_fitness() -> None:
    """Killed or not, the same answers are the same fitness to the last bit."""
    scores = {"one": "1000000000", "two": "1100000000", "three": "1110000000"}
    fitness = set()
    for seed in range(6):
        order = list(scores)
        random.Random(seed).shuffle(order)
        records = [
            scored("r", complete=n == 2, **{task: scores[task]}) for n, task in enumerate(order)
        ]
        fitness.add(state(*records).fitness("r"))
    assert len(fitness) == 1


def test_splits_do_not_mix() -> None:
    found = state(scored("r", one="1"), scored("r", split="holdout", one="0000"))
    assert found.fitness("r") == 1.0
    assert found.evaluation("r", "holdout").scores() == {"one": 0.0}


# -- budget ----------------------------------------------------------------------------------


def test_the_budget_is_exact_also_within_a_generation() -> None:
    found = state(asked("a", "b", "c"), asked("d", "e", "f"))
    assert recipes(found.within_budget(2)) == [["a", "b"]]
    assert recipes(found.within_budget(3)) == [["a", "b", "c"], []]
    assert recipes(found.within_budget(4)) == [["a", "b", "c"], ["d"]]
    assert recipes(found.within_budget(6)) == [["a", "b", "c"], ["d", "e", "f"]]
    assert recipes(found.within_budget(100)) == [["a", "b", "c"], ["d", "e", "f"]]


def test_a_recipe_that_was_asked_for_before_is_free() -> None:
    found = state(asked("a", "a", "b"), asked("b", "c", "a"), asked("d"))
    assert recipes(found.within_budget(2)) == [["a", "a", "b"], ["b"]]
    assert recipes(found.within_budget(3)) == [["a", "a", "b"], ["b", "c", "a"], []]
    assert recipes(found.within_budget(4)) == [["a", "a", "b"], ["b", "c", "a"], ["d"]]


def test_no_budget_ever_pays_for_more_or_less_than_it_says() -> None:
    generator = random.Random(0)
    for _ in range(50):
        generations = [generator.choices("abcdefgh", k=4) for _ in range(4)]
        found = state(*(asked(*generation) for generation in generations))
        different = {recipe for generation in generations for recipe in generation}
        for budget in range(1, 10):
            paid = [recipe for part in recipes(found.within_budget(budget)) for recipe in part]
            assert len(set(paid)) == min(budget, len(different))
            flat = [recipe for generation in generations for recipe in generation]
            assert paid == flat[: len(paid)], "a prefix, in the order in which they were asked"


def test_what_is_done_counts_failures_but_not_parents_or_what_is_over_the_budget() -> None:
    found = state(
        scored("parent", one="1"),
        asked("a", "b", "a", "c", "d"),
        scored("a", one="1"),
        failed("b", given_up=True),
        scored("c", complete=False, one="1"),
        scored("d", one="1"),
    )
    assert [found.evaluated(budget) for budget in (1, 2, 3, 4, 9)] == [1, 2, 2, 3, 3]
    assert [found.given_up(budget) for budget in (1, 2, 9)] == [0, 1, 1]
    assert found.asked == 4
    # A new driver tries again what failed before anything worked.
    hopeless = state(asked("a", "b"), failed("a", given_up=True))
    assert hopeless.given_up(9) == 1
    hopeless.apply({"kind": "epoch", "epoch": 2})
    assert (hopeless.given_up(9), hopeless.evaluated(9)) == (0, 0)


# -- the best --------------------------------------------------------------------------------


def test_of_equals_the_first_that_was_asked_for_is_best() -> None:
    found = state(
        asked("a", "b"), asked("c", "d"),
        scored("d", one="11"), scored("c", one="11"), scored("b", one="11"), scored("a", one="10"),
    )  # fmt: skip
    best = found.best(4)
    assert best is not None
    assert (best[0].recipe_id, best[0].genome, best[1]) == ("b", {"weight": 1.0}, 1.0)


def test_a_candidate_over_the_budget_cannot_be_best() -> None:
    found = state(asked("a", "b"), scored("a", one="10"), scored("b", one="11"))
    best = found.best(1)
    assert best is not None
    assert best[0].recipe_id == "a"


def test_without_a_scored_candidate_there_is_no_best() -> None:
    assert state().best(5) is None
    assert state(asked("a"), failed("a", given_up=True)).best(5) is None
    assert state(asked("a"), scored("a", complete=False, one="1")).best(5) is None


def test_a_fitness_of_zero_can_be_best() -> None:
    best = state(asked("a"), scored("a", one="00")).best(1)
    assert best is not None
    assert best[1] == 0.0


def test_a_larger_budget_takes_up_where_the_smaller_one_ended() -> None:
    records = [asked("a", "b"), scored("a", one="10"), asked("c", "d")]
    small = state(*records)
    assert recipes(small.within_budget(1)) == [["a"]]
    assert small.evaluated(1) == 1
    # The budget is raised to 3: b and c are still to be done, d is not paid for.
    assert recipes(small.within_budget(3)) == [["a", "b"], ["c"]]
    assert small.evaluated(3) == 1
    small.apply(scored("b", one="11"))
    small.apply(scored("c", one="11"))
    assert small.evaluated(3) == 3
    best = small.best(3)
    assert best is not None
    assert best[0].recipe_id == "b"


# -- reading a ledger ------------------------------------------------------------------------


def test_records_read_at_once_or_one_by_one_make_the_same_state() -> None:
    records = [
        {"kind": "epoch", "epoch": 1},
        {"kind": "campaign", "epoch": 1, "config": {}},
        asked("a", "b"),
        scored("a", complete=False, one="1"),
        {"kind": "something of a later version", "epoch": 1},
        failed("b", given_up=True),
        scored("a", first=1, one="0"),
    ]
    one_by_one = CampaignState("mean")
    for record in records:
        one_by_one.apply(json.loads(json.dumps(record)))
    at_once = state(*records)
    assert one_by_one.evaluations == at_once.evaluations
    assert one_by_one.generations == at_once.generations
    assert (one_by_one.failures, one_by_one.best(9)) == (1, at_once.best(9))


@dataclass
class Scored:
    """What a worker hands over."""

    items: dict[str, list[dict[str, Any]]]
    complete: bool
    realize_seconds: float
    score_seconds: float


def test_what_a_worker_scored_is_recorded_and_read_again() -> None:
    work = Scored(items({"one": "10"}), True, 0.12345678, 1.0)
    content = scored_record("r", "search", 3, work)
    assert content["realize_seconds"] == 0.123457
    assert content["worker"] == 3
    found = state({"kind": "scored", "epoch": 1, **content})
    assert found.fitness("r") == 0.5
