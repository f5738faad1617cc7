"""The pool: the only place that schedules. Long-lived Ray actors take evaluations as they free up.

A call to a worker lasts a bounded time and returns what it has scored so far, so results are recorded as
they come, and a worker that neither answers nor dies is noticed. Ray may run a call twice and keep a
worker alive that it has given up on; that is harmless, because workers only compute: what counts is
what the driver records.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.pool import attempts
from orchestrator.pool.attempts import Failure, counted, unexcused
from orchestrator.pool.calling import Calling
from orchestrator.pool.crew import Crew, Worker
from orchestrator.pool.ray_session import cause_of
from orchestrator.pool.tending import Tending
from orchestrator.pool.waiting import Job, Progress, Waiting
from orchestrator.workers_config import WorkersConfig
from workers.errors import BadInputError

if TYPE_CHECKING:
    from workers.actors import MergeSpec
    from workers.evaluation_worker import Scored

__all__ = ["Job", "Pool", "Progress"]

CALL_SECONDS = 20.0
"""For about this long a worker scores before it hands over what it has."""

WORKERS_PER_WAITING_JOB = 8
"""One job waits beforehand for so many workers: several may come back while the driver asks and records.
More would be asked for knowing less."""

GROUP_BYTES = 256 << 20

POLL_SECONDS = 0.02
"""While results wait to be recorded, idle workers are looked for so often."""


class Pool:
    """Workers in the places of `config`, replaced when they die. A context manager.

    `check_engine` sees what each new worker's scores depend on, and raises if it does not fit; `tell` is told
    what becomes of workers: see `Crew.tell`.
    """

    def __init__(
        self,
        spec: MergeSpec,
        config: WorkersConfig,
        address: str | None,
        check_engine: Callable[[dict[str, Any]], None],
        priority: int = 0,
        tell: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        self.idle_seconds = 0.0
        """Time the driver spent waiting for workers, of all the time in `run`."""
        self._crew = Crew(spec, config, address, check_engine, priority, tell)
        self._tending = Tending(self._crew)
        self._collected = 0.0
        """When it was last looked for results."""

    def __enter__(self) -> Pool:
        self._crew.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._crew.__exit__(*exception)

    @property
    def _workers(self) -> list[Worker]:
        return self._crew.workers

    @property
    def busy(self) -> int:
        """Workers that are on a job now."""
        return sum(worker.job is not None for worker in self._workers)

    def run(
        self, jobs: Iterable[Job], supply: Callable[[], Job | None] = lambda: None
    ) -> Iterator[Progress]:
        """Evaluate every job, and those that `supply` gives; progress in the order in which it happens.

        `supply` is asked for one more job whenever fewer than `look_ahead` wait, so that no worker waits for
        it; None means that there is none until there was more progress. The caller has recorded a `Progress`
        when it asks for the next one. Raises `PoolError` if no worker can be started, `BadInputError` if the
        very first ones refuse their input.
        """
        waiting = Waiting(jobs)
        arrived: deque[Progress] = deque()
        may_be_more = may_be_idle = True
        while True:
            # Whoever chooses the next job had better know the results that have come.
            if may_be_more and waiting.fresh < (1 if arrived else self.look_ahead):
                job = supply()
                may_be_more = job is not None
                if job is not None:
                    waiting.add(job)
            may_be_idle = may_be_idle and self._dispatch(waiting)
            if not (waiting or arrived or self.busy):
                return
            is_short = may_be_more and waiting.fresh < self.look_ahead
            if not (arrived or is_short):
                arrived.extend(self._collect(waiting, attempts.BACK_OFF_SECONDS))
                may_be_idle = True
            elif time.monotonic() - self._collected > POLL_SECONDS:
                arrived.extend(self._collect(waiting, 0.0))
                may_be_idle = True
            # Before the caller records it: no worker waits for the store.
            may_be_idle = may_be_idle and self._dispatch(waiting)
            if arrived:
                yield arrived.popleft()
                may_be_more = True

    @property
    def look_ahead(self) -> int:
        """So many jobs wait for those workers that come back while the driver is busy with another."""
        return 1 + len(self._workers) // WORKERS_PER_WAITING_JOB

    @property
    def workers(self) -> int:
        """See `Calls.workers`."""
        return len(self._workers)

    def group_bytes(self, total: int) -> int:
        """What of a child a worker merges in one call: small enough that none waits long at the end."""
        return min(GROUP_BYTES * self._crew.gang, total // (4 * len(self._workers)))

    def each(
        self,
        method: str,
        arguments: list[tuple[Any, ...]],
        preferred: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Call the workers' `method` with each of `arguments`; (number, result) as they come.

        `preferred` may say which worker had better take each call; another one does when it has nothing
        of its own left. A call that fails is made again, after those that wait, by whichever worker is
        idle; a worker whose store failed rests first, and one that hangs is replaced. Raises a worker's
        `BadInputError` as it is, and its `StorageError` or a `PoolError` after the last attempt.
        """
        return Calling(self._crew, self._tending, method).each(arguments, preferred)

    # -- jobs --------------------------------------------------------------------------------

    def _dispatch(self, waiting: Waiting) -> bool:
        """Give idle workers what waits; whether there may still be idle ones. If not, nobody need look for
        them until something was collected."""
        is_idle = False
        for worker in self._workers if waiting else ():
            if worker.is_idle and not self._crew.must_move(worker):
                job = waiting.take(worker, self._workers)
                if job is not None:
                    self._give(worker, job)
                else:
                    is_idle = True
                if not waiting:
                    return True
        return is_idle or not waiting

    def _give(self, worker: Worker, job: Job) -> None:
        worker.job, worker.since = job, time.monotonic()
        worker.waited = max(0.0, worker.since - max(job.waiting_since, job.not_before))
        worker.call = worker.actor.evaluate.remote(
            job.recipe.to_dict(), job.split, job.finished, CALL_SECONDS, job.chosen
        )

    def _collect(self, waiting: Waiting, seconds: float) -> list[Progress]:
        """Wait until something happens, at most so long; all that has happened."""
        import ray

        self._crew.wake()
        pending = {
            worker.ready if worker.ready is not None else worker.call: worker
            for worker in self._workers
            if worker.ready is not None or worker.call is not None
        }
        references = list(pending)
        started = time.monotonic()
        done: list[Any] = []
        if references:
            if seconds:
                ray.wait(references, num_returns=1, timeout=seconds)
            done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        elif seconds:  # every job left is waiting for its next attempt, or every place rests
            time.sleep(attempts.BACK_OFF_SECONDS / 10)
        self._collected = time.monotonic()
        self.idle_seconds += self._collected - started
        progress = []
        for reference in done:
            worker = pending[reference]
            if worker.ready is not None:
                self._crew.enter_service(worker)
            else:
                progress.append(self._finish_call(worker, waiting))
        for worker, cause in self._tending.tend(CALL_SECONDS + attempts.HUNG_SECONDS):
            if worker.call is not None:
                progress.append(self._fail(worker, waiting, cause))
        return progress

    def _finish_call(self, worker: Worker, waiting: Waiting) -> Progress:
        import ray

        try:
            scored: Scored = ray.get(worker.call)
        except ray.exceptions.RayError as error:
            return self._fail(worker, waiting, cause_of(error))
        return self._take(worker, waiting, scored)

    def _take(self, worker: Worker, waiting: Waiting, scored: Scored) -> Progress:
        """Let the worker go on with the job if it is not done, or another one if it must move."""
        assert worker.job is not None
        job, worker.job, worker.call = worker.job, None, None
        for task, items in scored.items.items():
            job.finished.setdefault(task, []).extend(item["id"] for item in items)
        # Nodes that were lost before were not lost by what has now been scored.
        if job.failures:
            job.failures = unexcused(job.failures, self._crew.watch)
        now = time.monotonic()
        seconds, waited = now - worker.since, worker.waited
        job.waiting_since = now
        moves = self._crew.must_move(worker)
        if not scored.complete and not moves:
            self._give(worker, job)  # weights in place
        elif not scored.complete:
            waiting.put_back(job)
        if moves:
            self._crew.start(worker)
        return Progress(job, worker.number, scored, seconds=seconds, waited=waited)

    def _fail(self, worker: Worker, waiting: Waiting, cause: Exception) -> Progress:
        """Put the job back, for another worker if there is one; replace a worker that is not sound."""
        job, worker.job, worker.call = worker.job, None, None
        assert job is not None
        job.waiting_since = time.monotonic()
        seconds = job.waiting_since - worker.since
        job.failures.append(Failure.of(cause, worker.nodes))
        job.failed_on.add(worker.serial)
        bad_input = isinstance(cause, BadInputError)
        if not bad_input:
            # Dead, out of memory, or with a device in disorder: it would fail the next job too.
            self._crew.start(worker)
        most = attempts.BAD_INPUT_ATTEMPTS if bad_input else attempts.ATTEMPTS
        given_up = counted(job.failures, self._crew.watch) >= most
        if not given_up:
            tries = len(unexcused(job.failures, self._crew.watch))
            back_off = 0.0 if bad_input else attempts.BACK_OFF_SECONDS * 2**tries
            job.not_before = time.monotonic() + back_off
            waiting.put_back(job)
        error = job.failures[-1].error
        return Progress(job, worker.number, None, error, given_up, seconds, worker.waited)
