"""How a campaign's child of mixtures of experts routes: measured once, and told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import PoolError
from orchestrator.experts.routing_of_child import measure_routing
from orchestrator.reporting.report import build_report
from tests.mixtures import write_mixtures
from tests.scripted_campaign import ScriptedCampaign, ScriptedPool, scripted
from tests.unit.test_probe import write_kind
from workers.experts.routing_comparison import compare_routing
from workers.merging import Recipe
from workers.storage import open_store

DONORS = ("donor1", "donor2")
SMALL = {
    "tasks": [{"name": "reverse", "search_items": 8, "holdout_items": 8}],
    "search": {"optimizer": "random", "evaluations": 2, "population": 2},
}


def campaign_of(folder: Path, places: dict[str, Path]) -> ScriptedCampaign:
    parents = [{"name": name, "path": str(places[name])} for name in DONORS]
    answers = len  # of item ids: some are right, whoever answers
    return scripted(
        folder, lambda recipe, item: answers(item.id) % 2 == 0, parents=parents,
        base=str(places["base"]), **SMALL,
    )  # fmt: skip


def test_a_campaigns_child_is_compared_with_its_parents(tmp_path: Path) -> None:
    campaign = campaign_of(tmp_path, write_mixtures(tmp_path / "models"))
    result = campaign.run()
    (routed,) = campaign.ledger.of_kind("routed")
    child = open_store(result["child"])
    lineage = json.loads(child.read("lineage.json"))
    assert lineage["routing"] == routed["routing"]
    assert lineage["routing"]["sets"] == {"search items": {"prompts": 8}}
    prompts = [item.prompt for item in campaign.inputs.tasks[0].items["search"]]
    rows = compare_routing(
        Recipe.from_dict(lineage["recipe"]), campaign.inputs.parents, campaign.inputs.base,
        dict.fromkeys(DONORS, prompts), dtype="float32",
    )  # fmt: skip
    for layer, row in zip(lineage["routing"]["layers"], rows, strict=True):
        for name in DONORS:
            told, own = (of["models"]["child"]["against"][name] for of in (layer, row))
            assert told == own and 0 < own["kl"] < 5 and 0 < own["overlap"] < 1
    card = child.read("README.md").decode()
    assert "## Routing of experts" in card and "| this child's |" in card
    report = build_report(open_store(campaign.store.uri))
    assert "Routing of experts</h2>" in report and "donor2 itself" in report

    campaign.scripted.called.clear()
    recipe = campaign.recipes[routed["recipe"]]
    assert measure_routing(campaign, recipe) == routed["routing"]
    assert not campaign.scripted.called, "it was measured already, and the ledger has it"


def test_a_child_is_published_though_its_routing_cannot_be_compared(tmp_path: Path) -> None:
    places = {
        name: write_kind(tmp_path / name, "deepseek_v3", seed)
        for seed, name in enumerate(("base", *DONORS))
    }
    campaign = campaign_of(tmp_path, places)
    result = campaign.run()
    card = open_store(result["child"]).read("README.md").decode()
    assert "Not compared with the parents': " in card and "more than one matrix" in card
    assert "Routing of experts</h2>" not in build_report(open_store(campaign.store.uri))


class Fails(ScriptedPool):
    """Its workers die of comparing routing, as of too little memory."""

    def each(
        self, method: str, arguments: list[tuple[Any, ...]], preferred: Any = None
    ) -> Iterator[tuple[int, Any]]:
        if method == "compare_routing":
            raise PoolError("compare_routing failed 3 times")
        return super().each(method, arguments, preferred)


def test_a_child_is_published_though_workers_die_of_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign = campaign_of(tmp_path, write_mixtures(tmp_path / "models"))
    monkeypatch.setattr("tests.scripted_campaign.ScriptedPool", Fails)
    card = open_store(campaign.run()["child"]).read("README.md").decode()
    assert "Not compared with the parents': compare_routing failed 3 times" in card


def test_dense_models_have_no_routing(tmp_path: Path) -> None:
    campaign = scripted(tmp_path, lambda recipe, item: True, **SMALL)
    campaign.run()
    assert not list(campaign.ledger.of_kind("routed"))
    assert "compare_routing" not in campaign.scripted.called
