"""Nodes that are lost, cut off or wrong about the time."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.faults.host_cluster import NODES, HostCluster
from tests.faults.run import LostError, Run

LOSSES = 2
LONGEST_CUT_SECONDS = 20.0
"""Longer than a lease lives without a beat."""

ZOMBIE_SECONDS = 9.0
"""Long enough for Ray to give a node up that then comes back."""

SKEW_DAYS = 2
DAY_SECONDS = 24 * 3600


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


def clocks_wrong(run: Run) -> None:
    """A driver whose clock is days ahead dies, one whose clock is days behind goes on; nodes differ too."""
    clocks = {"node1": wrong_by(SKEW_DAYS), "node2": wrong_by(-SKEW_DAYS)}
    with HostCluster(run, clocks=clocks) as cluster:
        head = cluster.hosts["head"]
        (point,) = run.points(1)
        address = f"address={cluster.address}"
        driver = run.start(address, host=head, environment=wrong_by(SKEW_DAYS))
        if run.reach(point, driver) and run.kill(driver):
            run.broke()
        run.end(run.start(address, host=head, environment=wrong_by(-SKEW_DAYS)))
    times = [record["time"] for record in run.records()]
    if run.breaks and max(times) - min(times) < DAY_SECONDS * SKEW_DAYS:
        raise LostError("the clocks were right")


def wrong_by(days: int) -> dict[str, str]:
    """The environment of a process whose clock is wrong by so many days."""
    paths = [str(Path(__file__).parent / "wrong_clock"), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "WRONG_BY_SECONDS": str(days * DAY_SECONDS),
    }
