"""Nodes that are lost, cut off, short of disk or wrong about the time, each with a network of its own."""

from __future__ import annotations

import glob
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from tests.campaigns import SKILLS
from tests.faults.ground import CannotError, LostError, Run
from tests.hosts import Host, Hosts, why_not
from tests.ray_cluster import ENVIRONMENT
from tests.servers import S3Server, seaweedfs_server
from workers.storage import open_store

NODES = ("node1", "node2")
PORT = 6379
LOSSES = 2
LONGEST_CUT_SECONDS = 20.0
"""Longer than a lease lives without a beat."""

ZOMBIE_SECONDS = 9.0
"""Long enough for Ray to give a node up that then comes back."""

SKEW_DAYS = 2
CLOCK_LIBRARIES = "/usr/lib/*/faketime/libfaketime.so.1"
ROOM, NO_ROOM = "64M", "64K"
RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats")
REAPED = ("raylet", "gcs_server")


class HostCluster:
    """A head without CPUs where the driver is too, nodes with a CPU each, and perhaps an S3 server, each on
    a host of its own. A context manager. `clocks` says for each host by how much its clock is wrong."""

    def __init__(
        self, run: Run, *, s3: bool = False, clocks: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        if why_not() is not None:
            raise CannotError(str(why_not()))
        assert run.ground.expected  # before its cluster makes room for this one
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
        self._ray("head", "--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false")
        for starting in [self._join(name) for name in NODES]:
            out, err = starting.communicate(timeout=300)
            assert starting.returncode == 0, out + err

    def join(self, name: str) -> None:
        """Make a host a node of the cluster."""
        out, err = (starting := self._join(name)).communicate(timeout=300)
        assert starting.returncode == 0, out + err

    def _join(self, name: str) -> subprocess.Popen[str]:
        return self._start_ray(name, f"--address={self.address}", "--num-cpus=1")

    def _ray(self, name: str, *options: str) -> None:
        out, err = (starting := self._start_ray(name, *options)).communicate(timeout=300)
        assert starting.returncode == 0, out + err

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
            environment=self.environment | self._clocks.get(name, {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def kill_raylet(self, name: str) -> None:
        """SIGKILL of a node's raylet. What it has started ends by itself."""
        for process in self.hosts[name].processes("raylet"):
            os.kill(process, signal.SIGKILL)

    def restart(self) -> None:
        """All hosts lose their power and come back, with an empty cluster."""
        for name in ("head", *NODES):
            self.hosts[name].lose_power()
        for name in ("head", *NODES):
            self.hosts.power_on(name)
        self.start_ray()

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


def raylet_killed(run: Run) -> None:
    """SIGKILL of a node's raylet, and a new one after a while."""
    with HostCluster(run) as cluster:
        driver = cluster.driver()
        for point in run.points(LOSSES):
            if run.reach(point, driver):
                lost = run.dice.choice(NODES)
                cluster.kill_raylet(lost)
                run.broke()
                cluster.join(lost)
        run.end(driver)


def power_lost(run: Run) -> None:
    """A node loses its power; a moment later it is back, as a new one."""
    with HostCluster(run) as cluster:
        driver = cluster.driver()
        for point in run.points(LOSSES):
            if run.reach(point, driver):
                lost = run.dice.choice(NODES)
                cluster.hosts[lost].lose_power()
                run.broke()
                cluster.hosts.power_on(lost)
                cluster.join(lost)
        run.end(driver)


def head_lost(run: Run) -> None:
    """The head loses its power, with the driver and all that Ray knows; a new cluster goes on."""
    with HostCluster(run) as cluster:
        for point in run.points(LOSSES):
            driver = cluster.driver()
            if run.reach(point, driver):
                cluster.hosts["head"].lose_power()
                run.broke()
                cluster.restart()
            run.kill(driver)
        run.end(cluster.driver())


def store_out_of_reach(run: Run) -> None:
    """Nothing comes through between the store and a node, or the driver, for a while; all else is well."""
    with HostCluster(run, s3=True) as cluster:
        store = cluster.hosts["store"]
        driver = cluster.driver()
        for point in run.points(LOSSES):
            if run.reach(point, driver):
                name = run.dice.choice(("head", *NODES))
                route = ("blackhole", f"{cluster.hosts[name].address}/32")
                store.run("ip", "route", "add", *route)
                time.sleep(run.dice.uniform(1.0, LONGEST_CUT_SECONDS))
                store.run("ip", "route", "del", *route)
                run.broke()
        run.end(driver)


def node_cut_off(run: Run) -> None:
    """A node is cut off for so long that Ray gives it up, while it works on, and comes back."""
    with HostCluster(run, s3=True) as cluster:
        driver = cluster.driver()
        (point,) = run.points(1)
        if run.reach(point, driver):
            host = cluster.hosts[run.dice.choice(NODES)]
            host.cut_off()
            time.sleep(ZOMBIE_SECONDS)
            host.plug_in()
            run.broke()
        run.end(driver)


def disk_full_at_start(run: Run) -> None:
    """A node has no room for the copies of the parents that its worker wants."""
    with HostCluster(run, s3=True) as cluster:
        mount(cluster.hosts[NODES[0]], run.cache(), ROOM)
        mount(cluster.hosts[NODES[1]], run.cache(), NO_ROOM)
        run.broke()
        run.end(cluster.driver())


def disk_full_later(run: Run) -> None:
    """A node's worker dies, and there is no room any more for the copies that its successor wants."""
    with HostCluster(run, s3=True) as cluster:
        for name in NODES:
            mount(cluster.hosts[name], run.cache(), ROOM)
        driver = cluster.driver()
        (point,) = run.points(1)
        if run.reach(point, driver):
            lost = cluster.hosts[run.dice.choice(NODES)]
            fill = f"rm -rf {run.cache()}/*; head -c {ROOM} /dev/zero > {run.cache()}/full"
            lost.run("bash", "-c", f"{fill} 2> /dev/null || true")
            for worker in lost.processes("ray::EvaluationWorker"):
                os.kill(worker, signal.SIGKILL)
            run.broke()
        run.end(driver)


def store_full(run: Run) -> None:
    """The store has no room: the driver says so and ends, and goes on when there is room."""
    if why_not() is not None:
        raise CannotError(str(why_not()))
    assert run.ground.expected
    run.ground.leave_cluster()
    store = run.file.parent / "store"
    store.mkdir()
    with Hosts(["machine"]) as hosts:
        machine = hosts["machine"]
        size = run.dice.randint(60, 1800)
        mount(machine, str(store), f"{size}k")
        driver = run.start(host=machine)
        code = run.end(driver, None)
        if code != 0:
            if "No space left on device" not in run.said(driver):
                raise LostError(f"ended with {code}: {run.said(driver)}")
            run.broke()
            machine.run("mount", "-o", f"remount,size={ROOM}", str(store))
            run.end(run.start(host=machine))
        keep = run.file.parent / "kept"
        machine.run("cp", "-a", str(store), str(keep))
    run.look_at(f"{keep}/small")


def clocks_wrong(run: Run) -> None:
    """A driver whose clock is days ahead dies, one whose clock is days behind goes on; nodes differ too."""
    libraries = sorted(glob.glob(os.environ.get("FAKETIME_LIBRARY", CLOCK_LIBRARIES)))
    if not libraries:
        raise CannotError("there is no libfaketime (Debian's `faketime`)")
    shared = {"LD_PRELOAD": libraries[0], "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}

    def wrong(days: int) -> dict[str, str]:
        return shared | {"FAKETIME": f"{days:+d}d"}

    clocks = {"node1": wrong(SKEW_DAYS), "node2": wrong(-SKEW_DAYS)}
    with HostCluster(run, clocks=clocks) as cluster:
        head = cluster.hosts["head"]
        (point,) = run.points(1)
        address = f"address={cluster.address}"
        driver = run.start(address, host=head, environment=wrong(SKEW_DAYS))
        if run.reach(point, driver) and run.kill(driver):
            run.broke()
        run.end(run.start(address, host=head, environment=wrong(-SKEW_DAYS)))


def mount(host: Host, folder: str, size: str) -> None:
    host.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
