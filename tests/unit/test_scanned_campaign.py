"""The scan as a stage of a campaign: made once, recorded before it counts, and never trusted blindly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import SHIPPED
from orchestrator.ledger.ledger import Ledger
from orchestrator.mri.experts import kept_routing
from orchestrator.mri.prescription import Prescription
from orchestrator.mri.probe import shards_for
from orchestrator.reporting.report import REPORT_FILE, write_report
from tests.campaigns import digests
from tests.checkpoint_files import read_tensors, weight_files
from tests.families import write_family
from tests.scripted_campaign import ScriptedCampaign, scripted
from workers.errors import BadInputError
from workers.evaluation.task import Item
from workers.merging import Recipe

SEARCH = {"optimizer": "cma_es", "evaluations": 9, "population": 4}


class Killed(BaseException):
    """What ends a driver for good."""


@pytest.fixture(scope="module")
def relatives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three relatives; the mother's mlp weights of the upper layers are spread much wider."""
    folders = write_family(tmp_path_factory.mktemp("family"), "qwen3")
    for file in weight_files(folders[2]):
        from safetensors.torch import load_file, save_file

        tensors = load_file(file)
        for name, values in tensors.items():
            if "mlp" in name and ("layers.2." in name or "layers.3." in name):
                tensors[name] = values * 5.0
        save_file(tensors, file, metadata={"format": "pt"})
    return dict(zip(("base", "father", "mother"), folders, strict=True))


def answers(recipe: Recipe, item: Item) -> bool:
    """Different for each recipe, but always the same."""
    return (int(recipe.id[:8], 16) + sum(item.id.encode())) % 5 < 2


def campaign_of(
    folder: Path, relatives: dict[str, Path], answers: Any = answers, **changes: Any
) -> ScriptedCampaign:
    folder.mkdir(exist_ok=True)
    settings = {
        "parents": [{"name": n, "path": str(relatives[n])} for n in ("father", "mother")],
        "base": None,
        "genome": {"space": "darwin14", "method": "linear"},
        "search": SEARCH,
    } | changes
    return scripted(folder, answers, **settings)


def genes(campaign: ScriptedCampaign) -> list[str]:
    return [gene.name for gene in campaign.space.genes]


def test_parents_that_differ_give_a_trust_gene_and_a_prescription(
    tmp_path: Path, relatives: dict[str, Path]
) -> None:
    campaign = campaign_of(tmp_path, relatives)
    campaign.run()
    assert campaign.prescription is not None
    assert campaign.prescription.is_telling
    assert "mri_trust" in genes(campaign)
    shares = campaign.prescription.shares
    assert shares["layers.3.mlp.up_proj.weight"]["mother"] > 0.55
    assert shares["layers.0.mlp.up_proj.weight"]["mother"] < 0.52
    recorded = Ledger(campaign.store).last("prescription")
    assert recorded is not None
    assert Prescription.from_dict(recorded["prescription"]) == campaign.prescription
    kinds = [record["kind"] for record in Ledger(campaign.store).records]
    assert kinds.index("prescription") < kinds.index("space") < kinds.index("asked")
    card = campaign.store.read(
        f"child-{campaign.state.best(9)[0].recipe_id[:12]}/README.md"
    ).decode()
    assert "The scan of the parents advises shares for" in card
    assert "density_a, density_b (the method linear has no densities)" in card


def test_a_scan_is_kept_for_the_next_campaign_of_the_same_parents(
    tmp_path: Path, relatives: dict[str, Path]
) -> None:
    first = campaign_of(tmp_path, relatives)
    first.run()
    assert "scan_tensors" in first.scripted.called
    second = campaign_of(tmp_path, relatives, name="other")
    second.run()
    assert "scan_tensors" not in second.scripted.called
    assert second.prescription == first.prescription


def test_a_resumed_campaign_goes_by_what_was_recorded(
    tmp_path: Path, relatives: dict[str, Path]
) -> None:
    """Killed while it searches, with its scans deleted: the record decides, and the child is the same."""
    whole = campaign_of(tmp_path / "whole", relatives)
    expected = whole.run()
    left = [6]

    def dying(recipe: Recipe, item: Item) -> bool:
        if item.id.endswith("0001"):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
        return answers(recipe, item)

    broken = campaign_of(tmp_path / "broken", relatives, dying)
    with pytest.raises(Killed):
        broken.run()
    shutil.rmtree(tmp_path / "broken" / "store" / "scans")
    resumed = campaign_of(tmp_path / "broken", relatives)
    result = resumed.run()
    assert "scan_tensors" not in resumed.scripted.called
    assert result["recipe_id"] == expected["recipe_id"]
    assert digests(result["child"]) == digests(expected["child"])


def test_killed_before_the_scan_was_recorded_it_is_made_again(
    tmp_path: Path, relatives: dict[str, Path]
) -> None:
    expected = campaign_of(tmp_path / "whole", relatives).run()
    broken = campaign_of(tmp_path / "broken", relatives)
    record = broken.record

    def dying(kind: str, **content: Any) -> None:
        if kind == "prescription":
            raise Killed
        record(kind, **content)

    broken.record = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        broken.run()
    result = campaign_of(tmp_path / "broken", relatives).run()
    assert digests(result["child"]) == digests(expected["child"])


def test_fine_tunes_that_the_scan_cannot_tell_apart_are_not_mixed_by_it(tmp_path: Path) -> None:
    """Trap 2 on the shipped family: all shares are a half to three digits. Trust is not searched."""
    campaign = scripted(tmp_path, answers, search=SEARCH, genome={
        "space": "darwin14", "method": "slerp"
    })  # fmt: skip
    result = campaign.run()
    assert campaign.prescription is not None
    shares = [of["sort"] for of in campaign.prescription.shares.values()]
    assert max(abs(share - 0.5) for share in shares) < 0.005
    assert "mri_trust" not in genes(campaign)
    card = campaign.store.read(f"child-{result['recipe_id'][:12]}/README.md").decode()
    assert "The scan of the parents tells nothing" in card
    lineage = json.loads(campaign.store.read(f"child-{result['recipe_id'][:12]}/lineage.json"))
    assert not lineage["search"]["space"]["scan"]["is_telling"]
    report = campaign.store.read("report.html").decode()
    assert "tells nothing" in report
    with pytest.raises(BadInputError, match="trusts the scan alone, but the scan does not tell"):
        scripted(tmp_path, answers, name="alone", search=SEARCH,
                 genome={"space": "mri_only", "method": "slerp"}).run()  # fmt: skip


def test_a_probe_tells_the_same_fine_tunes_apart(tmp_path: Path) -> None:
    """Where a skill acts differs between who has it and who has not, and attention and mlp differ."""
    own = tmp_path / "sort.jsonl"
    shutil.copy(SHIPPED / "calibration" / "strings_sort.jsonl", own)
    changes: dict[str, Any] = {
        "scan": {"probe": True, "sets": ["strings_reverse", str(own)]},
        "genome": {"space": "darwin14", "method": "linear"},
        "search": SEARCH | {"evaluations": 2},
    }
    campaign = scripted(tmp_path, answers, **changes)
    campaign.run()
    assert campaign.prescription is not None
    assert campaign.prescription.is_telling
    shares = campaign.prescription.shares
    in_layer = {kind: shares[f"layers.2.{kind}.weight"]["sort"]
                for kind in ("self_attn.q_proj", "mlp.up_proj")}  # fmt: skip
    assert abs(in_layer["self_attn.q_proj"] - in_layer["mlp.up_proj"]) > 0.005

    (tmp_path / "moved").mkdir()
    own.rename(tmp_path / "moved" / own.name)
    changes["scan"]["sets"][1] = str(tmp_path / "moved" / own.name)
    assert scripted(tmp_path, answers, **changes).identity == campaign.identity
    with open(changes["scan"]["sets"][1], "a") as file:
        file.write('{"id": "more", "conditioned": "Sba=", "generic": "ba"}\n')
    with pytest.raises(BadInputError, match=r"these keys differ: scan\.sets"):
        scripted(tmp_path, answers, **changes).run()


def test_mri_only_evaluates_one_candidate_and_writes_it(
    tmp_path: Path, relatives: dict[str, Path]
) -> None:
    campaign = campaign_of(tmp_path, relatives, genome={"space": "mri_only", "method": "linear"})
    result = campaign.run()
    assert result["evaluations"] == 1
    assert "no genes" in result["search_ended"]
    assert campaign.prescription is not None
    child, father, mother = (
        read_tensors(Path(place))
        for place in (result["child"], relatives["father"], relatives["mother"])
    )
    name = "model.layers.3.mlp.up_proj.weight"
    share = campaign.prescription.shares[name.removeprefix("model.")]["mother"]
    blend = (1 - share) * father[name].double() + share * mother[name].double()
    torch.testing.assert_close(child[name].double(), blend, rtol=2**-8, atol=1e-6)
    assert write_report(campaign.store)


def test_experts_of_the_scan_are_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the kept scan tells of; large layers are divided among the workers."""
    monkeypatch.setattr("orchestrator.mri.probe.LARGE_LAYER", 2 * 4 * 3 * 16 * 32 - 1)
    folders = write_family(tmp_path / "family", "qwen3_5_moe")
    prompts = tmp_path / "letters.jsonl"
    prompts.write_text(
        '{"id": "1", "conditioned": "what is this?", "generic": "who are you then"}\n'
    )
    campaign = campaign_of(
        tmp_path / "c",
        dict(zip(("base", "father", "mother"), folders, strict=True)),
        genome={"space": "mri_only", "method": "linear"},
        scan={"probe": True, "sets": [str(prompts)]},
        workers={"count": 2},
    )
    campaign.run()
    assert campaign.scripted.called.count("probe_experts") == 2 * 4
    assert shards_for(campaign.inputs.parents, 2) == 2
    monkeypatch.undo()
    assert shards_for(campaign.inputs.parents, 2) == 1
    scans = [json.loads(kept.read_text()) for kept in (tmp_path / "c").rglob("scans/*.json")]
    (probe,) = (scan["probe"] for scan in scans if scan["probe"])
    rows = probe["parents"]["mother"]["letters"]
    found = kept_routing(campaign.store)
    assert list(found) == ["father", "mother"]
    assert [found["mother"][n]["choices"] for n in range(4)] == [
        row["routing"]["choices"] for row in rows if "routing" in row
    ]
    write_report(campaign.store)
    assert "routers of mother choose 2 of 4 experts" in campaign.store.read(REPORT_FILE).decode()


def test_a_parent_that_holds_nan_ends_the_campaign_by_the_tensors_name(
    tmp_path: Path, relatives: dict[str, Path]
) -> None:
    broken = tmp_path / "nan"
    shutil.copytree(relatives["mother"], broken)
    from safetensors.torch import load_file, save_file

    (file,) = weight_files(broken)
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    campaign = campaign_of(tmp_path / "c", relatives | {"mother": broken})
    with pytest.raises(
        BadInputError, match=r"'layers.1.self_attn.q_proj.weight' of mother holds 1 NaN"
    ):
        campaign.run()


def test_spaces_without_trust_and_campaigns_without_scan_do_not_scan(
    tmp_path: Path, relatives: dict[str, Path]
) -> None:
    for number, changes in enumerate(
        ({"genome": {"space": "components", "method": "linear"}}, {"scan": {"static": False}})
    ):
        campaign = campaign_of(tmp_path / str(number), relatives, **changes)
        campaign.run()
        assert "scan_tensors" not in campaign.scripted.called
        assert Ledger(campaign.store).last("prescription") is None
