"""A campaign whose model is spread over two nodes, one of whose members is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.campaigns import (
    count_records,
    digests,
    ray_processes,
    records,
    run_darwin,
    start_darwin,
    wait_for,
    write_campaign,
)
from tests.families import LETTERS, write_family
from tests.ray_cluster import ENVIRONMENT, RayCluster
from workers.storage import open_store


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster(2) as started:
        yield started


def write_task(folder: Path) -> str:
    """Which letter comes next, of models that have learnt nothing: scores that small changes change."""
    kept = {}
    for number, split in enumerate(("search", "holdout")):
        items = [
            {"id": f"{split}-{n}", "prompt": LETTERS[n % 26] * (2 + number) + LETTERS[(n // 26) % 26],
             "choices": ["a", "b", "c"], "answer": n % 3}
            for n in range(48)
        ]  # fmt: skip
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in items))
        kept[split] = str(file)
    task = folder / "letters.yaml"
    task.write_text(yaml.safe_dump({"kind": "multiple_choice", "items": kept}))
    return str(task)


def members(ancestor: int) -> list[int]:
    """Pids of the Ray workers below a process that hold experts for a leader."""
    return ray_processes("GangWorker", ancestor)


def test_a_gang_ends_with_the_child_of_whole_workers(cluster: RayCluster, tmp_path: Path) -> None:
    """The same items scored alike, and the same bytes; the lost member costs one failed attempt."""
    family = write_family(tmp_path / "family", "qwen3_5_moe", max_shard_size="10KB")
    base, first, second = (str(path) for path in family)
    assert len(list(family[1].glob("*.safetensors"))) > 8  # for everybody to write some
    task = write_task(tmp_path)
    campaign: dict[str, Any] = {
        "parents": [{"name": "a", "path": first}, {"name": "b", "path": second}],
        "base": base,
        "tasks": [{"name": task}],
        "genome": {"space": "components", "method": "ties"},
        "search": {"optimizer": "cma_es", "evaluations": 4, "population": 4},
        "engine": {"dtype": "auto", "batch_size": 8},
        "health": {"prompts": 4, "new_tokens": 8, "allow": ["changed", "repetition", "endings"]},
        "address": cluster.address,
    }
    places = {}
    for name, workers in (
        ("whole", {"count": 1}),
        ("gang", {"count": 1, "gang": 2, "placement": "strict"}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        places[name] = str(write_campaign(folder, **campaign, workers=workers))
    whole = run_darwin("run", places["whole"], environment=os.environ | ENVIRONMENT)

    store = open_store(str(tmp_path / "gang" / "store" / "small"))
    process = start_darwin("run", places["gang"], "--json", environment=os.environ | ENVIRONMENT)
    wait_for(lambda: count_records(store, "scored") > 0, process)
    killed = members(cluster.process_id)
    assert len(killed) == 1
    os.kill(killed[0], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["recipe_id"] == whole["recipe_id"]  # Ray's word of the loss is elsewhere

    child = f"{store.uri}/child-{whole['recipe_id'][:12]}"
    assert digests(child) == digests(whole["child"])
    ledger, other = records(store), records(open_store(whole["campaign"]))
    assert scores(ledger) == scores(other)
    assert len({item["output"] for item in scores(ledger).values()}) > 1
    assert content(ledger, "examined") == content(other, "examined")
    failures = [record for record in ledger if record["kind"] == "failed"]
    assert [record["given_up"] for record in failures] == [False]
    assert "Actor" in failures[0]["error"]
    descriptions = [r["description"] for r in ledger if r["kind"] == "engine"]
    assert len(descriptions) == 1 and "gang" not in descriptions[0]
    wait_for(lambda: not members(cluster.process_id))  # none outlives its leader


def content(ledger: list[Any], kind: str) -> list[dict[str, Any]]:
    """The records of a kind, but for whose they are."""
    same = {"epoch": 0, "time": 0, "reserved": None}
    return [record | same for record in ledger if record["kind"] == kind]


def scores(ledger: list[Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(recipe, split, item) -> its result."""
    return {
        (record["recipe"], record["split"], item["id"]): item
        for record in ledger
        if record["kind"] == "scored"
        for items in record["items"].values()
        for item in items
    }
