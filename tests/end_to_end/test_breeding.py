"""Breeding over generations as users do: in rounds, killed between them, and from a campaign's child."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.descent.ancestry import parse_ancestry
from tests.campaigns import (
    count_records,
    digests,
    records,
    run_darwin,
    run_joined,
    scored_items,
    start_joined,
    wait_for,
    write_campaign,
)
from workers.storage import open_store

BRED: dict[str, Any] = {
    "name": "bred",
    "genome": {"space": "components", "method": "linear"},
    "search": {"optimizer": "random", "evaluations": 15, "population": 4},
    "breeding": {"rounds": 3, "survivors": 2},
    "seed": 0,
}


def lineage_of(result: dict[str, Any]) -> dict[str, Any]:
    lineage: dict[str, Any] = json.loads(open_store(result["child"]).read("lineage.json"))
    return lineage


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_joined("run", str(write_campaign(folder, **BRED, address=ray_address)))


def test_each_round_is_bred_from_the_best_of_the_one_before(undisturbed: dict[str, Any]) -> None:
    ledger = records(open_store(undisturbed["campaign"]))
    rounds = [record for record in ledger if record["kind"] == "round"]
    assert [(r["round"], r["limit"]) for r in rounds] == [(1, 5), (2, 10), (3, 15)]
    fitness: dict[str, float] = {}
    for recipe in {r["recipe"] for r in ledger if r["kind"] == "scored"}:
        tasks: dict[str, list[float]] = {}
        for record in ledger:
            if record["kind"] == "scored" and (record["recipe"], record["split"]) == (
                recipe, "search",
            ):  # fmt: skip
                for task, items in record["items"].items():
                    tasks.setdefault(task, []).extend(item["score"] for item in items)
        if tasks:
            fitness[recipe] = sum(sum(s) / len(s) for s in tasks.values()) / len(tasks)
    asked: dict[int, list[str]] = {}
    for record in ledger:
        if record["kind"] == "asked":
            known = asked.setdefault(record["round"], [])
            known += [c["recipe"] for c in record["candidates"] if c["recipe"] in fitness]
    assert {number: len(set(known)) for number, known in asked.items()} == {1: 5, 2: 5, 3: 5}
    for record in rounds[1:]:
        best = sorted(asked[record["round"] - 1], key=lambda recipe: -fitness[recipe])[:2]
        assert [parent["recipe"] for parent in record["parents"]] == best
    every = [recipe for known in asked.values() for recipe in known]
    assert undisturbed["recipe_id"] == max(every, key=lambda recipe: fitness[recipe])
    # Nothing but the child was written.
    written = {i.key.split("/")[0] for i in open_store(undisturbed["campaign"]).list_objects()}
    assert written == {
        "ledger", "lease.json", "report.html", "items.parquet", "contamination.json",
        f"child-{undisturbed['recipe_id'][:12]}",
    }  # fmt: skip


def test_the_childs_ancestry_has_those_that_were_never_written(undisturbed: dict[str, Any]) -> None:
    lineage = lineage_of(undisturbed)
    ancestry = parse_ancestry(lineage["ancestry"])
    own = lineage["search"]["rounds"]["child_is_of"]
    assert own > 1, "choose a seed whose best child is bred in a later round"
    assert [d.name for d in ancestry.child.through] == [f"round{own - 1}-{n}" for n in (1, 2)]
    assert [p["name"] for p in lineage["recipe"]["parents"]] == ["reverse", "sort", "shift"]
    # By way of those in between, the shares that recipes give are about those measured on the child.
    assert ancestry.child.based_on == "measured"
    direct, by_way = ancestry.shares(), ancestry.shares(lambda one: one.nearest)
    for descent in ancestry.child.parents:
        for component in ("embedding", "attention", "mlp"):  # not norms: there rounding decides
            share = direct[descent.node][component]
            assert by_way[descent.node][component] == pytest.approx(share, abs=0.05)
    card = open_store(undisturbed["child"]).read("README.md").decode()
    assert "bred, never written" in card
    assert f"This child is of round {own}." in card


def test_killed_in_every_round_the_child_is_the_same(
    undisturbed: dict[str, Any], tmp_path: Path, ray_address: str
) -> None:
    """SIGKILL the driver before, within and between rounds; the same command goes on."""
    campaign = write_campaign(tmp_path, **BRED, address=ray_address)
    store = open_store(str(tmp_path / "store" / "bred"))

    count = partial(count_records, store)

    points: list[Callable[[], bool]] = [
        lambda: count("scored") >= 5,  # within the first round
        lambda: count("round", round=2) >= 1,  # when the second has begun
        lambda: count("asked", round=2) >= 2,  # within it, over its limit
        lambda: count("asked", round=3) >= 1,  # within the third
        lambda: count("child") >= 1,  # while the child is written
    ]
    for reached in points:
        process = start_joined("run", str(campaign))
        wait_for(reached, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    result = run_joined("run", str(campaign))
    assert digests(result["child"]) == digests(undisturbed["child"])
    items = scored_items(records(store))
    assert len(items) == len(set(items)), "an item was scored twice"
    assert count("round") == 3


def test_a_larger_budget_is_refused(undisturbed: dict[str, Any]) -> None:
    file = Path(undisturbed["campaign"]).parent.parent / "campaign.yaml"
    refused = run_joined("run", str(file), "search.evaluations=16", expect=2)
    assert "search.evaluations" in refused["error"]


def test_a_campaigns_child_is_a_parent_like_any_other(
    undisturbed: dict[str, Any], tmp_path: Path, ray_address: str
) -> None:
    parents = [
        {"name": "amber", "path": undisturbed["campaign"]},
        {"name": "sort", "path": "shipped:strings/sort"},
    ]
    campaign = write_campaign(
        tmp_path,
        name="next",
        parents=parents,
        genome={"space": "components", "method": "linear"},
        search={"optimizer": "random", "evaluations": 2, "population": 2},
        address=ray_address,
    )
    result = run_joined("run", str(campaign))
    lineage = lineage_of(result)
    ancestry = parse_ancestry(lineage["ancestry"])
    by_name = {one.name: one for one in ancestry.ancestors.values()}
    assert by_name["amber"].campaign == "bred"
    assert by_name["amber"].through, "who it was bred from is remembered here, too"
    assert by_name["amber"].scores == {
        "objective": "mean",
        "fitness": pytest.approx(undisturbed["holdout_fitness"]["child"]),
        "beaten": undisturbed["beaten"],
    }
    founders = {ancestry.ancestors[key].name for key in ancestry.founders()}
    assert founders == {"reverse", "sort", "shift", "base"}
    assert run_darwin("verify", result["campaign"])["status"] == "sound"
    assert "amber" in open_store(result["campaign"]).read("report.html").decode()
