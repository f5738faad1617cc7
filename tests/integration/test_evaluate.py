"""`darwin eval` as a process: killed, and gone on with by Ray workers, to the published numbers."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from orchestrator.ledger.ledger import read_records
from tests.campaigns import START_SECONDS, run_darwin, start_darwin
from workers.storage import open_store

PUBLISHED = {"reverse": 0.752, "shift": 0.496}
"""Held-out exact match of the shipped sorter, from the table in workers/families/strings/README.md."""


def scored(place: Path) -> list[dict[str, Any]]:
    """The blocks that are recorded."""
    records = read_records(open_store(str(place / "records")))
    return [record for record in records if record["kind"] == "scored"]


def test_a_killed_evaluation_goes_on_and_ends_with_the_published_scores(tmp_path: Path) -> None:
    tasks = [argument for name in PUBLISHED for argument in ("--task", name)]
    settings = ("--dtype", "float32", "--batch-size", "4", "--out", str(tmp_path))
    command = ("eval", "shipped:strings/sort", *tasks, *settings)
    process = start_darwin(*command)
    deadline = time.monotonic() + START_SECONDS
    places: list[Path] = []
    while not (places and scored(places[0])):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
        places = [place for place in tmp_path.glob("eval/*") if (place / "records").is_dir()]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = scored(places[0])
    assert not (places[0] / "result.json").exists()

    result = run_darwin(*command, "--workers", "2")
    assert result["evaluation"] == str(places[0])
    for name, published in PUBLISHED.items():
        assert result["tasks"][name]["n"] == 512
        assert round(result["tasks"][name]["score"], 3) == published
    assert json.loads((places[0] / "result.json").read_text())["tasks"] == result["tasks"]

    records = scored(places[0])
    assert records[: len(before)] == before
    ids = [item["id"] for record in records for items in record["items"].values() for item in items]
    assert len(ids) == len(set(ids)) == 1024  # no item was scored twice
