"""Names that users give: whatever they are, nothing is written outside the campaign's folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import load_config
from orchestrator.evaluating.evaluation import Evaluation
from tests.campaigns import records, scored_items, write_campaign
from tests.scripted_campaign import run_search, scripted
from workers.errors import BadInputError
from workers.storage.store import check_key

LEADING_OUT = (
    "..", ".", "", "/", "../other", "a/b", "/absolute", "a/../../b", "a\\b", "a\n", "a\0b", "~", "~root",
    "s3://bucket", "-option", "$(id)", "%2e%2e", "\u202e", "é", " ", "a b", ".hidden",
)  # fmt: skip


@pytest.mark.parametrize("name", LEADING_OUT)
def test_names_of_campaigns_and_parents_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError, match=r"campaign\.yaml: name: "):
        load_config(str(write_campaign(tmp_path, name=name)))
    if name == "-option":
        return  # parents' names are never arguments, nor keys
    parents = [{"name": one, "path": "shipped:strings/sort"} for one in ("a", name)]
    with pytest.raises(BadInputError, match=r"campaign\.yaml: parents: "):
        load_config(str(write_campaign(tmp_path, parents=parents)))


@pytest.mark.parametrize("task", ["..yaml", "...yaml", "a b;$(id).yaml", "../task/-x.yaml"])
def test_tasks_and_items_with_odd_names_stay_inside(tmp_path: Path, task: str) -> None:
    folder = tmp_path / "task"
    folder.mkdir()
    ids = [*LEADING_OUT, "\x1b[2J", "<script>"]
    ids = [one for one in ids if one]
    for split in ("search", "holdout"):
        items = [
            {"id": f"{split}/{one}", "prompt": f"{split} {n}", "answer": "x"}
            for n, one in enumerate(ids)
        ]
        text = "".join(json.dumps(one) + "\n" for one in items)
        (folder / f"{split}.jsonl").write_text(text)
    file = folder / task
    definition: dict[str, Any] = {
        "kind": "exact_match",
        "items": {s: str(folder / f"{s}.jsonl") for s in ("search", "holdout")},
    }
    file.write_text(yaml.safe_dump(definition))
    campaign = scripted(
        tmp_path,
        lambda recipe, item: len(item.id) % 2 == 0,
        tasks=[{"name": str(file)}],
        search={"optimizer": "random", "evaluations": 2},
    )
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    run_search(campaign)
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    inside = tmp_path / "store" / "small"
    assert new
    assert all(path.is_relative_to(inside) for path in new)
    scored = scored_items(records(campaign.store))
    assert {item for _, _, _, item in scored} >= {f"search/{one}" for one in ids}


@given(st.text(max_size=80))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_an_evaluation_of_any_place_lies_in_one_folder(location: str) -> None:
    """Whatever the checkpoint's place is called, `--out` is not left."""
    checkpoint: Any = SimpleNamespace(location=location, fingerprint="f")
    wish: Any = SimpleNamespace(
        tasks=(), split="holdout", protocol=SimpleNamespace(), engine={}, batch_size=1
    )
    evaluation = Evaluation(checkpoint, wish)
    evaluation.__dict__["identity"] = {"checkpoint": location.encode(errors="replace").hex()}
    assert check_key(evaluation.name) == evaluation.name
    assert "/" not in evaluation.name
