"""Whole campaigns over a small mixture of experts: the probe advises, the record decides, all is told."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.genomes.expert_space import ExpertSpace
from orchestrator.ledger.ledger import Ledger
from orchestrator.mri.prescription import Prescription
from tests.campaigns import digests
from tests.expert_parents import copy_reordered, inverse
from tests.families import write_family
from tests.scripted_campaign import ScriptedCampaign, scripted
from workers.evaluation.task import Item
from workers.merging import Recipe
from workers.storage import open_store

SEARCH = {"optimizer": "cma_es", "evaluations": 9, "population": 4}


class Killed(BaseException):
    """What ends a driver for good."""


@pytest.fixture(scope="module")
def relatives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A father and two donors of 4 layers with 4 experts."""
    return write_family(tmp_path_factory.mktemp("mixtures"), "qwen3_moe")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few pairs for the probe."""
    file = tmp_path_factory.mktemp("sets") / "letters.jsonl"
    texts = ("abcdefg", "gfedcba", "aabbccd", "hijkl")
    pairs = [{"id": text, "conditioned": text, "generic": f"{text[1:]}="} for text in texts]
    file.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    return str(file)


def answers(recipe: Recipe, item: Item) -> bool:
    """Different for each recipe, but always the same."""
    return (int(recipe.id[:8], 16) + sum(item.id.encode())) % 5 < 2


def campaign_of(
    folder: Path, relatives: list[Path], prompts: str, answers: Any = answers, **changes: Any
) -> ScriptedCampaign:
    folder.mkdir(exist_ok=True)
    names = ("father", "one", "two")
    settings = {
        "parents": [
            {"name": name, "path": str(path)} for name, path in zip(names, relatives, strict=True)
        ],
        "base": None,
        "genome": {"space": "experts", "method": "linear"},
        "scan": {"probe": True, "sets": [prompts]},
        "search": SEARCH,
    } | changes
    return scripted(folder, answers, **settings)


def recipes_of(campaign: ScriptedCampaign) -> list[str]:
    return [
        candidate["recipe"]
        for record in Ledger(campaign.store).of_kind("asked")
        for candidate in record["candidates"]
    ]


def test_a_resumed_campaign_over_experts_asks_the_same_recipes(
    tmp_path: Path, relatives: list[Path], prompts: str
) -> None:
    """Killed while it searches, with its scans deleted: the record decides, and the child is the same."""
    whole = campaign_of(tmp_path / "whole", relatives, prompts)
    expected = whole.run()
    assert isinstance(whole.space, ExpertSpace)
    advice = whole.prescription
    assert advice is not None
    assert advice.is_telling
    assert {gene.name for gene in whole.space.genes} >= {"trust.one", "trust.two", "density_first"}
    recorded = Ledger(whole.store).last("prescription")
    assert recorded is not None
    assert Prescription.from_dict(recorded["prescription"]) == advice

    left = [20]  # of the three parents 9 are asked

    def dying(recipe: Recipe, item: Item) -> bool:
        if item.id.endswith("0001"):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
        return answers(recipe, item)

    killed = campaign_of(tmp_path / "killed", relatives, prompts, dying)
    with pytest.raises(Killed):
        killed.run()
    shutil.rmtree(tmp_path / "killed" / "store" / "scans")
    resumed = campaign_of(tmp_path / "killed", relatives, prompts)
    result = resumed.run()
    assert "probe" not in resumed.scripted.called
    assert recipes_of(resumed) == recipes_of(whole)
    assert digests(result["child"]) == digests(expected["child"])

    lineage = json.loads(open_store(expected["child"]).read("lineage.json"))
    told = lineage["search"]["space"]
    assert told["bands"] == [[0, 0], [1, 1], [2, 3]]
    assert told["scan"]["experts"] == advice.advised_experts
    decided = whole.space.decisions(lineage["genome"])
    card = open_store(expected["child"]).read("README.md").decode()
    rows = re.findall(r"^\| ([0-3-]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", card, re.M)
    assert [row[0] for row in rows] == ["0", "1", "2-3"]
    assert [sum(map(int, row[3:])) for row in rows] == [
        len(decided[0]),
        len(decided[1]),
        len(decided[2]) + len(decided[3]),
    ]
    assert f"advises shares for {advice.advised_experts} experts" in card
    report = whole.store.read("report.html").decode()
    assert "<h3>Experts</h3>" in report
    assert "data:image/png" in report


def test_experts_can_be_bred_in_rounds(tmp_path: Path, relatives: list[Path], prompts: str) -> None:
    """The second round has no scan: a share for each band, and recipes over the campaign's own parents."""
    campaign = campaign_of(
        tmp_path, relatives, prompts,
        breeding={"rounds": 2, "survivors": 2}, search=SEARCH | {"evaluations": 12},
    )  # fmt: skip
    result = campaign.run()
    assert set(campaign.search.rounds) == {2}
    assert {gene.name for gene in campaign.search.rounds[2].space.genes} == {
        f"share.round1-2.{band}.0" for band in range(3)
    }
    assert result["evaluations"] == 12


def test_a_donor_whose_experts_were_renamed_is_advised_as_before(
    tmp_path: Path, relatives: list[Path], prompts: str
) -> None:
    """Matched by weights; what each place is advised is what the donor's own numbering would have got."""
    orders = {0: (2, 0, 3, 1), 2: (1, 0, 3, 2)}
    renamed = copy_reordered(relatives[2], tmp_path / "renamed", orders)

    def dying(recipe: Recipe, item: Item) -> bool:
        raise Killed  # the search is not what is looked at

    advice = []
    for folder, donor in (("own", relatives[2]), ("other", renamed)):
        campaign = campaign_of(
            tmp_path / folder, [*relatives[:2], donor], prompts, dying, experts={"match": "weights"}
        )
        with pytest.raises(Killed):
            campaign.run()
        assert campaign.prescription is not None
        advice.append(campaign.prescription.experts)
    assert campaign.matching is not None
    assert campaign.matching.orders == {"two": {n: inverse(order) for n, order in orders.items()}}
    for layer, of in advice[0].items():
        for name, shares in of.items():
            assert advice[1][layer][name] == pytest.approx(shares, abs=1e-4)
    recorded = Ledger(campaign.store).last("prescription")
    assert recorded is not None
    assert recorded["of"]["experts"]["two"]["2"] == [1, 0, 3, 2]
