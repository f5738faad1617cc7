"""The jobs of the pool, and those of them that wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.pool.attempts import Failure

if TYPE_CHECKING:
    from orchestrator.pool.crew import Worker
    from workers.evaluation_worker import Scored
    from workers.merging import Recipe


@dataclass(eq=False)
class Job:
    """One evaluation: a recipe on the items of a split."""

    key: str
    recipe: Recipe
    split: str
    finished: dict[str, list[str]] = field(default_factory=dict)
    """Items that need no scoring any more: task -> item ids."""
    chosen: dict[str, list[str]] | None = None
    """Those that are asked for, if not all of the split: task -> item ids."""
    failures: list[Failure] = field(default_factory=list)
    failed_on: set[int] = field(default_factory=set)
    """Serial numbers of workers that another one is to be preferred to."""
    not_before: float = 0.0
    waiting_since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Progress:
    """Something that happened to a job."""

    job: Job
    worker: int
    scored: Scored | None = None
    error: str | None = None
    """Why an attempt failed; the job is tried again unless `given_up`."""
    given_up: bool = False
    seconds: float = 0.0
    """From the call to its end, by the driver's clock."""
    waited: float = 0.0
    """Seconds for which the job could have run before, had a worker been free."""


class Waiting:
    """Jobs that wait for a worker: those that have failed, as soon as they are due, and then the others in
    their order."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._fresh = deque(jobs)
        self._failed: list[Job] = []

    def __len__(self) -> int:
        return len(self._fresh) + len(self._failed)

    @property
    def fresh(self) -> int:
        """How many suit every worker."""
        return len(self._fresh)

    def add(self, job: Job) -> None:
        """Let a job wait its turn."""
        self._fresh.append(job)

    def put_back(self, job: Job) -> None:
        """Let a job wait again: it comes before those that have not begun."""
        if job.failed_on:
            self._failed.append(job)
        else:
            self._fresh.appendleft(job)

    def take(self, worker: Worker, workers: Sequence[Worker]) -> Job | None:
        """What this one of the workers does next: nothing that failed on it while others are there."""
        now = time.monotonic()
        for job in self._failed:
            if job.not_before > now:
                continue
            if worker.serial in job.failed_on and any(
                other.is_expected and other.serial not in job.failed_on for other in workers
            ):
                continue
            self._failed.remove(job)
            return job
        return self._fresh.popleft() if self._fresh else None
