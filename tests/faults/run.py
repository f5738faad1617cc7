"""One campaign that is broken: its drivers, its ledger as it grows, and what has become of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.ledger.ledger import FOLDER, Ledger, Record
from tests.campaigns import digests, records, scored_items
from tests.hosts import Host
from workers.storage import Store, open_store

if TYPE_CHECKING:
    from tests.faults.ground import Ground

PATIENCE_SECONDS = 900.0
"""So long a driver may take before its campaign counts as lost: far more than it needs on a busy machine."""

LOOK_SECONDS = 0.01
SAYS = 2000
"""Characters of a lost driver's last words."""

Items = list[tuple[str, str, str, str]]


class LostError(Exception):
    """A campaign does not come to its end."""


class CannotError(Exception):
    """This machine cannot break things in a scenario's way, for the reason given."""


@dataclass(frozen=True)
class Expected:
    """What the undisturbed campaign came to."""

    child: dict[str, str]
    """SHA-256 of each file."""
    items: Items
    """Every item that was scored, in order of its name."""
    records: int
    """How many the ledger has."""


@dataclass(frozen=True)
class Verdict:
    """What became of one run."""

    breaks: int
    lost: str | None
    """Why the campaign did not come to its end; None if it did."""
    repeated: int = 0
    """Items whose result is in the ledger more than once: scored again when they were no longer in flight."""
    missing: int = 0
    """Items that the undisturbed campaign has scored and this one has not, and the other way round."""
    equal: bool = False
    """Whether the child has the bytes of the undisturbed one."""
    overtaken: int = 0
    """Records that a driver has written after a later one had begun to."""

    @property
    def sound(self) -> bool:
        return (
            self.lost is None
            and self.equal
            and not (self.repeated or self.missing or self.overtaken)
        )


@dataclass
class Run:
    """One campaign, and the drivers that run it."""

    file: Path
    location: str
    environment: Mapping[str, str]
    """What its drivers have set besides this process's own."""
    eyes: Callable[[], AbstractContextManager[object]]
    """The network in which its store can be reached."""
    ground: Ground
    dice: random.Random
    breaks: int = 0
    drivers: list[subprocess.Popen[str]] = field(default_factory=list)
    _judged: Verdict | None = None
    _store: Store | None = None

    def broke(self) -> None:
        """Count a break that came to pass."""
        self.breaks += 1

    def start(
        self,
        *overrides: str,
        host: Host | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """A driver, here or on a host."""
        command = [sys.executable, "-m", "orchestrator.cli", "run", str(self.file), "--json"]
        own = {"HF_HUB_OFFLINE": "1", **self.environment, **(environment or {})}
        with open(self._log(len(self.drivers)), "w") as log:
            options: dict[str, Any] = {"stdout": log, "stderr": log}
            if host is not None:
                driver = host.start(*command, *overrides, environment=own, **options)
            else:
                driver = subprocess.Popen(
                    [*command, *overrides], env=os.environ | own, text=True, **options
                )
        self.drivers.append(driver)
        return driver

    def cache(self) -> str:
        """A folder for nodes' copies of the parents that no other run has used."""
        folder = self.file.parent / "cache"
        folder.mkdir(exist_ok=True)
        return str(folder)

    def _log(self, number: int) -> Path:
        return self.file.parent / f"driver-{number}.log"

    def said(self, driver: subprocess.Popen[str]) -> str:
        """What a driver has printed so far."""
        return self._log(self.drivers.index(driver)).read_text(errors="replace")

    def end(self, driver: subprocess.Popen[str], expect: int | None = 0) -> int:
        """Let a driver come to its end, and check what it ended with, unless `expect` is None."""
        try:
            code = driver.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise LostError(
                f"no end after {PATIENCE_SECONDS:.0f} s: {self._tail(driver)}"
            ) from None
        said = self.said(driver)
        if "Traceback" in said or (expect is not None and code != expect):
            raise LostError(f"ended with {code}: {self._tail(driver)}")
        return code

    def _tail(self, driver: subprocess.Popen[str]) -> str:
        return " ".join(self.said(driver)[-SAYS:].split())

    def await_that(
        self, condition: Callable[[], bool], driver: subprocess.Popen[str] | None = None
    ) -> bool:
        """Wait until the condition holds; False if `driver` ends before that."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if driver is not None and driver.poll() is not None:
                return condition()
            if time.monotonic() > deadline:
                raise LostError("waited in vain" + (self._tail(driver) if driver else ""))
            time.sleep(LOOK_SECONDS)
        return True

    def records(self) -> list[Record]:
        """The ledger as it stands."""
        with self._looking() as store:
            return records(store)

    def written(self) -> int:
        """How many records there are: of so few each is an object."""
        with self._looking() as store:
            return sum(1 for _ in store.list_objects(f"{FOLDER}/"))

    def reach(self, number: int, driver: subprocess.Popen[str]) -> bool:
        """Wait until the ledger has so many records, and a moment longer; whether the driver still runs."""
        if not self.await_that(lambda: self.written() >= number, driver):
            return False
        time.sleep(self.dice.uniform(0.0, 0.3))
        return driver.poll() is None

    def points(self, count: int) -> list[int]:
        """Drawn points of the campaign, as numbers of records, in order."""
        whole = self.ground.expected.records
        return sorted(self.dice.choices(range(1, whole), k=count))

    def kill(self, driver: subprocess.Popen[str]) -> bool:
        """SIGKILL; whether the driver was still running."""
        running = driver.poll() is None
        if running:
            for process in (
                *_children(driver.pid),
                driver.pid,
            ):  # of a driver on a host, nsenter's child
                _signal(process, signal.SIGKILL)
        driver.wait()
        return running

    def finish(self) -> None:
        """Run it to its end, undisturbed from now on."""
        self.end(self.start())

    def move_to(
        self,
        location: str,
        parents: list[dict[str, Any]],
        eyes: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Keep the campaign, which has not begun, in another store, and read the parents from there."""
        campaign = yaml.safe_load(self.file.read_text()) | {"store": location, "parents": parents}
        self.file.write_text(yaml.safe_dump(campaign))
        self.look_at(f"{location}/small", eyes)

    def look_at(
        self, location: str, eyes: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        """Say where the campaign is from now on, and in which network."""
        self.location, self.eyes, self._store = location, eyes, None

    @contextmanager
    def _looking(self) -> Iterator[Store]:
        with self.eyes():
            if self._store is None:
                self._store = open_store(self.location)
            yield self._store

    def judge_early(self) -> None:
        """Judge the campaign as it is now, if it has ended: nobody can reach its store later."""
        with self._looking() as store:
            if Ledger(store).result() is not None:
                self._judged = self._judge()

    def judge(self, lost: str | None) -> Verdict:
        """What has become of it."""
        for driver in self.drivers:
            self.kill(driver)
        if lost is not None:
            return Verdict(self.breaks, lost)
        return replace(self._judged or self._judge(), breaks=self.breaks)

    def _judge(self) -> Verdict:
        expected = self.ground.expected
        with self._looking() as store:
            ledger = records(store)
            result = Ledger(store).result()
            if result is None:
                return Verdict(self.breaks, "the ledger has no end")
            items = scored_items(ledger)
            child = digests(result["child"])
        epochs = [record["epoch"] for record in ledger]
        return Verdict(
            self.breaks,
            None,
            repeated=len(items) - len(set(items)),
            missing=len(set(items) ^ set(expected.items)),
            equal=child == expected.child,
            overtaken=sum(e < max(epochs[:n], default=0) for n, e in enumerate(epochs)),
        )


def _children(process: int) -> list[int]:
    try:
        return [
            int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:
        return []


def _signal(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)
