"""A cluster of Ray whose nodes have networks of their own, and perhaps an S3 server on one more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from tests.campaigns import SKILLS
from tests.faults.run import CannotError, Run
from tests.hosts import Hosts, why_not
from tests.ray_cluster import ENVIRONMENT
from tests.servers import S3Server, seaweedfs_server
from workers.storage import open_store

NODES = ("node1", "node2")
PORT = 6379
STARTS = 3
START_SECONDS = 300.0
RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats")


class HostCluster:
    """A head without CPUs where the driver is too, nodes with a CPU each, and perhaps an S3 server, each on
    a host of its own. A context manager. `clocks` says for each host by how much its clock is wrong."""

    def __init__(
        self, run: Run, *, s3: bool = False, clocks: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        if why_not() is not None:
            raise CannotError(str(why_not()))
        run.ground.leave_cluster()
        self._run = run
        self._has_store = s3
        self._clocks = clocks or {}
        self._ends = ExitStack()
        self.hosts = Hosts(["head", *NODES, *(["store"] if s3 else [])])
        self.environment: dict[str, str] = {}

    def __enter__(self) -> HostCluster:
        with ExitStack() as ends:
            ends.enter_context(self.hosts)
            self.environment = dict(ENVIRONMENT)
            if self._has_store:
                server = ends.enter_context(seaweedfs_server(self.hosts["store"]))
                self.environment |= server.environment
                self._prepare_store(server)
            self._run.environment = self.environment
            self.start_ray()
            self._ends = ends.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for driver in self._run.drivers:
            self._run.kill(driver)
        self._verdict_needs_network()
        self._ends.close()

    def _verdict_needs_network(self) -> None:
        """Judge now what cannot be reached any more when the hosts are gone."""
        if self._has_store:
            self._run.judge_early()

    @property
    def address(self) -> str:
        return f"{self.hosts['head'].address}:{PORT}"

    def driver(self) -> subprocess.Popen[str]:
        """Start a driver on the head."""
        host = self.hosts["head"]
        clock = self._clocks.get("head", {})
        return self._run.start(f"address={self.address}", host=host, environment=clock)

    def start_ray(self) -> None:
        """Ray on all hosts; once more from the beginning if a machine with much else to do was too slow."""
        for _ in range(STARTS):
            if self._start_all():
                return
            self._power_cycle()
        raise CannotError("Ray does not start on the hosts")

    def _start_all(self) -> bool:
        head = ("--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false")
        if not _has_started(self._start_ray("head", *head)):
            return False
        starting = [self._join(name) for name in NODES]
        started = [_has_started(node) for node in starting]  # all of them, also after a failure
        return all(started)

    def join(self, name: str) -> None:
        """Make a host a node of the cluster. The campaign has to go on also if that fails."""
        _has_started(self._join(name))

    def _join(self, name: str) -> subprocess.Popen[str]:
        return self._start_ray(name, f"--address={self.address}", "--num-cpus=1")

    def _start_ray(self, name: str, *options: str) -> subprocess.Popen[str]:
        host = self.hosts[name]
        options = (
            f"--node-ip-address={host.address}",
            f"--object-store-memory={80 << 20}",
            *options,
        )
        return host.start(
            *RAY,
            *options,
            environment={**self.environment, **self._clocks.get(name, {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def kill_raylet(self, name: str) -> None:
        """SIGKILL of a node's raylet. What it has started ends by itself."""
        for process in self.hosts[name].processes("raylet"):
            os.kill(process, signal.SIGKILL)

    def restart(self) -> None:
        """All hosts lose their power and come back, with an empty cluster."""
        self._power_cycle()
        self.start_ray()

    def _power_cycle(self) -> None:
        for name in ("head", *NODES):
            self.hosts[name].lose_power()
        for name in ("head", *NODES):
            self.hosts.power_on(name)

    def _prepare_store(self, server: S3Server) -> None:
        """A bucket with the parents, in which the run keeps its campaign."""
        hosts = self.hosts

        @contextmanager
        def eyes() -> Iterator[None]:
            before = dict(os.environ)
            os.environ.update(server.environment)
            try:
                with hosts["head"].network():
                    yield
            finally:
                os.environ.clear()
                os.environ.update(before)

        self.environment["DARWIN_CACHE"] = self._run.cache()
        with eyes():
            import boto3

            boto3.session.Session().client("s3").create_bucket(Bucket="faults")
            parents = put_parents("s3://faults")
        self._run.move_to("s3://faults", parents, eyes)


def _has_started(starting: subprocess.Popen[str]) -> bool:
    _, said = starting.communicate(timeout=START_SECONDS)
    if starting.returncode != 0:
        print(said, file=sys.stderr)
    return starting.returncode == 0


def put_parents(location: str) -> list[dict[str, Any]]:
    """Copies of the shipped parents in a store; the campaign's `parents`."""
    parents = []
    for name in SKILLS:
        source, target = (
            open_store(f"shipped:strings/{name}"),
            open_store(f"{location}/models/{name}"),
        )
        for info in source.list_objects():
            target.write(info.key, source.read(info.key))
        parents.append({"name": name, "path": target.uri})
    return parents
