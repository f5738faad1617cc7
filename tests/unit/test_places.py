"""A campaign's place stands for its published child, wherever a checkpoint is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from orchestrator.descent.attribution import attribute_checkpoint
from orchestrator.ledger.ledger import Ledger
from orchestrator.overview import checkpoint_overview
from orchestrator.places import open_parent, resolve
from orchestrator.single_merge import merge_recipe
from orchestrator.verification import verify_child
from tests.checkpoint_files import read_tensors, write_checkpoint
from workers.checkpoints import open_checkpoint
from workers.errors import BadInputError
from workers.storage import open_store

UP = "model.layers.0.mlp.up_proj.weight"


def write_plain(folder: Path, value: float) -> Path:
    return write_checkpoint(folder, {UP: torch.full((4, 4), value)})


def begin_campaign(store: Path) -> Ledger:
    ledger = Ledger(open_store(str(store)))
    ledger.open_epoch(1)
    ledger.append("campaign", identity={}, config={})
    return ledger


def finish(ledger: Ledger, child: str, **content: object) -> None:
    ledger.append("finished", child=child, report="report.html", **content)


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    """A finished campaign; the folder of its child is the second that it wrote."""
    place = tmp_path / "store" / "first"
    ledger = begin_campaign(place)
    write_plain(place / "child-old", 1.0)
    finish(ledger, "child-old")
    ledger.append("campaign", identity={}, config={})
    write_plain(place / "child-new", 3.0)
    finish(ledger, "child-new")
    return place


def test_a_finished_campaign_is_its_present_child(
    campaign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = open_checkpoint(str(campaign / "child-new"))
    assert open_parent(str(campaign)).fingerprint == child.fingerprint
    assert open_parent(f"file://{campaign}/").fingerprint == child.fingerprint
    monkeypatch.chdir(campaign.parent)
    assert open_parent("first").location == str(campaign / "child-new")
    # A folder within the campaign is a checkpoint as it stands.
    assert open_parent("first/child-old").location == str(campaign / "child-old")


def test_a_campaigns_child_is_attributed(campaign: Path, tmp_path: Path) -> None:
    parents = {
        name: str(write_plain(tmp_path / name, value)) for name, value in (("a", 2.0), ("b", 6.0))
    }
    found = attribute_checkpoint(str(campaign), parents)
    assert found["child"] == str(campaign / "child-new")
    assert found["total"]["shares"] == pytest.approx({"a": 0.75, "b": 0.25})


def test_a_checkpoint_is_itself(tmp_path: Path) -> None:
    place = str(write_plain(tmp_path / "plain", 1.0))
    assert resolve(place) == place
    assert resolve("shipped:strings/sort") == "shipped:strings/sort"
    assert resolve(f"{place}+{tmp_path / 'adapter'}") == f"{place}+{tmp_path / 'adapter'}"


def test_an_adapter_on_a_campaigns_child(campaign: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert resolve(f"{campaign}+{adapter}") == f"{campaign / 'child-new'}+{adapter}"


def test_an_unfinished_campaign_is_no_parent(campaign: Path, tmp_path: Path) -> None:
    begin_campaign(tmp_path / "begun")
    with pytest.raises(BadInputError, match=r"begun: this campaign is not finished.*darwin run"):
        open_parent(str(tmp_path / "begun"))
    ledger = Ledger(open_store(str(campaign)))  # given a larger budget, it goes on
    ledger.open_epoch(2)
    ledger.append("campaign", identity={}, config={})
    with pytest.raises(BadInputError, match="not finished"):
        open_parent(str(campaign))


def test_a_rejected_child_is_no_parent(tmp_path: Path) -> None:
    place = tmp_path / "campaign"
    child = write_plain(place / "rejected" / "child-1", 1.0)
    begin_campaign(place).append("rejected", child="rejected/child-1", report="report.html")
    with pytest.raises(BadInputError, match=f"child was rejected.*{child}"):
        open_parent(str(place))
    assert open_parent(str(child)).location == str(child)


def test_every_command_takes_a_campaign(campaign: Path, tmp_path: Path) -> None:
    other = write_plain(tmp_path / "other", 5.0)
    recipe = tmp_path / "recipe.yaml"
    parents = [{"name": "first", "path": str(campaign)}, {"name": "other", "path": str(other)}]
    rules = [{"method": "linear", "parameters": {"weight": 0.5}}]
    recipe.write_text(yaml.safe_dump({"parents": parents, "rules": rules}))
    merge_recipe(str(recipe), str(tmp_path / "merged"))
    assert read_tensors(tmp_path / "merged")[UP].unique().tolist() == [4.0]
    sound = verify_child(str(tmp_path / "merged"), [str(campaign)])
    assert (sound["problems"], sound["changed"]["first"]) == ([], 16)
    assert checkpoint_overview(str(campaign))["checkpoint"] == str(campaign / "child-new")
