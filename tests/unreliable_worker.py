"""A worker that goes wrong as it is told, for the tests of the pool. Ray imports it by this module."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from workers.actors import Actor
from workers.errors import BadInputError
from workers.evaluation_worker import Scored, WorkerSpec


class UnreliableWorker(Actor):
    """Scores one item per recipe; what goes wrong is said by the spec's `engine` and the recipe's seed.

    `folder` counts what all workers of a test did, by files in it.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.folder = Path(spec.engine["folder"])
        self.plan = spec.engine
        self.raylet = os.getppid()
        self.serial = self._count("start")

    def _count(self, what: str) -> int:
        """How often it has happened, this time included."""
        number = 1
        while True:
            try:
                os.close(os.open(self.folder / f"{what}-{number}", os.O_CREAT | os.O_EXCL))
                return number
            except FileExistsError:
                number += 1

    def describe(self) -> dict[str, Any]:
        if self.serial in self.plan.get("bad_starts", ()):
            raise BadInputError("the disk of this machine is full")
        if self.serial in self.plan.get("dead_starts", ()):
            os._exit(1)
        return {}

    def evaluate(
        self, recipe: dict[str, Any], split: str, finished: Any, seconds: float, chosen: Any
    ) -> Scored:
        fate = self.plan.get("fates", {}).get(recipe["seed"])
        tries = self._count(f"try-{recipe['seed']}")
        if fate == "dies" or (fate == "dies once" and tries == 1):
            os._exit(1)
        if fate == "refuses":
            raise BadInputError("there is no such mean")
        if self.serial in self.plan.get("poisoned", ()):
            raise RuntimeError("the device is in disorder")
        done = len(finished.get("t", ()))
        if fate == "waits":
            self._wait_for(f"slice-{done}", tries)
        items = [{"id": f"{recipe['seed']}-{done}"}]
        return Scored({"t": items}, done + 1 >= self.plan.get("slices", 1), 0.0, 0.0)

    def _wait_for(self, file: str, tries: int) -> None:
        """Say in a file which process of which raylet waits, and wait until there is another file."""
        place = self.folder / "waits"
        place.write_text(f"{os.getpid()} {self.raylet}")
        place.replace(self.folder / f"waits-{tries}")
        while not (self.folder / file).exists():
            threading.Event().wait(0.02)

    def long_call(self, value: int) -> int:
        if self._count("call") == 1:
            os._exit(1)
        return value + 1

    def hung_call(self, value: int) -> int:
        while self._count("call") == 1:
            threading.Event().wait()
        return value

    def examine(self, value: int) -> int:
        if self._count("call") == 1:
            threading.Event().wait(self.plan["seconds"])
        return value

    def whereabouts(self, value: int) -> int:
        """The process that started this one: the node's raylet, which may be gone by now."""
        threading.Event().wait(0.05)
        return self.raylet

    def fatal_call(self) -> None:
        os._exit(1)

    def refused_call(self) -> None:
        raise BadInputError("there is no such tensor")
