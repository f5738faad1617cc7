"""A search without generations as users run it, with real workers: its driver is killed, and goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from orchestrator.campaign import Campaign
from orchestrator.config import load_config
from tests.campaigns import (
    count_records,
    records,
    run_darwin,
    run_joined,
    scored_items,
    start_joined,
    wait_for,
    write_campaign,
)
from tests.scripted_campaign import Stages
from tests.steady_ledger import asked, check_order
from workers.storage import open_store

CAMPAIGN: dict[str, Any] = {
    "name": "steady",
    "parents": [
        {"name": skill, "path": f"shipped:strings/{skill}"} for skill in ("reverse", "sort")
    ],
    "tasks": [
        {"name": skill, "search_items": 24, "holdout_items": 24} for skill in ("reverse", "sort")
    ],
    "objective": "pareto",
    "genome": {"space": "components", "method": "linear"},
    "search": {"optimizer": "archive", "evaluations": 12, "population": 4},
}


def test_killed_and_resumed_it_goes_on_in_the_recorded_order(
    tmp_path: Path, ray_address: str
) -> None:
    file = write_campaign(tmp_path, **CAMPAIGN, address=ray_address)
    store = open_store(str(tmp_path / "store" / "steady"))
    process = start_joined("run", str(file))
    wait_for(lambda: count_records(store, "scored", split="search") >= 7, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = records(store)
    assert not any(record["kind"] == "searched" for record in before)
    result = run_joined("run", str(file))
    ledger = records(store)
    assert ledger[: len(before)] == before
    assert result["evaluations"] == 12
    assert len(asked(ledger)) == len(set(asked(ledger))) == 12
    items = scored_items(ledger)
    assert len(items) == len(set(items)), "no item is scored twice"
    # There was no barrier: one was asked for while others were still scored, and after results came.
    kinds = [r["kind"] for r in ledger if r["kind"] in ("asked", "searched")
             or (r["kind"] == "scored" and r["recipe"] in asked(ledger) and r["complete"])]  # fmt: skip
    assert kinds.index("scored") < len(kinds) - 1 - kinds[::-1].index("asked")
    check_order(Campaign(load_config(str(file)), Stages()), ledger)
    status = run_darwin("status", result["campaign"])
    assert status["front"]["members"][0]["recipe_id"] == result["recipe_id"]
    assert run_joined("run", str(file)) == result
