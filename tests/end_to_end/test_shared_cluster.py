"""Campaigns that share a cluster, and nodes that join and leave it: who has workers, and where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ray_cluster import ENVIRONMENT, RayCluster

DRIVER = """
import json, sys, time
from pathlib import Path
import orchestrator.pool.crew as crew
import orchestrator.pool.shared_places as shared_places
import orchestrator.pool.board as board
import workers.actors
import workers.evaluation_worker
from orchestrator.pool.pool import Job, Pool
from orchestrator.workers_config import WorkersConfig
from workers.merging import ParentReference, Recipe

class Worker(workers.actors.MergeWorker):
    def describe(self):
        return {}

    def evaluate(self, recipe, split, finished, seconds, chosen):
        time.sleep(0.1)
        number = len(finished.get("t", ()))
        return workers.evaluation_worker.Scored({"t": [{"id": str(number)}]}, number == 2, 0.0, 0.0)

address, stop, count, priority = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
crew.FIRST_REST_SECONDS, board.POST_SECONDS = 0.1, 0.2
shared_places.PATIENCE_SECONDS, shared_places.GRACE_SECONDS = 3.0, 5.0
workers.evaluation_worker.EvaluationWorker = Worker
spec = workers.evaluation_worker.WorkerSpec({}, None, {})
parents = (ParentReference("a", "0" * 64), ParentReference("b", "1" * 64))
asked = 0

def supply():
    global asked
    if stop.exists():
        return None
    asked += 1
    recipe = Recipe(parents, (), None, asked)
    return Job(recipe.id, recipe, "search")

with Pool(spec, WorkersConfig(count=count), address, lambda found: None, priority) as pool:
    for progress in pool.run((), supply):
        items = [item["id"] for item in progress.scored.items["t"]] if progress.scored else []
        at = [worker.number for worker in pool._workers if worker.in_service]
        line = {"job": progress.job.recipe.seed, "items": items, "error": progress.error, "at": at}
        print(json.dumps(line), flush=True)
print(json.dumps({"asked": asked}), flush=True)
"""
"""A pool whose candidates have three items, each in a call of its own, until the file `stop` is there."""


class Driver:
    """One that runs until it is told to stop."""

    def __init__(self, address: str, stop: Path, count: int, priority: int) -> None:
        self._stop = stop
        self.lines: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, address, str(stop), str(count), str(priority)],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Read on until a line says so."""
        assert self._process.stdout is not None and self._process.stderr is not None
        for line in self._process.stdout:
            if not line.startswith("{"):  # Ray prints here too
                continue
            self.lines.append(json.loads(line))
            if condition(self.lines[-1]):
                return
        raise AssertionError(f"the driver ended: {self._process.stderr.read()}")

    def has_workers(self, count: int) -> None:
        """Wait until so many are in service."""
        self.until(lambda line: len(line["at"]) == count)

    def end(self) -> None:
        """Let it finish what it has begun, and check that nothing was lost on the way."""
        self._stop.touch()
        self.until(lambda line: "asked" in line)
        self.close()
        *progress, last = self.lines
        found = Counter((line["job"], item) for line in progress for item in line["items"])
        assert set(found) == {(job + 1, str(n)) for job in range(last["asked"]) for n in range(3)}
        assert set(found.values()) == {1}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_places_follow_nodes_and_priorities(tmp_path: Path) -> None:
    """A campaign with more places than there is room for uses a node that joins, does not miss one that is
    lost, makes room for one of higher priority, and takes it back when that is through."""
    with RayCluster(2) as cluster:
        low = Driver(cluster.address, tmp_path / "low", 3, 0)
        high = None
        try:
            low.has_workers(2)
            cluster.add_node()
            low.has_workers(3)
            cluster.kill_node(cluster.raylets[-1])
            low.has_workers(2)
            high = Driver(cluster.address, tmp_path / "high", 1, 1)
            low.has_workers(1)
            high.has_workers(1)
            high.end()
            low.has_workers(2)
            low.end()
        finally:
            low.close()
            if high is not None:
                high.close()
