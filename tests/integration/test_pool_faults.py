"""A pool whose nodes are lost, frozen and told to go, on a real cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.ray_cluster import ENVIRONMENT, RayCluster, parent_of, processes

PATIENCE_SECONDS = 90.0

DRIVER = """
import json, sys, threading, time
from pathlib import Path
import orchestrator.pool.attempts as attempts
import orchestrator.pool.heartbeat as heartbeat
import workers.evaluation_worker
from orchestrator.workers_config import WorkersConfig
from orchestrator.pool.pool import Job, Pool
from tests.unreliable_worker import UnreliableWorker
from workers.merging import ParentReference, Recipe

address, folder = sys.argv[1:]
attempts.ATTEMPTS = 1
heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS = 0.5, 4.0
workers.evaluation_worker.EvaluationWorker = UnreliableWorker
plan = {"folder": folder, "fates": {0: "waits"}, "slices": 9}
spec = workers.evaluation_worker.WorkerSpec({}, None, {}, engine=plan)
recipe = Recipe((ParentReference("a", "0" * 64), ParentReference("b", "1" * 64)), (), None, 0)
def tell_of_drain(watch):
    while not watch.is_leaving(tuple(watch._draining)):
        time.sleep(0.05)
    Path(folder, "draining").touch()
with Pool(spec, WorkersConfig(count=1), address, lambda found: None) as pool:
    threading.Thread(target=tell_of_drain, args=(pool._crew.watch,), daemon=True).start()
    for step in pool.run([Job(recipe.id, recipe, "search")]):
        print("step", json.dumps([step.error, step.given_up]), flush=True)
"""
"""A pool of one worker and one candidate, which one failure that counts is enough to give up."""


def await_file(file: Path) -> str:
    pause = threading.Event()
    for _ in range(int(PATIENCE_SECONDS / 0.05)):
        if file.exists():
            return file.read_text()
        pause.wait(0.05)
    raise AssertionError(f"there is no {file.name}")


def join(cluster: RayCluster) -> subprocess.Popen[str]:
    """A node as it is started on a machine of its own; it ends when it is told to, or Ray does."""
    ray = str(Path(sys.executable).with_name("ray"))
    options = ["--num-cpus=1", "--object-store-memory=80000000", "--block"]
    return subprocess.Popen(
        [ray, "start", f"--address={cluster.address}", *options],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_only_what_a_worker_does_itself_counts_against_a_candidate(tmp_path: Path) -> None:
    with RayCluster(2) as cluster:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, cluster.address, str(tmp_path)],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        node: Any = None

        def next_place(tries: int) -> tuple[int, int]:
            """The process that waits in this try, and its raylet."""
            process, raylet = await_file(tmp_path / f"waits-{tries}").split()
            return int(process), int(raylet)

        try:
            _, first = next_place(1)
            cluster.kill_node(first)
            _, second = next_place(2)
            assert second in cluster.raylets
            node = join(cluster)
            cluster.kill_node(second)
            frozen, third = next_place(3)
            assert third not in (first, second)
            os.kill(frozen, signal.SIGSTOP)
            _, fourth = next_place(4)
            assert fourth == third
            assert frozen not in processes()
            cluster.add_node()
            node.send_signal(signal.SIGTERM)
            await_file(tmp_path / "draining")
            # The node goes as soon as nobody works on it, and Ray gives it 30 s.
            (tmp_path / "slice-0").touch()
            last, fifth = next_place(5)
            assert [fifth] == cluster.raylets
            node.wait(timeout=25)
            assert parent_of(third) is None
            os.kill(last, signal.SIGKILL)
            out, err = driver.communicate(timeout=PATIENCE_SECONDS)
        finally:
            driver.kill()
            if node is not None:
                node.kill()
    assert driver.returncode == 0, err
    said = [line.split("step ", 1)[1] for line in out.splitlines() if line.startswith("step ")]
    steps = [json.loads(line) for line in said]  # Ray prints there, too
    errors = [error and error.split(":")[0] for error, _ in steps]
    lost = {"ActorDiedError", "ActorUnavailableError"}
    assert errors[0] in lost and errors[1] in lost
    assert errors[2:] == ["SilentError", None, "ActorDiedError"]
    assert [given_up for _, given_up in steps] == [False] * 4 + [True]
