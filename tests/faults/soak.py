"""`python -m tests.faults.soak [--minutes M] [--seed S]`: campaign after campaign, broken in all these ways.

What breaks next, and when, comes from the seed; so long as the machine is equally fast, the same seed
breaks the same things. No new break comes after the given time: the campaign then goes on to its end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from tests.fault_proxy import FaultProxy
from tests.faults.ground import Ground
from tests.faults.host_cluster import put_parents
from tests.faults.run import LostError, Run, Verdict
from tests.faults.stores import FAULTS
from tests.faults.table import HEAD, row
from tests.faults.workers import engines

MOST_RECORDS = 12
"""Of the ledger that may come until the next break."""

MOST_DEATHS = 2
"""Of workers for each campaign: a candidate that has failed three times is given up, and the search is
another one from there on."""

LONGEST_PAUSE_SECONDS = 3.0
TROUBLED_SHARE = 0.05
"""Of the requests to the S3 server."""

DONE, BAD_INPUT = 0, 2


class Soak:
    """One campaign that is broken in turn by whatever is drawn."""

    def __init__(self, run: Run, until: float, least: int) -> None:
        self.run = run
        self._until = until
        self._least = least
        self.deaths = 0
        self.driver: subprocess.Popen[str] = run.start()
        self.kinds: list[Callable[[], bool]] = [
            self.kill_driver,
            self.kill_worker,
            self.kill_node,
            self.pause_worker,
            self.pause_driver,
            self.start_second,
        ]

    def play(self) -> None:
        """Break it until the time is over, and bring it to its end."""
        while not self._is_over():
            wanted = self.run.written() + self.run.dice.randint(0, MOST_RECORDS)
            if not self._reach(wanted):
                break
            kind = self.run.dice.choice(self.kinds)
            if kind():
                self.run.broke()
                print(f"{kind.__name__} at {wanted} records", file=sys.stderr, flush=True)
        self.run.end(self.driver)

    def _reach(self, wanted: int) -> bool:
        """Whether it happens in time and while the driver runs."""

        def reached() -> bool:
            return self.run.written() >= wanted or self._is_over()

        return self.run.await_that(reached, self.driver) and not self._is_over()

    def _is_over(self) -> bool:
        return time.monotonic() > self._until and self.run.breaks >= self._least

    def kill_driver(self) -> bool:
        if not self.run.kill(self.driver):
            return False
        self.driver = self.run.start()
        return True

    def kill_worker(self) -> bool:
        alive = engines(self.run)
        if not alive or self.deaths == MOST_DEATHS:
            return False
        self.deaths += 1
        return _signal(self.run.dice.choice(alive), signal.SIGKILL)

    def kill_node(self) -> bool:
        if self.deaths == MOST_DEATHS:
            return False
        self.deaths += 1
        cluster = self.run.ground.cluster
        cluster.kill_node(self.run.dice.choice(cluster.raylets))
        cluster.add_node()
        return True

    def pause_worker(self) -> bool:
        alive = engines(self.run)
        return bool(alive) and self._pause(self.run.dice.choice(alive))

    def pause_driver(self) -> bool:
        return self.driver.poll() is None and self._pause(self.driver.pid)

    def start_second(self) -> bool:
        """Another driver, which has to be refused as long as the first one lives."""
        second = self.run.start()
        if self.run.end(second, None) not in (DONE, BAD_INPUT):
            raise LostError(f"the second driver: {self.run.said(second)}")
        return True

    def _pause(self, process: int) -> bool:
        if not _signal(process, signal.SIGSTOP):
            return False
        time.sleep(self.run.dice.uniform(0.0, LONGEST_PAUSE_SECONDS))
        return _signal(process, signal.SIGCONT)


def soak(
    ground: Ground, seconds: float, seed: int, store: str | None = None, least: int = 0
) -> list[Verdict]:
    """One campaign after another, broken as the seed says, for about so long and until there were
    `least` breaks; what became of them. A lost campaign is the last one.

    `store`: where every second campaign has its parents and its ledger; None: all are in folders.
    """
    until = time.monotonic() + seconds
    verdicts: list[Verdict] = []
    left = least
    while not verdicts or (verdicts[-1].lost is None and (time.monotonic() < until or left > 0)):
        run = ground.run(random.Random(f"{seed} {len(verdicts)}"))
        if store is not None and len(verdicts) % 2:
            location = f"{store}/{len(verdicts)}"
            run.move_to(location, put_parents(location))
        lost = None
        try:
            Soak(run, until, left).play()
        except LostError as error:
            lost = str(error)
        verdicts.append(run.judge(lost))
        left -= run.breaks
        print(verdicts[-1], file=sys.stderr, flush=True)
    return verdicts


def _signal(process: int, number: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, number)
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with Ground() as ground, FaultProxy(ground.s3.endpoint) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint  # before the cluster starts, which keeps it
        os.environ["DARWIN_CACHE"] = str(ground.new_folder())
        assert ground.expected  # the time is for what is broken
        store = ground.bucket()
        proxy.trouble(TROUBLED_SHARE, *FAULTS)
        verdicts = soak(ground, 60 * options.minutes, options.seed, store)
    print(HEAD)
    print(row(f"{options.minutes:g} minutes of all at once, seed {options.seed}", verdicts))
    sys.exit(not all(verdict.sound for verdict in verdicts))


if __name__ == "__main__":
    main()
