"""The driver's meter: which workers there are, what Ray reserves for them, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.watching.spending import Seconds

SPENDING_KINDS = frozenset(
    {
        "matching", "prescription", "scored", "failed", "examined", "routed", "child", "publishing",
        "finished", "rejected",
    }
)  # fmt: skip
"""Records that say what was reserved since the one before; a driver that is killed loses what came after."""


@dataclass
class Running:
    """One worker, or gang."""

    needs: Seconds
    """What a second of it is."""
    node: str | None
    since: float
    """By the driver's clock: up to then its time was read."""
    is_there: bool = True


class Meter:
    """Runs from a worker's start until it is replaced, or the driver ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[int, Running] = {}
        """The present worker of each place by its number, or the last one."""
        self._ended = Seconds()
        """What was not read yet of workers that are gone."""

    def apply(self, event: dict[str, Any]) -> None:
        """Take in what the crew tells of a worker: see `Crew.tell`."""
        self._stop(event["worker"])
        if event["state"] == "in service":
            needs = Seconds(event["members"], event["cpus"], event["gpus"])
            began = self._clock() - event["loading_seconds"]
            self._running[event["worker"]] = Running(needs, event["node"], began)

    def _stop(self, number: int) -> None:
        running = self._running.get(number)
        if running is not None and running.is_there:
            self._ended.add(running.needs, max(0.0, self._clock() - running.since))
            running.is_there = False

    def read(self) -> Seconds:
        """What was reserved since the last reading."""
        found, self._ended = self._ended, Seconds()
        now = self._clock()
        for running in self._running.values():
            if running.is_there:
                found.add(running.needs, max(0.0, now - running.since))
                running.since = now
        return found

    def used(self, number: int, seconds: float) -> Seconds:
        """What so many seconds of a worker are, the present one of a place or the last."""
        found = Seconds()
        if number in self._running:
            found.add(self._running[number].needs, seconds)
        return found

    def node(self, number: int) -> str | None:
        """Where the place's worker runs, or ran last."""
        running = self._running.get(number)
        return running.node if running else None
