"""Searches without generations: what is asked and told, resumed at every record, budgets and failures.

The candidates answer by a script; several run at once, and end in another order than they were asked for.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import CampaignError
from orchestrator.ledger.ledger import Ledger, Record
from orchestrator.pool.pool import Job
from orchestrator.search.archive import Archive
from orchestrator.steady_search import HOPELESS_FAILURES, STAGNANT_ASKS
from tests.benchmarks.steady import WORKERS, Clock, SimulatedPool, measure
from tests.campaigns import records, scored_items
from tests.scripted_campaign import (
    CandidateFailedError,
    ScriptedCampaign,
    ScriptedPool,
    run_search,
    scripted,
)
from tests.steady_ledger import asked, check_order
from workers.evaluation.task import Item
from workers.merging import Recipe

TASKS = [{"name": skill, "search_items": 6, "holdout_items": 6} for skill in ("reverse", "sort")]
GIVEN: dict[str, Any] = {
    "genome": {"space": "darwin14", "method": "linear"},
    "scan": {"static": False},
    "tasks": TASKS,
    "search": {"optimizer": "archive", "evaluations": 9, "population": 4},
}
AT_ONCE = 3


def by_recipe(recipe: Recipe, item: Item) -> bool:
    """Answers that depend on the recipe alone, so that candidates differ."""
    return int(recipe.id[:8], 16) >> int(item.id.split("-")[-1]) & 1 == 0


def campaign(folder: Path, answers: Any = by_recipe, **changes: Any) -> ScriptedCampaign:
    return scripted(folder, answers, **GIVEN | changes)


def search(folder: Path, answers: Any = by_recipe, **changes: Any) -> ScriptedCampaign:
    """Run a campaign until its winner is recorded."""
    folder.mkdir(exist_ok=True)
    found = campaign(folder, answers, **changes)
    run_search(found)
    return found


@pytest.fixture(autouse=True)
def _several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedPool, "at_once", AT_ONCE)


def of_search(ledger: list[Record]) -> list[Record]:
    """Asks, and what was scored of them, in their order."""
    candidates = set(asked(ledger))
    return [
        r
        for r in ledger
        if r["kind"] == "asked" or (r["kind"] in ("scored", "failed") and r["recipe"] in candidates)
    ]


def winner(found: ScriptedCampaign) -> tuple[str, float]:
    chosen = Ledger(found.store).last("selected")
    assert chosen is not None
    return chosen["recipe"], chosen["fitness"]


def test_the_order_of_asks_and_tells_is_in_the_ledger(tmp_path: Path) -> None:
    found = search(tmp_path)
    assert found.search.ended == "the budget is spent"
    ledger = of_search(records(found.store))
    # Each candidate is asked for by itself: some at first, then one for each that has ended.
    assert "".join(r["kind"][0] for r in ledger) == "aaa" + "sa" * 6 + "sss"
    assert [r["recipe"] for r in ledger if r["kind"] == "scored"] != asked(ledger)
    check_order(found, records(found.store))


def test_killed_at_any_record_it_ends_with_the_same_asks_and_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScriptedPool, "in_parts", True)
    whole = search(tmp_path)
    ledger, best = records(whole.store), winner(whole)
    kinds = [record["kind"] for record in ledger]
    folder = Path(whole.store.uri) / "ledger"
    kept = shutil.copytree(folder, tmp_path / "kept")
    for length in range(kinds.index("asked"), len(kinds) + 1):
        shutil.rmtree(folder)
        folder.mkdir()
        for file in sorted(kept.iterdir())[:length]:
            shutil.copy(file, folder)
        resumed = search(tmp_path)
        again = records(resumed.store)
        assert of_search(again) == [
            r | {"epoch": other["epoch"], "time": other["time"]}
            for r, other in zip(of_search(ledger), of_search(again), strict=True)
        ]
        assert winner(resumed) == best
        assert len(scored_items(again)) == len(set(scored_items(again))), "none is scored twice"


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(tmp_path: Path) -> None:
    small = search(tmp_path)
    begun = asked(records(small.store))
    larger = search(tmp_path, search=GIVEN["search"] | {"evaluations": 12})
    assert asked(records(larger.store))[:9] == begun
    assert len(asked(records(larger.store))) == 12
    # What it then asks for is what one would ask for that had been told of all nine.
    assert larger.scripted.evaluated[:1] != []
    assert set(larger.scripted.evaluated) == set(asked(records(larger.store))[9:])


def test_a_failed_candidate_is_told_as_the_worst_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, bool]] = []
    tell = Archive.tell_one
    monkeypatch.setattr(
        Archive,
        "tell_one",
        lambda self, point, fitness, scores: (
            told.append((fitness, scores is None)) or tell(self, point, fitness, scores)
        ),
    )
    monkeypatch.setattr(ScriptedPool, "at_once", 1)
    seen: list[str] = []

    def answers(recipe: Recipe, item: Item) -> bool:
        if recipe.id not in seen:
            seen.append(recipe.id)
        number = seen.index(recipe.id) - 2  # the parents come first
        if number in (0, 1, 4, 7):
            raise CandidateFailedError("no memory")
        return int(item.id.split("-")[-1]) < number

    found = search(tmp_path, answers)
    # The first two wait for one that is scored; fitness then grows, so the worst stays the same.
    assert [round(18 * fitness) for fitness, _ in told] == [3, 3, 3, 6, 3, 12, 15, 3, 18]
    failed = [number for number, (_, is_failed) in enumerate(told) if is_failed]
    assert failed == [1, 2, 4, 7]
    assert found.state.evaluated(9) == 9, "a failed candidate costs its part of the budget"
    first = list(told)
    told.clear()
    search(tmp_path, answers)
    assert told == first, "a replay tells the same"


def test_candidates_that_all_fail_end_it_and_are_tried_again(tmp_path: Path) -> None:
    is_broken = True

    def answers(recipe: Recipe, item: Item) -> bool:
        if is_broken and recipe.id not in parents:
            raise CandidateFailedError("no memory")
        return by_recipe(recipe, item)

    broken = campaign(tmp_path, answers)
    parents = {recipe.id for recipe in broken.parent_recipes.values()}
    with pytest.raises(CampaignError, match=r"every candidate so far has failed.*no memory"):
        broken.run()
    failed = len(asked(records(broken.store)))
    assert HOPELESS_FAILURES <= failed < HOPELESS_FAILURES + AT_ONCE
    is_broken = False
    mended = search(tmp_path, answers)
    assert len(asked(records(mended.store))) == 9
    assert asked(records(mended.store))[:failed] == asked(records(broken.store))[:failed]
    assert mended.state.evaluated(9) == 9


def test_recipes_that_are_known_cost_nothing_and_end_it_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer that asks for three points in turn, whatever it is told."""
    points = [[0.1 * n] * 14 for n in range(1, 4)]
    monkeypatch.setattr(
        Archive, "ask_one", lambda self: points[len(self._points) % 3][: self._genes]
    )
    found = search(tmp_path)
    assert found.search.ended == f"{STAGNANT_ASKS} asks in a row brought no new recipe"
    assert found.state.evaluated(9) <= 3
    ledger = records(found.store)
    resumed = search(tmp_path)
    assert asked(records(resumed.store)) == asked(ledger)
    assert resumed.scripted.evaluated == []


def test_a_flat_search_stops_unless_one_that_runs_differs(tmp_path: Path) -> None:
    flat = search(tmp_path / "flat", lambda recipe, item: True, search=FLAT)
    assert flat.search.flat is not None
    assert flat.search.ended.startswith("the fitness is flat: all 14 candidates score 1.000")
    assert flat.search.flat.to_dict()["generations"] is None
    seen: list[str] = []

    def answers(recipe: Recipe, item: Item) -> bool:
        if recipe.id not in seen:
            seen.append(recipe.id)
        return seen.index(recipe.id) - 2 != 13  # the last of those that run when it is called flat

    uneven = search(tmp_path / "uneven", answers, search=FLAT)
    assert uneven.search.flat is None
    assert uneven.search.ended == "the budget is spent"
    again = search(tmp_path / "uneven", answers, search=FLAT)
    assert asked(records(again.store)) == asked(records(uneven.store))


FLAT = {"optimizer": "random_steady", "evaluations": 30}


def test_rounds_are_bred_from_the_best_of_the_one_before(tmp_path: Path) -> None:
    bred = GIVEN | {
        "genome": {"space": "components", "method": "linear"},
        "breeding": {"rounds": 2, "survivors": 2},
    }
    whole = search(tmp_path, **bred)
    ledger = records(whole.store)
    rounds = [r.get("round") for r in of_search(ledger) if r["kind"] == "asked"]
    assert rounds == [1] * 4 + [2] * 5
    first = {
        r["candidates"][0]["recipe"] for r in ledger if r.get("round") == 1 and r["kind"] == "asked"
    }
    (second,) = [r for r in ledger if r["kind"] == "round" and r["round"] == 2]
    best = sorted(first, key=lambda recipe: -(whole.state.fitness(recipe) or 0.0))[:2]
    assert {whole.state.fitness(p["recipe"]) for p in second["parents"]} == {
        whole.state.fitness(recipe) for recipe in best
    }
    kept = [r for r in ledger if r["kind"] == "asked"][-2]
    for file in sorted((Path(whole.store.uri) / "ledger").iterdir())[ledger.index(kept) :]:
        file.unlink()
    resumed = search(tmp_path, **bred)
    assert asked(records(resumed.store)) == asked(ledger)
    assert winner(resumed)[1] == whole.state.best(9)[1]  # type: ignore[index]


def test_sixteen_workers_are_kept_busy_through_the_real_pool() -> None:
    """On a simulated clock, evaluations 5 times apart (`make bench` has more of it)."""
    _, steady, _ = measure("archive", None, seed=0, evaluations=64)
    _, by_generations, _ = measure("cma_es", 16, seed=0, evaluations=64)
    assert steady >= 0.95
    assert by_generations < 0.8


def test_the_pool_asks_for_no_more_than_its_workers_will_soon_need(tmp_path: Path) -> None:
    found = campaign(tmp_path)
    recipe = next(iter(found.parent_recipes.values()))
    pool = SimulatedPool(found.inputs.tasks, Clock())
    supplied: list[Job] = []
    ended: list[str] = []
    most = 0

    def supply() -> Job | None:
        nonlocal most
        if len(supplied) == 50:
            return None
        supplied.append(Job(str(len(supplied)), recipe, "search"))
        most = max(most, len(supplied) - len(ended))
        return supplied[-1]

    first = [Job(f"given {n}", recipe, "search") for n in range(40)]
    for progress in pool.run(first, supply):
        assert progress.scored is not None
        if progress.scored.complete and not progress.job.key.startswith("given"):
            ended.append(progress.job.key)
    assert sorted(ended, key=int) == [str(n) for n in range(50)]
    assert most == WORKERS + pool.look_ahead == WORKERS + 3
    assert pool.busy == 0
