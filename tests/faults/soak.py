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

from tests.faults.ground import Ground
from tests.faults.run import LostError, Run, Verdict
from tests.faults.table import HEAD, row
from tests.faults.workers import engines

MOST_RECORDS = 12
"""Of the ledger that may come until the next break."""

MOST_DEATHS = 2
"""Of workers for each campaign: a candidate that has failed three times is given up, and the search is
another one from there on."""

LONGEST_PAUSE_SECONDS = 3.0


class Soak:
    """One campaign that is broken in turn by whatever is drawn."""

    def __init__(self, run: Run, until: float) -> None:
        self.run = run
        self.until = until
        self.deaths = 0
        self.driver: subprocess.Popen[str] = run.start()
        self.kinds: list[Callable[[], bool]] = [
            self.kill_driver,
            self.kill_worker,
            self.kill_node,
            self.pause_worker,
            self.pause_driver,
        ]

    def play(self) -> None:
        """Break it until the time is over, and bring it to its end."""
        while time.monotonic() < self.until:
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
            return self.run.written() >= wanted or time.monotonic() > self.until

        return self.run.await_that(reached, self.driver) and time.monotonic() <= self.until

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

    def _pause(self, process: int) -> bool:
        if not _signal(process, signal.SIGSTOP):
            return False
        time.sleep(self.run.dice.uniform(0.0, LONGEST_PAUSE_SECONDS))
        return _signal(process, signal.SIGCONT)


def soak(ground: Ground, seconds: float, seed: int) -> list[Verdict]:
    """One campaign after another, broken as the seed says, for about so long; what became of them."""
    until = time.monotonic() + seconds
    verdicts: list[Verdict] = []
    while not verdicts or time.monotonic() < until:
        run = ground.run(random.Random(f"{seed} {len(verdicts)}"))
        lost = None
        try:
            Soak(run, until).play()
        except LostError as error:
            lost = str(error)
        verdicts.append(run.judge(lost))
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
    with Ground() as ground:
        assert ground.expected  # the time is for what is broken
        verdicts = soak(ground, 60 * options.minutes, options.seed)
    print(HEAD)
    print(row(f"{options.minutes:g} minutes of all at once, seed {options.seed}", verdicts))
    sys.exit(not all(verdict.sound for verdict in verdicts))


if __name__ == "__main__":
    main()
