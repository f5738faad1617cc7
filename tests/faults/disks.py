"""Disks that are full: a node's, and the store's."""

from __future__ import annotations

import os
import signal

from tests.faults.host_cluster import NODES, HostCluster
from tests.faults.run import CannotError, LostError, Run
from tests.hosts import Host, Hosts, why_not

ROOM, NO_ROOM = "64M", "64K"
SMALLEST_STORE, LARGEST_STORE = 60, 1800
"""In KiB: from nothing but a few records to all but the end of the child."""


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
    run.ground.leave_cluster()
    store = run.file.parent / "store"
    store.mkdir()
    with Hosts(["machine"]) as hosts:
        machine = hosts["machine"]
        size = run.dice.randint(SMALLEST_STORE, LARGEST_STORE)
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


def mount(host: Host, folder: str, size: str) -> None:
    host.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
