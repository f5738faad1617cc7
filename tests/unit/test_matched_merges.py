"""Experts are matched before a merge, or before a campaign's search; the recipes then pair them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.config import SHIPPED
from orchestrator.experts.matching import Matching
from orchestrator.ledger.ledger import Ledger
from orchestrator.planning.command import plan_campaign
from orchestrator.recipe_file import load_recipe_file
from orchestrator.recipe_spelling import respell
from orchestrator.single_merge import merge_recipe
from tests.checkpoint_files import assert_same_bits, read_tensors
from tests.expert_parents import (
    EXPERTS,
    copy_reordered,
    inverse,
    random_experts,
    reordered,
    write_experts,
)
from tests.families import write_model
from tests.scripted_campaign import ScriptedCampaign, scripted
from workers.errors import BadInputError
from workers.evaluation.task import Item
from workers.merging import Recipe

ORDERS = {0: (2, 0, 1, 3), 2: (3, 2, 1, 0), 3: (0, 1, 3, 2)}
WANTED = {layer: inverse(order) for layer, order in ORDERS.items()}
PROMPTS = [
    {"id": str(number), "conditioned": text, "generic": "x y z"}
    for number, text in enumerate(("what is this?", "ab cd efg hij klm", "who are you"))
]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A father and a mother, the mother with her experts moved, and prompts."""
    root = tmp_path_factory.mktemp("family")
    mother = write_model(root / "mother", "qwen3_moe", 1, spread=0.01)
    prompts = root / "letters.jsonl"
    prompts.write_text("\n".join(map(json.dumps, PROMPTS)))
    return {
        "father": write_model(root / "father", "qwen3_moe", 0),
        "mother": mother,
        "moved": copy_reordered(mother, root / "moved", ORDERS),
        "letters": prompts,
    }


def recipe_file(folder: Path, family: dict[str, Path], mother: str, **changes: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "parents": [
            {"name": "father", "path": str(family["father"])},
            {"name": "mother", "path": str(family[mother])},
        ],
        "rules": [{"method": "linear", "parameters": {"weight": {"father": 0.4, "mother": 0.6}}}],
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(data | changes))
    return str(file)


@pytest.mark.parametrize("by", ["weights", "outputs"])
def test_a_merge_matches_first(
    by: str, family: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The child is that of the mother whose experts never moved; the recipe holds the order."""
    straight = recipe_file(tmp_path / "straight", family, "mother")
    merge_recipe(straight, str(tmp_path / "straight" / "child"))
    sets = {"sets": [str(family["letters"])]} if by == "outputs" else {}
    moved = recipe_file(tmp_path / "moved", family, "moved", match_experts=by, **sets)
    written = merge_recipe(moved, str(tmp_path / "moved" / "child"))
    expected = read_tensors(tmp_path / "straight" / "child")
    assert_same_bits(read_tensors(tmp_path / "moved" / "child"), expected)
    lineage = json.loads((tmp_path / "moved" / "child" / "lineage.json").read_text())
    assert written["recipe_id"] == lineage["recipe_id"] == Recipe.from_dict(lineage["recipe"]).id
    assert Recipe.from_dict(lineage["recipe"]).experts == {"mother": WANTED}
    told = lineage["matching"]
    assert told["by"] == by
    assert told["donors"]["mother"]["moved"] == 9
    assert told["donors"]["mother"]["layers"]["1"]["moved"] == 0
    assert f"By their {by}, 9 of 16 experts of mother" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("block_sparse_moe.e_score_correction_bias", (EXPERTS,)),  # MiniMax-M2
        ("mlp.moe_statics.e_score_correction_bias", (1, EXPERTS)),  # Ernie 4.5
        ("feed_forward.expert_bias", (EXPERTS,)),  # LFM2
    ],
)
def test_the_father_merged_with_himself_in_another_order_is_the_father(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Also where the biases of his routers are stored beside them."""
    father = random_experts(3, dtype=torch.float32)
    father = {key: values for key, values in father.items() if not key.endswith("correction_bias")}
    orders = {0: (3, 0, 5, 1, 4, 2), 1: (1, 2, 0, 3, 5, 4)}
    donor = reordered(father, orders)
    for layer, order in orders.items():
        bias = torch.arange(1.0, EXPERTS + 1) * (layer + 1)
        father[f"model.layers.{layer}.{name}"] = bias.view(shape)
        donor[f"model.layers.{layer}.{name}"] = bias[list(order)].view(shape)
    family = {
        "father": write_experts(tmp_path / "father", father),
        "mother": write_experts(tmp_path / "mother", donor),
    }
    recipe = recipe_file(tmp_path, family, "mother", match_experts="weights")
    merge_recipe(recipe, str(tmp_path / "child"))
    child = read_tensors(tmp_path / "child")
    for key, values in father.items():
        torch.testing.assert_close(child[key], values, msg=key)


def test_routers_are_calibrated_for_matched_experts(
    family: dict[str, Path], tmp_path: Path
) -> None:
    router = {"router": {"harc": {"sets": [str(family["letters"])]}}}
    straight = recipe_file(tmp_path / "straight", family, "mother", **router)
    moved = recipe_file(tmp_path / "moved", family, "moved", match_experts="weights", **router)
    for recipe in (straight, moved):
        merge_recipe(recipe, str(Path(recipe).parent / "child"))
    father = read_tensors(family["father"])
    child, expected = (read_tensors(tmp_path / name / "child") for name in ("moved", "straight"))
    for name, values in expected.items():
        assert torch.allclose(child[name].float(), values.float(), atol=1e-3), name
        if name.endswith("mlp.gate.weight"):
            assert not torch.equal(values, father[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match_experts": "names"}, "match_experts: 'names' is none of weights, outputs"),
        (
            {"match_experts": "weights", "sets": ["code"]},
            "sets: are the prompts of `match_experts: out",
        ),
        ({"sets": ["code"]}, "sets: are the prompts"),
        ({"match_experts": "outputs", "sets": "code"}, "sets: 'code' is not a list"),
        (
            {"match_experts": "weights", "experts": {"mother": {0: [1, 0, 2, 3]}}},
            "match_experts: does not go with `experts`",
        ),
        (
            {"match_experts": "weights", "layers": [{"father": [0, 1], "mother": [0, 1]}]},
            "match_experts: does not go with `layers`",
        ),
        ({"experts": {"father": {0: [1, 0, 2, 3]}}}, "recipe.yaml: experts: father: the father's"),
    ],
)
def test_what_cannot_be_asked_for(
    changes: dict[str, Any], message: str, family: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match=message):
        load_recipe_file(recipe_file(tmp_path, family, "moved", **changes))


@pytest.mark.parametrize(
    "changes", [{"match_experts": "weights"}, {"experts": {"mother": {0: [1, 0, 2, 3]}}}]
)
def test_mergekits_spelling_knows_no_order(
    changes: dict[str, Any], family: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match="mergekit pairs experts by their numbers alone"):
        respell(recipe_file(tmp_path, family, "moved", **changes), "mergekit")


# Campaigns


def answers(recipe: Recipe, item: Item) -> bool:
    """The same for every recipe but those of single parents: so two campaigns go the same way."""
    return (sum(item.id.encode()) + len(recipe.rules)) % 5 < 2


def campaign_of(
    folder: Path, family: dict[str, Path], mother: str, **changes: Any
) -> ScriptedCampaign:
    folder.mkdir(exist_ok=True)
    parents = {"father": family["father"], "mother": family[mother]}
    settings = {
        "parents": [{"name": name, "path": str(path)} for name, path in parents.items()],
        "base": None,
        "genome": {"space": "components", "method": "linear"},
        "search": {"optimizer": "random", "evaluations": 4, "population": 2},
    } | changes
    return scripted(folder, answers, **settings)


def child_of(campaign: ScriptedCampaign) -> Path:
    return Path(str(campaign.run()["child"]))


def test_a_campaign_matches_before_it_searches(family: dict[str, Path], tmp_path: Path) -> None:
    """In every round of breeding, too."""
    breeding = {"breeding": {"rounds": 2, "survivors": 2}}
    straight = campaign_of(tmp_path / "straight", family, "mother", **breeding)
    expected = read_tensors(child_of(straight))
    campaign = campaign_of(
        tmp_path / "moved", family, "moved", experts={"match": "weights"}, **breeding
    )
    child = child_of(campaign)
    assert_same_bits(read_tensors(child), expected)
    kinds = [record["kind"] for record in Ledger(campaign.store).records]
    assert kinds.index("matching") < kinds.index("scored")
    lineage = json.loads((child / "lineage.json").read_text())
    assert Recipe.from_dict(lineage["recipe"]).experts == {"mother": WANTED}
    assert lineage["matching"]["donors"]["mother"]["moved"] == 9
    assert "9 of 16 experts of mother" in (child / "README.md").read_text()
    asked = [recipe for recipe in campaign.recipes.values() if recipe.experts]
    assert len(asked) == len(campaign.recipes) - 2  # the parents themselves


def test_an_expert_space_prescribes_for_the_matched_experts(
    family: dict[str, Path], tmp_path: Path
) -> None:
    """What the probe saw of an expert is advised for the place that it belongs to."""
    shipped = (SHIPPED / "genome" / "experts.yaml").read_text()
    space = tmp_path / "space.yaml"
    space.write_text(shipped.replace("router: keep", "router: as_experts"))
    settings = {
        "genome": {"space": str(space), "method": "linear"},
        "scan": {"probe": True, "sets": [str(family["letters"])]},
    }
    straight = campaign_of(tmp_path / "straight", family, "mother", **settings)
    expected = read_tensors(child_of(straight))
    campaign = campaign_of(
        tmp_path / "moved", family, "moved", experts={"match": "weights"}, **settings
    )
    child = child_of(campaign)
    assert campaign.prescription is not None
    assert straight.prescription is not None
    assert campaign.prescription.experts == straight.prescription.experts
    assert_same_bits(read_tensors(child), expected)
    lineage = json.loads((child / "lineage.json").read_text())
    assert {row["method"] for row in lineage["tensors"] if row["component"] == "router"} == {
        "as_experts"
    }


def test_a_resumed_campaign_goes_by_the_recorded_order(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the experts would be matched otherwise today."""
    other = {"mother": {0: (1, 0, 2, 3)}}
    first = campaign_of(tmp_path, family, "moved", experts={"match": "weights"})

    def stop(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(first, "_prescribe", stop)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    ledger = Ledger(first.store)
    (record,) = ledger.of_kind("matching")
    assert Matching.from_dict(record["matching"], ["father", "mother"]).orders == {"mother": WANTED}
    (file,) = [
        path
        for path in Path(first.store.uri.removeprefix("file://")).rglob("*")
        if path.is_file() and b'"matching"' in path.read_bytes()
    ]
    text = file.read_text()
    found = json.dumps({"mother": {str(n): list(o) for n, o in WANTED.items()}})
    assert found in text
    file.write_text(text.replace(found, json.dumps({"mother": {"0": [1, 0, 2, 3]}})))
    second = campaign_of(tmp_path, family, "moved", experts={"match": "weights"})
    child = child_of(second)
    assert "match_experts" not in second.scripted.called
    lineage = json.loads((child / "lineage.json").read_text())
    assert Recipe.from_dict(lineage["recipe"]).experts == other


def test_a_scan_advises_matched_experts_as_if_they_had_not_moved(
    family: dict[str, Path], tmp_path: Path
) -> None:
    """In a space of ratios too, whose shares come from the statistics of each expert's weights."""
    space = tmp_path / "space.yaml"
    gene = {"low": 0.0, "high": 1.0, "start": 0.5}
    space.write_text(
        yaml.safe_dump(
            {
                "kind": "ratio",
                "components": ["expert"],
                "transplant": {"below": 0.15, "above": 0.85},
                "genes": {"mri_trust": gene, "ratio": gene | {"weight": 1.0}},
            }
        )
    )
    advice = []
    for mother, by in (("mother", "none"), ("moved", "weights"), ("moved", "none")):
        campaign = campaign_of(
            tmp_path / f"{mother}-{by}", family, mother, experts={"match": by},
            genome={"space": str(space), "method": "linear"}, scan={"static": True},
        )  # fmt: skip
        campaign.run()
        assert campaign.prescription is not None
        advice.append(campaign.prescription.shares)
    straight, matched, unmatched = advice
    assert len(straight) == 4 * 4 * 3
    assert matched == straight
    assert unmatched != straight


def test_a_dense_father_has_nothing_to_match(tmp_path: Path) -> None:
    """Said before anything is started, by the campaign and by its plan."""
    with pytest.raises(BadInputError, match=r"experts\.match: .* has no routed experts"):
        scripted(tmp_path, answers, experts={"match": "weights"})
    with pytest.raises(BadInputError, match=r"experts\.match: .* has no routed experts"):
        plan_campaign(str(tmp_path / "campaign.yaml"), [], "gpu8_80gb", {}, [])


def test_sets_without_outputs_are_refused(family: dict[str, Path], tmp_path: Path) -> None:
    for experts, message in (
        ({"match": "names"}, "experts.match: 'names' is none of none, weights, outputs"),
        ({"sets": ["code"]}, "experts.sets: are the prompts of experts.match: outputs"),
    ):
        with pytest.raises(BadInputError, match=message):
            campaign_of(tmp_path, family, "moved", experts=experts)


def test_the_order_is_part_of_what_a_campaign_is(family: dict[str, Path], tmp_path: Path) -> None:
    """A campaign without matching is what it was before there was any."""
    campaigns = [
        campaign_of(tmp_path, family, "moved", experts=experts)
        for experts in (
            {"match": "none"},
            {"match": "weights"},
            {"match": "outputs", "sets": [str(family["letters"])]},
        )
    ]
    identities = [campaign.identity for campaign in campaigns]
    assert "experts" not in identities[0]
    assert identities[1]["experts"] == {"match": "weights", "sets": []}
    assert [one["name"] for one in identities[2]["experts"]["sets"]] == ["letters"]
