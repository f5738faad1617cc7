"""Campaigns whose generations race: fewer items, the same child after any interruption, and who wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from matplotlib.figure import Figure

from orchestrator.errors import CampaignError
from orchestrator.ledger.ledger import Ledger, Record
from orchestrator.ledger.state import CampaignState
from orchestrator.overview import campaign_overview
from orchestrator.reporting import charts
from orchestrator.reporting.report import build_report
from orchestrator.search import STEADY_OPTIMIZERS
from tests.campaigns import records, scored_items
from tests.scripted_campaign import CandidateFailedError, ScriptedCampaign, scripted
from workers.errors import BadInputError
from workers.evaluation.task import Item
from workers.merging import Recipe
from workers.storage import open_store

SEARCH = {"optimizer": "cma_es", "evaluations": 15, "population": 6}
TASKS = [{"name": skill, "search_items": 48, "holdout_items": 16} for skill in ("reverse", "sort")]
RACES: dict[str, dict[str, Any]] = {
    "race": {"use": "race", "leaders": 1},
    "irt": {"use": "irt", "last_block": 0.25},
}


STEADY = next(iter(STEADY_OPTIMIZERS))


class Killed(BaseException):
    """What ends a driver for good."""


def answers(recipe: Recipe, item: Item) -> bool:
    """Each recipe has a share of right answers of its own, on items of its own."""
    share = 20 + int(recipe.id[:4], 16) % 60
    return (int(recipe.id[4:12], 16) * 31 + sum(item.id.encode()) * 7919) % 100 < share


def campaign_of(folder: Path, racing: dict[str, Any], **changes: Any) -> ScriptedCampaign:
    folder.mkdir(exist_ok=True)
    settings = {"tasks": TASKS, "search": SEARCH, "racing": racing, "objective": "worst"} | changes
    return scripted(folder, answers, **settings)


class Searched(BaseException):
    """The search has come to its end; what follows is not raced."""


def search(campaign: ScriptedCampaign, records_left: float = float("inf")) -> list[Record]:
    """Search until the winner is selected, or die before so many records; the ledger."""
    record = campaign.record

    def mortal(kind: str, **content: Any) -> None:
        nonlocal records_left
        if records_left <= 0:
            raise Killed
        records_left -= 1
        record(kind, **content)
        if kind == "selected":
            raise Searched

    campaign.record = mortal  # type: ignore[method-assign]
    with pytest.raises(Searched):
        campaign.run()
    return records(campaign.store)


def kinds(ledger: list[Record], *names: str) -> list[Record]:
    """Records of these kinds, without who wrote them."""
    return [
        {k: v for k, v in record.items() if k not in ("epoch", "time")}
        for record in ledger
        if record["kind"] in names
    ]


@pytest.mark.parametrize("name", RACES)
def test_killed_at_every_few_records_the_child_is_the_same(tmp_path: Path, name: str) -> None:
    """Ended before each sixth thing that it would record, and begun again: every decision is the same, and
    so is the recipe that won."""
    one = search(campaign_of(tmp_path / "whole", RACES[name]))
    deaths, other = 0, None
    while other is None:
        try:
            other = search(campaign_of(tmp_path / "mortal", RACES[name]), records_left=5)
        except Killed:
            deaths += 1
    assert deaths > 5
    decided = ("asked", "race", "block", "raced", "selected")
    assert kinds(other, *decided) == kinds(one, *decided)
    items = scored_items(other)
    assert len(items) == len(set(items))
    assert sorted(items) == sorted(scored_items(one))


def test_the_winner_was_asked_every_item_and_others_were_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Card and report say so, and no estimate is drawn as the best."""
    campaign = campaign_of(tmp_path, RACES["race"])
    result = campaign.run()
    ledger = records(campaign.store)
    asked: dict[str, int] = {}
    for recipe, split, _, _ in scored_items(ledger):
        asked[recipe] = asked.get(recipe, 0) + (split == "search")
    parents = [recipe.id for recipe in campaign.parent_recipes.values()]
    candidates = {c["recipe"] for r in ledger if r["kind"] == "asked" for c in r["candidates"]}
    told = {recipe for r in ledger if r["kind"] == "raced" for recipe in r["told"]}
    assert len(told) == result["evaluations"] == 15
    assert told <= candidates
    assert {asked[parent] for parent in parents} == {96}
    assert asked[result["recipe_id"]] == 96
    complete = [recipe for recipe in told if asked[recipe] == 96]
    assert len(complete) < len(told) / 2
    state = CampaignState("worst", ledger)
    fitness = {recipe: state.fitness(recipe) for recipe in told}
    assert fitness[result["recipe_id"]] == max(f for f in fitness.values() if f is not None)
    # The first generation's leader is asked everything, and later ones that may be better.
    raced = [r for r in ledger if r["kind"] == "raced"]
    leader = max(raced[0]["told"], key=raced[0]["told"].get)
    assert asked[leader] == 96
    overview = campaign_overview(campaign.store.uri)
    spent = sum(asked[recipe] for recipe in told)
    assert overview["racing"] == {
        "races": len(raced), "items_asked": spent, "items_of": 15 * 96
    }  # fmt: skip
    assert spent < 0.6 * 15 * 96
    assert overview["evaluations"] == 15
    assert f"{spent} of {15 * 96} items asked" in (campaign.store.read("report.html").decode())
    child = open_store(result["child"])
    assert f"They raced: {spent} of {15 * 96} items asked" in child.read("README.md").decode()

    drawn: list[Figure] = []

    def keep(
        name: str, title: str, height: float, draw: Callable[[Figure], None], *width: float
    ) -> Markup:
        if name == "fitness":
            drawn.append(Figure())
            draw(drawn[0])
        return Markup()

    monkeypatch.setattr(charts, "draw_svg", keep)
    build_report(campaign.store)
    (axes,) = drawn[0].axes
    known, estimates, failed, ring = (dots.get_offsets() for dots in axes.collections)
    assert (len(known), len(estimates), len(failed)) == (len(complete), 15 - len(complete), 0)
    assert ring[0][1] == pytest.approx(fitness[result["recipe_id"]])


def test_what_is_told_is_what_was_recorded(tmp_path: Path) -> None:
    """The optimizer of a raced campaign hears the recorded ranking, in the order it asked."""
    campaign = campaign_of(tmp_path, RACES["race"])
    heard: list[list[float]] = []
    optimizer = campaign.search.optimizer
    tell = optimizer.tell

    def listening(points: Any, fitness: Any) -> None:
        heard.append(list(fitness))
        tell(points, fitness)

    optimizer.tell = listening  # type: ignore[method-assign]
    search(campaign)
    ledger = Ledger(campaign.store)
    told = {r["generation"]: r["told"] for r in ledger.of_kind("raced")}
    asked = {
        r["generation"]: [c["recipe"] for c in r["candidates"]] for r in ledger.of_kind("asked")
    }
    assert heard == [[told[g][recipe] for recipe in asked[g]] for g in range(len(heard))]
    assert [r["places"] for r in ledger.of_kind("race")] == [3] * len(told)  # CMA-ES's mu of 6


def test_a_round_is_bred_from_children_that_were_asked_every_item(tmp_path: Path) -> None:
    campaign = campaign_of(
        tmp_path, RACES["race"], breeding={"rounds": 2, "survivors": 3},
        genome={"space": "components", "method": "task_arithmetic"},
    )  # fmt: skip
    ledger = search(campaign)
    (second,) = [r for r in ledger if r["kind"] == "round" and r["round"] == 2]
    assert len(second["parents"]) == 3
    state = CampaignState("worst", ledger)
    assert all(state.fitness(parent["recipe"]) is not None for parent in second["parents"])


def test_without_racing_a_campaign_is_what_it_was(tmp_path: Path) -> None:
    """Its identity too, whatever the other settings of racing say: older ledgers go on."""
    plain = campaign_of(tmp_path, {"use": "none", "confidence": 0.8})
    assert "racing" not in plain.identity
    raced = campaign_of(tmp_path, {"use": "race"})
    assert raced.identity["racing"]["confidence"] == 0.9


def test_other_settings_are_refused_once_it_raced(tmp_path: Path) -> None:
    search(campaign_of(tmp_path, RACES["race"]))
    with pytest.raises(BadInputError, match=r"racing\.last_block"):
        campaign_of(tmp_path, {"use": "race", "last_block": 1.0}).run()


def test_a_larger_budget_races_the_generation_that_was_cut_as_a_whole(tmp_path: Path) -> None:
    search(campaign_of(tmp_path, RACES["race"]))
    ledger = search(campaign_of(tmp_path, RACES["race"], search=SEARCH | {"evaluations": 18}))
    state = CampaignState("worst", ledger)
    assert state.evaluated(18) == 18
    assert [(r["generation"], r["candidates"]) for r in ledger if r["kind"] == "raced"] == [
        (0, 6), (1, 6), (2, 3), (2, 6)
    ]  # fmt: skip
    items = scored_items(ledger)
    assert len(items) == len(set(items))


def test_what_cannot_race_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="one candidate at a time"):
        campaign_of(tmp_path, RACES["race"], search=SEARCH | {"optimizer": STEADY})
    with pytest.raises(BadInputError, match="no order of candidates"):
        campaign_of(tmp_path, RACES["race"], objective="pareto")


@pytest.mark.parametrize("name", RACES)
def test_a_first_generation_of_failures_races_again_when_its_cause_is_mended(
    tmp_path: Path, name: str
) -> None:
    """As it does without racing: nothing has worked, so a new driver tries everything again."""
    campaign = campaign_of(tmp_path, RACES[name])
    parents = {recipe.id for recipe in campaign.parent_recipes.values()}

    def broken(recipe: Recipe, item: Item) -> bool:
        if recipe.id not in parents:
            raise CandidateFailedError("no room on this machine")
        return answers(recipe, item)

    campaign.answers = broken
    with pytest.raises(CampaignError, match="no room on this machine"):
        campaign.run()
    mended = search(campaign_of(tmp_path, RACES[name]))
    mended = [record for record in mended if record.get("told") != {}]  # the race of failures
    whole = search(campaign_of(tmp_path / "whole", RACES[name]))
    decided = ("asked", "raced", "selected")
    assert kinds(mended, *decided) == kinds(whole, *decided)
