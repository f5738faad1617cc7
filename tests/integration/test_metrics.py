"""What a real campaign tells Prometheus, its log and its ledger while a worker is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from orchestrator.config import SHIPPED
from orchestrator.watching.metrics import METRICS
from tests.campaigns import (
    count_records,
    ray_processes,
    records,
    run_darwin,
    start_darwin,
    wait_for,
    write_campaign,
)
from tests.ray_cluster import ENVIRONMENT as RAY_ENVIRONMENT
from workers.storage import open_store

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 << 20},
)
import ray
ray.init(cluster.address, log_to_driver=False)
(node,) = ray.nodes()
ray.shutdown()
address = node["NodeManagerAddress"]
print("cluster", cluster.address, f"http://{address}:{node['MetricsExportPort']}", node["NodeID"], flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


ENVIRONMENT = RAY_ENVIRONMENT | {"RAY_metrics_report_interval_ms": "1000"}
"""Metrics come ten times as often as usual."""


@pytest.fixture
def cluster() -> Iterator[tuple[int, str, str, str]]:
    """A node: the process that holds it, its address, where it serves metrics, and its id."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("cluster "))
    _, address, metrics, node = line.split()
    yield process.pid, address, metrics, node
    process.communicate("end\n", timeout=60)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Undone after the test, however it ends."""
    with ExitStack() as stack:
        yield stack


def test_a_campaign_that_loses_a_worker_is_watched(
    cluster: tuple[int, str, str, str], tmp_path: Path, stack: ExitStack
) -> None:
    """The campaign goes on until all metrics have come."""
    process_id, address, metrics_place, node = cluster
    began = time.monotonic()
    file = write_campaign(
        tmp_path,
        address=address,
        search={"optimizer": "random", "evaluations": 100_000, "population": 8},
        workers={"count": 2, "cpus": 0.5},
        cost={"per_hour": 3600.0},
    )
    log = tmp_path / "log.jsonl"
    environment = os.environ | ENVIRONMENT
    driver = start_darwin("run", str(file), "--log", str(log), environment=environment)
    stack.callback(driver.kill)
    store = open_store(str(tmp_path / "store" / "small"))
    wait_for(lambda: count_records(store, "scored") > 6, driver)
    os.kill(ray_processes("EvaluationWorker", process_id)[0], signal.SIGKILL)
    wait_for(lambda: count_records(store, "failed") > 0, driver)
    wanted = {metric.served_as for metric in METRICS}
    served: dict[str, str] = {}

    def all_are_served() -> bool:
        with suppress(OSError):
            text = urllib.request.urlopen(f"{metrics_place}/metrics", timeout=5).read().decode()
            served.update(re.findall(r"^(ray_darwin_\w+)(\{.*)$", text, re.MULTILINE))
        names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in served}
        time.sleep(0.2)
        return wanted <= names

    wait_for(all_are_served, driver)
    assert all('campaign="small"' in line for line in served.values())
    dashboard = (SHIPPED / "cluster" / "grafana.json").read_text()
    assert set(re.findall(r"ray_darwin_\w+?(?=\{)", dashboard)) <= served.keys()
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=60)
    lasted = time.monotonic() - began

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert (lines[-1]["event"], lines[-1]["status"]) == ("ended", "interrupted")
    workers = [line for line in lines if line["event"] == "worker"]
    assert [line["state"] for line in workers].count("replaced") == 1
    assert {line["node"] for line in workers if line["state"] == "in service"} == {node}
    assert {line["node"] for line in lines if line["event"] == "scored"} == {node}

    cost = run_darwin("status", store.uri)["cost"]
    assert cost["unit"] == "CPU"
    assert 0 < cost["used_for"]["failed"] <= cost["used_seconds"] <= cost["reserved_seconds"]
    assert cost["reserved_seconds"] == pytest.approx(0.5 * cost["worker_seconds"], abs=0.1)
    assert cost["worker_seconds"] < 2 * lasted
    scored = sum(
        record["realize_seconds"] + record["score_seconds"]
        for record in records(store)
        if record["kind"] == "scored"
    )
    assert cost["used_seconds"] - cost["used_for"]["failed"] == pytest.approx(0.5 * scored, abs=0.1)
    assert cost["money"] == pytest.approx(cost["worker_seconds"], abs=0.01)
