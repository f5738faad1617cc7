"""Campaigns as jobs of a real cluster that wants a token: submitted, attached to, stopped, gone on with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.campaigns import digests, run_darwin, start_darwin, write_campaign
from tests.jobs_cluster import JobsCluster
from workers.storage import open_store

PLANTED = "planted-secret-value"
SMALL: dict[str, Any] = {
    "tasks": [{"name": "sort", "search_items": 8, "holdout_items": 12}],
    "search": {"optimizer": "cma_es", "evaluations": 4, "population": 4},
    "health": {"prompts": 2},
}


def weights_of(child: str) -> str:
    return digests(child)["model.safetensors"]


def test_campaigns_are_jobs_of_a_cluster(tmp_path: Path) -> None:
    with JobsCluster(cpus=3) as cluster:
        own = dict(os.environ) | cluster.environment | {"AWS_SECRET_ACCESS_KEY": PLANTED}
        at = ("--address", cluster.address)
        (tmp_path / "one").mkdir()
        store = str(tmp_path / "store")
        waits = str(write_campaign(tmp_path / "one", name="waits", store=store, **SMALL))
        runs = str(write_campaign(tmp_path, name="runs", store=store, **SMALL))

        # Two submit a campaign at once whose worker finds no room: it is one job, which waits.
        twins = [
            start_darwin("submit", waits, "workers.cpus=50", *at, "--json", environment=own)
            for _ in range(2)
        ]
        # Another one goes its way meanwhile.
        done = run_darwin("submit", runs, "workers.count=1", *at, "--follow", environment=own)
        assert (done["status"], done["exit_code"], done["attached"]) == ("done", 0, False)
        submitted = [json.loads(twin.communicate(timeout=300)[0]) for twin in twins]
        assert len({one["job"] for one in submitted}) == 1
        assert sorted(one["attached"] for one in submitted) == [False, True]

        listed = run_darwin("list", store, *at, environment=own)
        assert {row["campaign"]: (row["status"], row["job"]) for row in listed["campaigns"]} == {
            f"{store}/waits": ("running", submitted[0]["job"]),
            f"{store}/runs": ("done", done["job"]),
        }
        assert {job["job"]: job["status"] for job in listed["jobs"]} == {
            submitted[0]["job"]: "running", done["job"]: "done",
        }  # fmt: skip
        logs = run_darwin("logs", f"{store}/runs", *at, environment=own)
        assert "held out" in logs["logs"] and logs["job"] == done["job"]

        stopped = run_darwin("stop", f"{store}/waits", *at, environment=own)
        assert (stopped["driver"], stopped["job"]["status"]) == ("stopped", "stopped")
        assert stopped["job"]["exit_code"] == 130  # by itself, with its state saved
        resumed = run_darwin(
            "resume", f"{store}/waits", "workers.cpus=1", "workers.count=1", *at, "--follow",
            environment=own,
        )  # fmt: skip
        assert (resumed["status"], resumed["attached"]) == ("done", False)
        assert resumed["job"] != submitted[0]["job"]

        refused = run_darwin("logs", "nothing", *at, expect=2, environment=own)
        assert f"{cluster.address}: has no Darwin job nothing" in refused["error"]
        refused = run_darwin("list", *at, expect=2, environment=dict(os.environ))
        assert f"{cluster.address}: this cluster wants a token" in refused["error"]

    folders = [open_store(f"{store}/{name}") for name in ("waits", "runs")]
    children = [run_darwin("status", folder.uri)["child"] for folder in folders]
    assert weights_of(children[0]) == weights_of(children[1])
    assert not any(PLANTED in path.read_text(errors="ignore") for path in tmp_path.rglob("*.json*"))
