"""Workers that die, hang, and run out of memory."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.campaigns import ray_processes
from tests.faults.run import CannotError, Run

KILLS = 2
"""For each campaign: a candidate that fails three times is given up, and the search is another one then."""

CGROUPS = Path("/sys/fs/cgroup/memory")
MORE_BYTES = 1 << 20


def engines(run: Run) -> list[int]:
    """Process ids of the workers of the cluster."""
    return ray_processes("EvaluationWorker", run.ground.cluster.process_id)


def worker_killed(run: Run) -> None:
    """SIGKILL of a worker."""
    driver = run.start()
    for point in run.points(KILLS):
        if run.reach(point, driver) and _signal_one(run, signal.SIGKILL) is not None:
            run.broke()
    run.end(driver)


def worker_frozen(run: Run) -> None:
    """SIGSTOP of a worker, which never goes on: it is replaced when its pulse is missed."""
    driver = run.start()
    (point,) = run.points(1)
    frozen = None
    if run.reach(point, driver):
        frozen = _signal_one(run, signal.SIGSTOP)
        run.breaks += frozen is not None
    try:
        run.end(driver)
    finally:
        if frozen is not None:
            with suppress(ProcessLookupError):
                os.kill(frozen, signal.SIGKILL)


def out_of_memory(run: Run) -> None:
    """The kernel kills a worker that wants more memory than its control group has."""
    if not (CGROUPS / "memory.limit_in_bytes").exists() or not os.access(CGROUPS, os.W_OK):
        raise CannotError("there are no control groups (version 1) to make")
    group = CGROUPS / f"darwin-faults-{os.getpid()}"
    group.mkdir()
    driver = run.start()
    try:
        (group / "memory.limit_in_bytes").write_text(str(MORE_BYTES))
        for point in run.points(KILLS):
            if not run.reach(point, driver):
                continue
            alive = engines(run)
            if alive:
                victim = run.dice.choice(alive)
                with suppress(OSError):
                    (group / "cgroup.procs").write_text(str(victim))
                    run.await_that(partial(_is_gone, run, victim), driver)
                    run.broke()
        run.end(driver)
    finally:
        for left in (group / "cgroup.procs").read_text().split():
            (CGROUPS / "cgroup.procs").write_text(left)
        group.rmdir()


def _is_gone(run: Run, worker: int) -> bool:
    return worker not in engines(run)


def _signal_one(run: Run, number: int) -> int | None:
    alive = engines(run)
    if not alive:
        return None
    victim = run.dice.choice(alive)
    try:
        os.kill(victim, number)
    except ProcessLookupError:
        return None
    return victim
