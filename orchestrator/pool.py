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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.config import WorkersConfig
from orchestrator.crew import Crew, Worker
from orchestrator.errors import PoolError
from orchestrator.ray_session import cause_of
from orchestrator.turns import Turns
from workers.errors import BadInputError
from workers.storage import StorageError

if TYPE_CHECKING:
    from workers.actors import MergeSpec, Scored
    from workers.merging import Recipe

ATTEMPTS = 3
"""How often an evaluation may fail before it is recorded as failed."""

BAD_INPUT_ATTEMPTS = 2
"""The same for an error in the input: once more elsewhere, in case it is that machine's input alone."""

CALL_SECONDS = 20.0
"""For about this long a worker scores before it hands over what it has."""

HUNG_SECONDS = 3600.0
"""A call that takes this much longer than `CALL_SECONDS` is given up, and its worker killed. One batch of a
large model, or the statistics of its first merge, may take many minutes."""

UNCUT_CALLS = frozenset(
    {"examine", "publish_file", "hash_file"}
    | {"probe", "probe_span", "probe_ask", "probe_experts", "probe_layer"}
    | {"expert_inputs", "match_experts"}
    | {"calibrate_router", "compare_routing"}
)
"""Calls that are about whole models or files, and not cut to a size: they last as long as these are large."""

UNCUT_HUNG_SECONDS = 24 * 3600.0
"""The same for `UNCUT_CALLS`. A worker or node that dies is noticed at once; this is for one that hangs."""

WORKERS_PER_WAITING_JOB = 8
"""One job waits beforehand for so many workers: several may come back while the driver asks and records.
More would be asked for knowing less."""

GROUP_BYTES = 256 << 20

BACK_OFF_SECONDS = 1.0


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
    failures: list[str] = field(default_factory=list)
    failed_on: set[int] = field(default_factory=set)
    """Serial numbers of workers that another one is to be preferred to."""
    not_before: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Something that happened to a job."""

    job: Job
    worker: int
    scored: Scored | None = None
    error: str | None = None
    """Why an attempt failed; the job is tried again unless `given_up`."""
    given_up: bool = False


class Pool:
    """`workers.count` workers, replaced when they die. A context manager.

    `check_engine` sees what each new worker's scores depend on, and raises if it does not fit.
    """

    def __init__(
        self,
        spec: MergeSpec,
        config: WorkersConfig,
        address: str | None,
        check_engine: Callable[[dict[str, Any]], None],
    ) -> None:
        self.idle_seconds = 0.0
        """Time the driver spent waiting for workers, of all the time in `run`."""
        self._crew = Crew(spec, config, address, check_engine)

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
        waiting = deque(jobs)
        self._supply(waiting, supply)
        while waiting or self.busy:
            progress = self._collect(waiting)
            # Before the caller records it: no worker waits for the store.
            self._dispatch(waiting)
            yield from progress
            self._supply(waiting, supply)

    @property
    def look_ahead(self) -> int:
        """So many jobs wait for those workers that come back while the driver is busy with another."""
        return 1 + len(self._workers) // WORKERS_PER_WAITING_JOB

    def _supply(self, waiting: deque[Job], supply: Callable[[], Job | None]) -> None:
        """Keep jobs waiting, and give them to idle workers. Those that failed may not suit any of these."""
        self._dispatch(waiting)
        while sum(not job.failures for job in waiting) < self.look_ahead:
            job = supply()
            if job is None:
                return
            waiting.append(job)
            self._dispatch(waiting)

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
        import ray

        longest = UNCUT_HUNG_SECONDS if method in UNCUT_CALLS else HUNG_SECONDS
        waiting = Turns(len(arguments), preferred)
        failures: dict[int, list[str]] = {}
        running: dict[Any, tuple[Worker, int]] = {}
        rests: dict[int, float] = {}
        while waiting or running:
            self._crew.wake()
            now = time.monotonic()
            busy = {worker.number for worker, _ in running.values()}
            busy |= {number for number, until in rests.items() if until > now}
            for worker in self._workers:
                if waiting and worker.in_service and worker.number not in busy:
                    number = waiting.take(worker.number)
                    call = getattr(worker.actor, method).remote(*arguments[number])
                    running[call], worker.since = (worker, number), now
            starting = {w.ready: w for w in self._workers if w.ready is not None}
            if not running and not starting:
                time.sleep(BACK_OFF_SECONDS / 10)  # every place rests
                continue
            done, _ = ray.wait([*running, *starting], num_returns=1, timeout=BACK_OFF_SECONDS)
            for reference in done:
                if reference in starting:
                    self._crew.enter_service(starting[reference])
                    continue
                worker, number = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as error:
                    known = failures.setdefault(number, [])
                    self._handle_failed_call(worker, method, cause_of(error), known)
                    waiting.put_back(number)
                    rests[worker.number] = now + BACK_OFF_SECONDS * 2 ** len(known)
                else:
                    yield number, result
            for reference, (worker, number) in list(running.items()):
                if time.monotonic() - worker.since > longest:
                    del running[reference]
                    hung = TimeoutError("the worker hangs")
                    self._handle_failed_call(worker, method, hung, failures.setdefault(number, []))
                    waiting.put_back(number)

    def _handle_failed_call(
        self, worker: Worker, method: str, cause: Exception, failures: list[str]
    ) -> None:
        failures.append(f"{type(cause).__name__}: {cause}")
        if isinstance(cause, BadInputError):
            raise cause
        if len(failures) >= ATTEMPTS:
            if isinstance(cause, StorageError):
                raise cause
            raise PoolError(f"{method} failed {ATTEMPTS} times; the last time: {failures[-1]}")
        if not isinstance(cause, StorageError):
            # Dead, or out of memory: it would fail the next call too.
            self._crew.start(worker)

    # -- jobs --------------------------------------------------------------------------------

    def _dispatch(self, waiting: deque[Job]) -> None:
        for worker in self._workers:
            if worker.in_service and worker.job is None:
                job = self._choose(worker, waiting)
                if job is None:
                    continue
                waiting.remove(job)
                worker.job, worker.since = job, time.monotonic()
                worker.call = worker.actor.evaluate.remote(
                    job.recipe.to_dict(), job.split, job.finished, CALL_SECONDS, job.chosen
                )

    def _choose(self, worker: Worker, waiting: deque[Job]) -> Job | None:
        """The first job that is due, and that has not failed on this worker while others are there."""
        now = time.monotonic()
        for job in waiting:
            elsewhere = any(
                other.is_expected and other.serial not in job.failed_on for other in self._workers
            )
            if job.not_before <= now and not (worker.serial in job.failed_on and elsewhere):
                return job
        return None

    def _collect(self, waiting: deque[Job]) -> list[Progress]:
        """Wait until something happens, and say what."""
        import ray

        self._crew.wake()
        pending = {
            worker.ready if worker.ready is not None else worker.call: worker
            for worker in self._workers
            if worker.ready is not None or worker.call is not None
        }
        started = time.monotonic()
        if pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=BACK_OFF_SECONDS)
        else:  # every job left is waiting for its next attempt, or every place rests
            done = []
            time.sleep(BACK_OFF_SECONDS / 10)
        self.idle_seconds += time.monotonic() - started
        progress = []
        for reference in done:
            worker = pending[reference]
            if worker.ready is not None:
                self._crew.enter_service(worker)
            else:
                progress.append(self._finish_call(worker, waiting))
        for worker in self._workers:
            if worker.job and time.monotonic() - worker.since > CALL_SECONDS + HUNG_SECONDS:
                progress.append(self._fail(worker, waiting, TimeoutError("the worker hangs")))
        return progress

    def _finish_call(self, worker: Worker, waiting: deque[Job]) -> Progress:
        import ray

        assert worker.job is not None
        try:
            scored: Scored = ray.get(worker.call)
        except ray.exceptions.RayError as error:
            return self._fail(worker, waiting, cause_of(error))
        self._crew.forgive()
        return self._take(worker, waiting, scored)

    def _take(self, worker: Worker, waiting: deque[Job], scored: Scored) -> Progress:
        """Put the job back if it is not done."""
        assert worker.job is not None
        job, worker.job, worker.call = worker.job, None, None
        for task, items in scored.items.items():
            job.finished.setdefault(task, []).extend(item["id"] for item in items)
        if not scored.complete:
            waiting.appendleft(job)  # most likely this worker takes it again, weights in place
        return Progress(job, worker.number, scored)

    def _fail(self, worker: Worker, waiting: deque[Job], cause: Exception) -> Progress:
        """Put the job back, for another worker if there is one; replace a worker that is not sound."""
        job, worker.job, worker.call = worker.job, None, None
        assert job is not None
        job.failures.append(f"{type(cause).__name__}: {cause}")
        job.failed_on.add(worker.serial)
        bad_input = isinstance(cause, BadInputError)
        if not bad_input:
            # Dead, out of memory, or with a device in disorder: it would fail the next job too.
            self._crew.start(worker)
        given_up = len(job.failures) >= (BAD_INPUT_ATTEMPTS if bad_input else ATTEMPTS)
        if not given_up:
            back_off = 0.0 if bad_input else BACK_OFF_SECONDS * 2 ** len(job.failures)
            job.not_before = time.monotonic() + back_off
            waiting.append(job)
        return Progress(job, worker.number, error=job.failures[-1], given_up=given_up)
