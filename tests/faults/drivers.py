"""Drivers that are killed, that race for a campaign, and that come back when another one has it."""

from __future__ import annotations

import signal
import time

from tests.faults.run import LostError, Run

KILLS = 4
RACERS = 3
LONGEST_SLEEP_SECONDS = 5.0
"""Of the overtaken driver, counted from the other's first record."""

BAD_INPUT, LOST_LEASE = 2, 1


def driver_killed(run: Run) -> None:
    """SIGKILL of the driver; the same command goes on."""
    for point in run.points(KILLS):
        driver = run.start()
        if run.reach(point, driver) and run.kill(driver):
            run.broke()
        else:
            run.end(driver)  # it was quicker than we
    run.finish()


def lease_raced(run: Run) -> None:
    """Several drivers start at once: one has the campaign, the others are refused."""
    racers = [run.start() for _ in range(RACERS)]
    ended = [run.end(racer, None) for racer in racers]
    if sorted(ended) != [0, *[BAD_INPUT] * (RACERS - 1)]:
        raise LostError(f"drivers ended with {ended}")
    refused = [run.said(racer) for racer, code in zip(racers, ended, strict=True) if code]
    if not all("is being run by process" in said for said in refused):
        raise LostError(f"refused without saying why: {refused}")
    run.breaks += len(refused)


def driver_overtaken(run: Run) -> None:
    """A driver stands still for so long that another takes over; then it goes on, and must not write."""
    (point,) = run.points(1)
    stale = run.start()
    if not run.reach(point, stale):
        run.end(stale)
        return
    stale.send_signal(signal.SIGSTOP)
    before = len(run.records())
    newer = run.start()
    run.await_that(lambda: any(r["epoch"] > 1 for r in run.records()[before:]), newer)
    time.sleep(run.dice.uniform(0.0, LONGEST_SLEEP_SECONDS))
    stale.send_signal(signal.SIGCONT)
    code = run.end(stale, None)
    if code != LOST_LEASE or "another driver has taken over" not in run.said(stale):
        raise LostError(f"the overtaken driver ended with {code}: {run.said(stale)}")
    run.broke()
    run.end(newer)
