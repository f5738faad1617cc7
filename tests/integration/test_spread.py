"""Workers on nodes of their own: where they are, what becomes of a lost node's place, and what cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ray_cluster import ENVIRONMENT, RayCluster

NODES = 3

DRIVER = """
import json, sys
import orchestrator.pool.crew as crew
import workers.actors
import workers.evaluation_worker
from orchestrator.workers_config import WorkersConfig
from orchestrator.errors import PoolError
from orchestrator.pool.pool import Pool
from tests.unreliable_worker import UnreliableWorker

address, count, start_seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
crew.START_SECONDS, crew.FIRST_REST_SECONDS = start_seconds, 0.1
workers.actors.MergeWorker = UnreliableWorker
spec = workers.evaluation_worker.WorkerSpec({}, None, {}, engine={"folder": sys.argv[4]})
workers.evaluation_worker.EvaluationWorker = UnreliableWorker
try:
    with Pool(spec, WorkersConfig(count=count, placement="strict"), address, lambda found: None) as pool:
        for line in sys.stdin:
            calls = [(number,) for number in range(3 * count)]
            preferred = [number % count for number, in calls]
            found = [result for _, result in sorted(pool.each("whereabouts", calls, preferred))]
            print("found", json.dumps(found), flush=True)
except PoolError as error:
    print(error, flush=True)
"""
"""A pool of workers that say where they run, in three calls each, whenever a line comes in."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster(NODES) as cluster:
        yield cluster


def start_driver(cluster: RayCluster, count: int, seconds: float, folder: Any) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster.address, str(count), str(seconds), str(folder)],
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ask(driver: Any) -> list[int]:
    """Process ids of the raylets where the next calls run."""
    driver.stdin.write("go\n")
    driver.stdin.flush()
    for line in driver.stdout:
        if line.startswith("found "):
            found: list[int] = json.loads(line.removeprefix("found "))
            return found
    raise AssertionError(f"the driver ended: {driver.stderr.read()}")


def test_each_worker_has_a_node_and_a_lost_one_is_replaced(
    cluster: RayCluster, tmp_path: Any
) -> None:
    driver = start_driver(cluster, NODES, 120.0, tmp_path)
    try:
        while len(set(ask(driver))) < NODES:  # one may start when the others are through
            pass
        before = ask(driver)
        assert set(before) == set(cluster.raylets)
        lost = before[0]
        cluster.kill_node(lost)
        during = ask(driver)
        assert len(during) == 3 * NODES
        while set(during) != set(cluster.raylets):
            assert set(during) <= {lost, *cluster.raylets}
            during = ask(driver)
        cluster.add_node()
        while set(ask(driver)) != set(cluster.raylets):
            pass
        after = ask(driver)
        assert {node for node in before if node != lost} < set(after)
    finally:
        out, err = driver.communicate()
    assert driver.returncode == 0, out + err


def test_what_a_cluster_has_too_little_of_is_named(cluster: RayCluster, tmp_path: Any) -> None:
    driver = start_driver(cluster, NODES + 2, 2.0, tmp_path)
    out, err = driver.communicate("go\n", timeout=120)
    asked = (
        f"workers.placement: strict needs {NODES + 2} nodes with 1 CPUs and 0 GPUs each; the cluster has "
        f"{NODES} such nodes among {NODES + 1}"
    )
    assert f"waiting for nodes: {asked}" in err
    assert out.strip() == f"no worker has been in service for 2 s: {asked}"
