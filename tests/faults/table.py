"""Scenarios made to run, and the table of what became of them."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import disks, drivers, machines, stores, workers
from tests.faults.ground import Ground
from tests.faults.run import CannotError, Expected, LostError, Run, Verdict


@dataclass(frozen=True)
class Scenario:
    """How something breaks; `title` is its line in the table."""

    title: str
    play: Callable[[Run], None]
    runs: int
    alone: bool = False
    """Whether each driver has a Ray of its own, and not the shared cluster."""


SCENARIOS = {
    "driver-killed": Scenario("driver SIGKILL", drivers.driver_killed, 5),
    "worker-killed": Scenario("worker SIGKILL", workers.worker_killed, 3),
    "worker-frozen": Scenario("a worker hangs (SIGSTOP)", workers.worker_frozen, 2),
    "out-of-memory": Scenario("a worker runs out of memory", workers.out_of_memory, 2),
    "store-troubled": Scenario(
        "a fifth of all S3 requests fails", stores.store_troubled, 2, alone=True
    ),
    "lease-raced": Scenario("three drivers race for the lease", drivers.lease_raced, 2, alone=True),
    "driver-overtaken": Scenario(
        "a frozen driver is overtaken, and wakes", drivers.driver_overtaken, 2, alone=True
    ),
    "store-full": Scenario("the store's disk is full", disks.store_full, 3, alone=True),
    "raylet-killed": Scenario("raylet SIGKILL", machines.raylet_killed, 2, alone=True),
    "power-lost": Scenario("a node loses its power", machines.power_lost, 2, alone=True),
    "head-lost": Scenario(
        "the head is lost, with driver and GCS; a new cluster", machines.head_lost, 2, alone=True
    ),
    "store-out-of-reach": Scenario(
        "a partition between a node and the store", machines.store_out_of_reach, 3, alone=True
    ),
    "node-cut-off": Scenario(
        "a node is cut off, works on, and comes back", machines.node_cut_off, 2, alone=True
    ),
    "disk-full": Scenario(
        "a node's disk is full from the start", disks.disk_full_at_start, 2, alone=True
    ),
    "disk-full-later": Scenario(
        "a node's disk fills up, and its worker dies", disks.disk_full_later, 2, alone=True
    ),
    "clocks-wrong": Scenario("clocks differ by days", machines.clocks_wrong, 2, alone=True),
}

HEAD = """\
| scenario | campaigns | breaks | lost | items scored again | children equal |
| --- | --- | --- | --- | --- | --- |"""


def play(ground: Ground, scenario: Scenario, dice: random.Random) -> Verdict:
    """One run of a scenario, judged. Raises `CannotError` if it cannot be played here."""
    assert ground.expected  # that campaign runs alone
    run = ground.run(dice, alone=scenario.alone)
    lost = None
    try:
        scenario.play(run)
    except LostError as error:
        lost = str(error)
    return run.judge(lost)


def row(title: str, verdicts: list[Verdict]) -> str:
    """The scenario's line of the table."""
    equal = sum(verdict.equal for verdict in verdicts)
    cells = (
        title,
        len(verdicts),
        sum(verdict.breaks for verdict in verdicts),
        sum(verdict.lost is not None for verdict in verdicts),
        sum(verdict.repeated for verdict in verdicts),
        f"{equal} of {len(verdicts)}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def play_all(
    names: list[str], runs: int | None, seed: int, expected: Expected | None = None
) -> bool:
    """Play the scenarios and print the table; whether every run was sound."""
    sound = True
    print(HEAD, flush=True)
    with Ground(expected) as ground:
        for name in names:
            scenario = SCENARIOS[name]
            verdicts = []
            try:
                for number in range(scenario.runs if runs is None else runs):
                    started = time.monotonic()
                    verdict = play(ground, scenario, random.Random(f"{seed} {name} {number}"))
                    verdicts.append(verdict)
                    sound &= verdict.sound
                    took = f"{time.monotonic() - started:.0f} s"
                    print(f"{name} {number}: {took}, {verdict}", file=sys.stderr, flush=True)
            except CannotError as error:
                print(f"| {scenario.title} | not here: {error} | | | | |", flush=True)
            else:
                print(row(scenario.title, verdicts), flush=True)
    return sound
