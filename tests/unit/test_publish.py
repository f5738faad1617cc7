"""What is published with a child: a card that claims no more than was measured, and its lineage."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config import config_from_dict, config_to_dict, load_config
from orchestrator.descent.lineage import build_lineage, licence_of
from orchestrator.inputs import open_inputs
from orchestrator.judgement import judge
from orchestrator.ledger.state import CampaignState
from orchestrator.reporting.card import build_card, component_changes, verdict
from orchestrator.statistics import Results
from tests.families import write_model
from workers.checkpoints import open_checkpoint
from workers.merging import Recipe, passthrough_recipe

ITEMS = 60


def results(right: int) -> Results:
    """Results of so many items of which the first `right` are right."""
    return {
        str(n): {"id": str(n), "score": float(n < right), "unparsed": n == 0, "truncated": n == 1}
        for n in range(ITEMS)
    }


def lineage(
    child: tuple[int, int] = (50, 50),
    father: tuple[int, int] = (10, 10),
    mother: tuple[int, int] = (10, 10),
    tasks: tuple[str, str] = ("sort", "shift"),
    **changes: Any,
) -> dict[str, Any]:
    """A made-up lineage, judged from how many items of either task each model has right."""
    counts = {"child": child, "father": father, "mother": mother}
    judgement = judge(
        {
            name: {task: results(right) for task, right in zip(tasks, rights, strict=True)}
            for name, rights in counts.items()
        },
        "mean",
    )
    parents = [
        {
            "name": name,
            "hub": None,
            "fingerprint": name * 11,
            "license": "mit",
            "unused_tensors": [],
        }
        for name in ("father", "mother")
    ]
    tensors = [
        {
            "component": "mlp",
            "elements": 300,
            "method": "ties",
            "changed": {"father": 30, "mother": 300},
        },
        {
            "component": "mlp",
            "elements": 100,
            "method": "linear",
            "changed": {"father": 10, "mother": 0},
        },
        {"component": "vision", "elements": 5, "method": "passthrough", "changed": {"father": 0}},
    ]
    data: dict[str, Any] = {
        "campaign": "a-campaign",
        "parents": parents,
        "base": None,
        "recipe_id": "abc123" * 10,
        "search": {
            "optimizer": "cma_es", "method": "ties", "evaluations": 200, "objective": "mean",
            "seed": 3, "fitness": 0.875, "parents_fitness": {"father": 0.25, "mother": 0.125},
        },
        "tasks": {task: {} for task in tasks},
        "children_judged": 1,
        "tensors": tensors,
        **judgement.to_dict(),
    }  # fmt: skip
    return data | changes


def parents_with(**licences: str | None) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "hub": None,
            "fingerprint": "f" * 64,
            "license": licence,
            "unused_tensors": [],
        }
        for name, licence in licences.items()
    ]


def front_matter(card: str) -> dict[str, Any]:
    empty, front, _ = card.split("---\n", 2)
    assert empty == ""
    data: dict[str, Any] = yaml.safe_load(front)
    return data


def tables(card: str) -> list[list[list[str]]]:
    """The tables of a card as GitHub's Markdown cuts them: table -> row -> cell, without the rule."""
    found: list[list[list[str]]] = []
    inside = False
    for line in card.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            found.append([])
        inside = True
        # A backslash escapes the punctuation behind it, a bar among others.
        cells = re.findall(r"((?:\\.|[^|\\])*)\|", line)[1:]
        found[-1].append([re.sub(r"\\([\\|])", r"\1", cell).strip() for cell in cells])
    return [[heading, *rows] for heading, _, *rows in found]


# -- the card --------------------------------------------------------------------------------


def measured(component: str, **shares: float) -> dict[str, Any]:
    """What an attribution says of a component; no shares: the parents are alike there."""
    return {
        "component": component,
        "shares": shares or None,
        "explained": 0.987 if shares else None,
    }


def test_the_card_says_what_was_measured_of_the_weights() -> None:
    card = build_card(
        lineage(
            attribution=[
                measured("attention", father=0.93, mother=0.07),
                measured("mlp", father=0.07, mother=0.93),
                measured("norm"),
            ]
        )
    )
    assert "attention 93% father (99% explained), mlp 93% mother (99% explained)" in card
    assert "cannot be told apart in norm" in card
    assert "Measured from the weights" in card
    for unmeasured in (lineage(), lineage(attribution=[measured("norm")])):
        assert "Measured" not in build_card(unmeasured)


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({}, "found by evolutionary search"),
        ({"optimizer": "archive"}, "found by evolutionary search"),
        ({"optimizer": "random"}, "the best of 20 candidates drawn at random"),
        ({"optimizer": "random_steady"}, "the best of 20 candidates drawn at random"),
        ({"evaluations": 1}, "the one candidate of its campaign"),
    ],
)
def test_the_card_says_how_the_child_was_found(search: dict[str, Any], words: str) -> None:
    """Nothing evolved where candidates are drawn at random, or there is one."""
    known = lineage()
    card = build_card(known | {"search": known["search"] | {"evaluations": 20} | search})
    assert f"by Darwin, {words}, without training." in card
    evolved = words.startswith("found")
    assert ("evolutionary-merge" in front_matter(card)["tags"]) == evolved


def test_the_front_matter_says_what_the_hub_wants_to_know() -> None:
    parents = parents_with(father="mit", mother="mit")
    parents[1]["hub"] = "someone/mother"
    front = front_matter(build_card(lineage(parents=parents)))
    assert front["base_model"] == ["father", "someone/mother"]
    assert front["base_model_relation"] == "merge"
    assert front["library_name"] == "transformers"
    assert front["license"] == "mit"
    assert "merge" in front["tags"]


@pytest.mark.parametrize(
    ("father", "mother", "licence"),
    [
        ("mit", "mit", "mit"),
        ("mit", "apache-2.0", None),
        ("mit", None, None),
        (None, "mit", None),
        (None, None, None),
        ("a: b # c\nd: e", "a: b # c\nd: e", "a: b # c\nd: e"),
    ],
)
def test_a_licence_is_declared_only_if_all_parents_agree(
    father: str | None, mother: str | None, licence: str | None
) -> None:
    card = build_card(lineage(parents=parents_with(father=father, mother=mother)))
    assert front_matter(card).get("license") == licence
    assert ("license" in front_matter(card)) == (licence is not None)
    assert "d" not in front_matter(card)


def test_a_child_that_beats_no_parent_says_so_plainly() -> None:
    data = lineage(child=(11, 11))
    assert data["beaten"] == []
    assert "beats none of its parents" in verdict(data)
    assert verdict(data) in build_card(data)
    assert "beats every" not in build_card(data)


def test_a_child_that_beats_one_parent_names_the_other() -> None:
    data = lineage(mother=(49, 51))
    assert data["beaten"] == ["father"]
    assert "beats father" in verdict(data)
    assert "not mother" in verdict(data)
    assert verdict(data) in build_card(data)


def test_a_child_that_beats_every_parent_may_say_so() -> None:
    data = lineage()
    assert data["beaten"] == ["father", "mother"]
    assert "beats every parent" in build_card(data)


def test_a_child_that_is_worse_claims_nothing() -> None:
    data = lineage(child=(5, 5))
    assert "beats none" in verdict(data)


def test_a_task_on_which_a_parent_is_better_is_not_kept_silent() -> None:
    card = build_card(lineage(child=(60, 20), father=(10, 40)))
    assert re.search(r"better than the child: father on shift", card)
    assert "better than the child" not in build_card(lineage())


def test_the_results_carry_numbers_intervals_and_what_went_wrong() -> None:
    card = build_card(lineage(child=(30, 60)))
    heading, child, *_ = tables(card)[0]
    assert heading == ["model", "sort", "shift", "mean of tasks", "unparsed", "truncated"]
    # Wilson at 30 of 60 and 60 of 60, by hand.
    assert child == [
        "**child**", "0.500 [0.377, 0.623] (n=60)", "1.000 [0.940, 1.000] (n=60)", "0.750", "2", "2",
    ]  # fmt: skip


def test_every_parent_is_compared_with_the_child() -> None:
    _, *rows = tables(build_card(lineage(child=(50, 30), father=(40, 30))))[1]
    assert [row[:4] for row in rows] == [
        ["father", "all", "10", "0"], ["father", "sort", "10", "0"], ["father", "shift", "0", "0"],
        ["mother", "all", "60", "0"], ["mother", "sort", "40", "0"], ["mother", "shift", "20", "0"],
    ]  # fmt: skip


def test_the_card_tells_how_the_child_was_made() -> None:
    card = build_card(lineage())
    for said in ("200 candidates", "`cma_es`", "ties", "seed 3", "0.875", "father 0.250"):
        assert said in card


def test_a_parent_without_search_scores_does_not_break_the_card() -> None:
    data = lineage()
    data["search"]["parents_fitness"]["mother"] = None
    assert "mother not scored" in build_card(data)


def test_changes_are_summed_over_each_component() -> None:
    mlp, vision = component_changes(lineage())
    assert (mlp.component, mlp.elements, mlp.methods) == ("mlp", 400, ["linear", "ties"])
    assert mlp.changed == {"father": 0.1, "mother": 0.75}
    assert (vision.component, vision.elements, vision.methods) == ("vision", 5, ["passthrough"])
    assert vision.changed["father"] == 0.0


HOSTILE = ["a|b", "a\\|b", "a\\", "a\n| b | c |\n\n# title", "|", "\\\\|"]


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_texts_stay_in_their_cells(text: str) -> None:
    parents = parents_with(father=text, mother="mit")
    data = lineage(tasks=(text, "shift"), parents=parents)
    plain = tables(build_card(lineage(base={"license": "mit", "fingerprint": "f" * 64})))
    found = tables(build_card(data | {"base": {"license": text, "fingerprint": "f" * 64}}))
    assert [[len(row) for row in table] for table in found] == [
        [len(row) for row in table] for table in plain
    ]
    shown = " ".join(text.split())
    assert found[0][0][1] == shown
    assert found[-1][1][2] == shown
    assert found[-1][-1][2] == shown


# -- licences --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (b"---\nlicense: mit\n---\n# text", "mit"),
        (b"---\r\nlicense: mit\r\n---\r\n", "mit"),
        (b"---\nlicense: [mit, gpl]\n---\n", None),
        (b"---\nlicense: 5\n---\n", None),
        (b"---\nlicence: mit\n---\n", None),
        (b"# text\nlicense: mit\n", None),
        (b"---\nlicense: mit\n", None),
        (b"---\n[\n---\n", None),
        (b"---\n- mit\n---\n", None),
        (b"---\ndate: 2024-99-99\nlicense: mit\n---\n", None),
        (b"---\nx: " + b"[" * 600 + b"]" * 600 + b"\n---\n", None),
        (b"---\nlicense: !!python/object/apply:os.system ['exit 1']\n---\n", None),
        (b"---\nlicense: mit\n---\n\xff\xfe", "mit"),
        (b"\xff\xfe\x00", None),
        (b"", None),
        (None, None),
    ],
)
def test_the_licence_is_what_a_parents_own_card_declares(
    tmp_path: Path, models: Path, card: bytes | None, licence: str | None
) -> None:
    """And a card that cannot be read never ends a campaign at its very end."""
    shutil.copytree(models / "a", tmp_path / "a")
    (tmp_path / "a" / "README.md").unlink()
    if card is not None:
        (tmp_path / "a" / "README.md").write_bytes(card)
    assert licence_of(open_checkpoint(str(tmp_path / "a"))) == licence


# -- the lineage -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        write_model(root / name, "qwen3", seed, spread=0.02 if seed else 0.0)
    return root


def lineage_at(folder: Path, **changes: Any) -> dict[str, Any]:
    """The lineage of a child that is its father, made in this folder, and never run."""
    files = {}
    for split in ("search", "holdout"):
        files[split] = str(folder / f"{split}.jsonl")
        row = {"id": "1", "prompt": split, "answer": "y"}
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "t.yaml").write_text(yaml.safe_dump({"kind": "exact_match", "items": files}))
    data = {
        "name": "x",
        "parents": [{"name": name, "path": str(folder / name)} for name in "ab"],
        "tasks": [{"name": str(folder / "t.yaml")}],
        "base": str(folder / "base"),
        "store": str(folder / "store"),
    } | changes
    (folder / "campaign.yaml").write_text(yaml.safe_dump(data))
    config = load_config(str(folder / "campaign.yaml"))
    inputs = open_inputs(config_from_dict(config_to_dict(config)))
    recipes = {name: passthrough_recipe(inputs.references, name) for name in inputs.parents}
    answers = {"t": {"1": {"id": "1", "score": 1.0, "unparsed": False, "truncated": False}}}
    judgement = judge(dict.fromkeys(("child", "a", "b"), answers), "mean")
    weights = {"files": {"x": "0" * 64}, "tensors": []}
    state = CampaignState("mean")
    recipe = recipes["a"]
    return build_lineage(config, inputs, state, recipe, recipes, {"g": 0.5}, judgement, weights)


def test_the_lineage_is_plain_data_that_names_parents_recipe_and_evidence(
    models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    data = lineage_at(tmp_path)
    assert json.loads(json.dumps(data)) == data
    fingerprints = [
        open_checkpoint(str(tmp_path / name)).fingerprint for name in ("a", "b", "base")
    ]
    assert [parent["fingerprint"] for parent in data["parents"]] == fingerprints[:2]
    assert data["base"]["fingerprint"] == fingerprints[2]
    assert [parent["license"] for parent in data["parents"]] == ["apache-2.0", "apache-2.0"]
    assert Recipe.from_dict(data["recipe"]).id == data["recipe_id"]
    assert data["tasks"]["t"]["holdout_items"] == 1
    assert data["holdout"]["child"]["t"]["n"] == 1
    assert data["files"] == {"x": "0" * 64}


def test_the_lineage_does_not_depend_on_where_the_campaign_ran(
    models: Path, tmp_path: Path
) -> None:
    found = []
    for place in ("here", "there"):
        shutil.copytree(models, tmp_path / place)
        found.append(lineage_at(tmp_path / place, workers={"count": 1 + len(found)}))
    assert found[0] == found[1]
    assert str(tmp_path) not in json.dumps(found[0])


def test_tensors_that_no_child_can_have_are_named() -> None:
    data = lineage()
    data["parents"][1]["unused_tensors"] = ["lm_head.weight", "mtp.fc.weight"]
    card = build_card(data)
    assert f"- 2 of {data['parents'][1]['name']}: `lm_head.weight`, `mtp.fc.weight`\n" in card
    assert f" of {data['parents'][0]['name']}: `" not in card
