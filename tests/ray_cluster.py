"""A Ray cluster on this machine, in a process of its own: `python -m tests.ray_cluster NODES`.

Prints the address when it is up, and then the process id of each node's raylet; adds a node for each line
that it reads, and ends when its standard input does. Ray reads the environment once in each process, so a
test that joins a cluster in another mode cannot hold one itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "1000",
}
"""What the cluster, and whoever joins it, have set; a lost node is found sooner than usual."""

STARTS = 3
PATIENCE_SECONDS = 60.0
"""So long a cluster may take to end before it is killed."""


class EndedError(Exception):
    """The cluster has not come up, or is gone."""


class RayCluster:
    """A head without CPUs and nodes with one CPU each. A context manager."""

    def __init__(self, nodes: int) -> None:
        for start in range(1, STARTS + 1):
            try:
                self._start(nodes)
                return
            except EndedError:  # a machine with much else to do may be too slow for Ray
                self._process.communicate()
                if start == STARTS:
                    raise

    def _start(self, nodes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_cluster", str(nodes)],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._read("address")
        self.raylets = [int(self._read("raylet")) for _ in range(nodes)]
        """Process ids of the nodes that live."""

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._process.communicate("", timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    @property
    def process_id(self) -> int:
        """Of the process that all nodes, and all that runs on them, descend from."""
        return self._process.pid

    def add_node(self) -> None:
        """One more, with a CPU."""
        assert self._process.stdin is not None
        self._process.stdin.write("add\n")
        self._process.stdin.flush()
        self.raylets.append(int(self._read("raylet")))

    def kill_node(self, raylet: int) -> None:
        """Let one be lost, with all that runs on it."""
        started = [process for process in processes() if parent_of(process) == raylet]
        for process in (raylet, *started):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.raylets.remove(raylet)

    def _read(self, what: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # Ray prints here too
            if line.startswith(f"{what} "):
                return line.split()[1]
        raise EndedError(f"the cluster ended before its {what} was known")


def processes() -> list[int]:
    """Process ids of all that run on this machine."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def parent_of(process: int) -> int | None:
    """The process that started another; None if that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )

    def add_node() -> int:
        node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        return int(node.all_processes["raylet"][0].process.pid)

    raylets = [add_node() for _ in range(int(sys.argv[1]))]
    print("address", cluster.address, flush=True)
    for raylet in raylets:
        print("raylet", raylet, flush=True)
    while sys.stdin.readline():
        print("raylet", add_node(), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
