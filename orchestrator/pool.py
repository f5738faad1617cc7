"""The pool: the only place that schedules. Long-lived Ray actors take evaluations as they free up.

A call to a worker lasts a bounded time and returns what it has scored so far, so results are recorded as
they come, and a worker that neither answers nor dies is noticed. Ray may run a call twice and keep a
worker alive that it has given up on; that is harmless, because workers only compute: what counts is
what the driver records.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.config import WorkersConfig
from workers.errors import BadInputError

if TYPE_CHECKING:
    from workers.actors import Scored, WorkerSpec
    from workers.merging import Recipe

ATTEMPTS = 3
"""How often an evaluation may fail before it is recorded as failed."""

CALL_SECONDS = 20.0
"""For about this long a worker scores before it hands over what it has."""

HUNG_SECONDS = 600.0
"""A call that takes this much longer than `CALL_SECONDS` is given up, and its worker killed."""

START_ATTEMPTS = 3
"""How many workers in a row may fail to start before the campaign does."""

START_SECONDS = 1800.0
"""With no worker in service for this long, the cluster will not give any: long enough for machines that
must be started first, and for parents that must be copied to them."""

BACK_OFF_SECONDS = 1.0


class PoolError(RuntimeError):
    """Workers cannot be started, or do not fit together."""


@dataclass(eq=False)
class Job:
    """One evaluation: a recipe on the items of a split."""

    key: str
    recipe: Recipe
    split: str
    finished: dict[str, list[str]] = field(default_factory=dict)
    """Items that need no scoring any more: task -> item ids."""
    failures: list[str] = field(default_factory=list)
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


@dataclass
class _Worker:
    number: int
    actor: Any
    ready: Any
    """The pending `describe` call of a worker that is starting; None once it is in service."""
    started: float
    job: Job | None = None
    call: Any = None
    called: float = 0.0


class Pool:
    """`workers.count` workers, replaced when they die. A context manager.

    `check_engine` sees what each new worker's scores depend on, and raises if it does not fit.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        config: WorkersConfig,
        address: str | None,
        check_engine: Callable[[dict[str, Any]], None],
    ) -> None:
        self.spec = spec
        self.config = config
        self.address = address
        self.check_engine = check_engine
        self.idle_seconds = 0.0
        """Time the driver spent waiting for workers, of all the time in `run`."""
        self._workers: list[_Worker] = []
        self._failed_starts: list[str] = []

    def __enter__(self) -> Pool:
        start_ray(self.address, self.config)
        self._workers = [self._start_worker(number) for number in range(self.config.count)]
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []
        ray.shutdown()

    @property
    def busy(self) -> int:
        """Workers that are on a job now."""
        return sum(worker.job is not None for worker in self._workers)

    def run(self, jobs: Iterable[Job]) -> Iterator[Progress]:
        """Evaluate every job; progress in the order in which it happens.

        The caller has recorded a `Progress` when it asks for the next one. Raises `PoolError` if no
        worker can be started, `BadInputError` if workers refuse their input.
        """
        waiting = deque(jobs)
        self._dispatch(waiting)
        while waiting or self.busy:
            progress = self._collect(waiting)
            # Before the caller records it: no worker waits for the store.
            self._dispatch(waiting)
            yield from progress

    def call(self, method: str, *arguments: Any) -> Any:
        """Run one long call on some worker, again elsewhere if the worker dies."""
        import ray

        error: Exception | None = None
        for _ in range(ATTEMPTS):
            worker = self._ready_worker()
            try:
                return ray.get(getattr(worker.actor, method).remote(*arguments))
            except ray.exceptions.RayTaskError as failure:
                raise _cause(failure) from failure
            except ray.exceptions.RayActorError as failure:
                error = failure
                self._replace(worker)
        raise PoolError(f"{method} killed {ATTEMPTS} workers in a row: {error}")

    def _start_worker(self, number: int) -> _Worker:
        import ray

        from workers.actors import EvaluationWorker

        actor = (
            ray.remote(EvaluationWorker)
            .options(num_cpus=self.config.cpus, num_gpus=self.config.gpus, max_restarts=0)
            .remote(self.spec)
        )
        return _Worker(number, actor, actor.describe.remote(), started=time.monotonic())

    def _replace(self, worker: _Worker) -> None:
        import ray

        ray.kill(worker.actor)
        position = self._workers.index(worker)
        self._workers[position] = self._start_worker(worker.number)

    def _ready_worker(self) -> _Worker:
        while True:
            for worker in self._workers:
                if worker.ready is None and worker.job is None:
                    return worker
            self._collect(deque())

    def _dispatch(self, waiting: deque[Job]) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.ready is not None or worker.job is not None:
                continue
            job = next((job for job in waiting if job.not_before <= now), None)
            if job is None:
                return
            waiting.remove(job)
            worker.job, worker.called = job, now
            worker.call = worker.actor.evaluate.remote(
                worker.job.recipe.to_dict(), worker.job.split, worker.job.finished, CALL_SECONDS
            )

    def _collect(self, waiting: deque[Job]) -> list[Progress]:
        """Wait until something happens, and say what."""
        import ray

        pending = {
            worker.ready if worker.ready is not None else worker.call: worker
            for worker in self._workers
            if worker.ready is not None or worker.call is not None
        }
        started = time.monotonic()
        if pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=BACK_OFF_SECONDS)
        else:  # every job left is waiting for its next attempt
            done = []
            time.sleep(BACK_OFF_SECONDS / 10)
        self.idle_seconds += time.monotonic() - started
        progress = []
        for reference in done:
            worker = pending[reference]
            if worker.ready is not None:
                self._enter_service(worker)
            else:
                progress.append(self._finish_call(worker, waiting))
        for worker in self._workers:
            if worker.job and time.monotonic() - worker.called > CALL_SECONDS + HUNG_SECONDS:
                progress.append(self._fail(worker, waiting, "the worker hangs", replace=True))
        self._check_service()
        return progress

    def _check_service(self) -> None:
        """Raise `PoolError` if all workers have been starting for too long."""
        newest_start = max(worker.started for worker in self._workers)
        if all(w.ready is not None for w in self._workers) and (
            time.monotonic() - newest_start > START_SECONDS
        ):
            raise PoolError(
                f"no worker came into service in {START_SECONDS:.0f} s: does the cluster have a node "
                f"with {self.config.cpus:g} free CPUs and {self.config.gpus:g} GPUs?"
            )

    def _enter_service(self, worker: _Worker) -> None:
        import ray

        try:
            description = ray.get(worker.ready)
        except ray.exceptions.RayError as error:
            cause = _cause(error)
            if isinstance(cause, BadInputError):
                raise cause from error
            self._failed_starts.append(str(cause))
            if len(self._failed_starts) >= START_ATTEMPTS:
                raise PoolError(
                    f"{START_ATTEMPTS} workers in a row did not start; the last one: {cause}"
                ) from error
            self._replace(worker)
            return
        self.check_engine(description)
        self._failed_starts.clear()
        worker.ready = None

    def _finish_call(self, worker: _Worker, waiting: deque[Job]) -> Progress:
        import ray

        assert worker.job is not None
        try:
            scored: Scored = ray.get(worker.call)
        except ray.exceptions.RayTaskError as error:
            cause = _cause(error)
            hopeless = isinstance(cause, BadInputError)  # it would fail everywhere
            why = f"{type(cause).__name__}: {cause}"
            return self._fail(worker, waiting, why, replace=False, hopeless=hopeless)
        except ray.exceptions.RayError as error:
            # Dead, out of memory, or cut off: what exactly, Ray says best.
            return self._fail(worker, waiting, f"worker lost: {error}", replace=True)
        job, worker.job, worker.call = worker.job, None, None
        for task, items in scored.items.items():
            job.finished.setdefault(task, []).extend(item["id"] for item in items)
        if not scored.complete:
            waiting.appendleft(job)  # most likely this worker takes it again, weights in place
        return Progress(job, worker.number, scored)

    def _fail(
        self, worker: _Worker, waiting: deque[Job], why: str, replace: bool, hopeless: bool = False
    ) -> Progress:
        job, worker.job, worker.call = worker.job, None, None
        assert job is not None
        if replace:
            self._replace(worker)
        job.failures.append(why)
        given_up = hopeless or len(job.failures) >= ATTEMPTS
        if not given_up:
            job.not_before = time.monotonic() + BACK_OFF_SECONDS * 2 ** len(job.failures)
            waiting.append(job)
        return Progress(job, worker.number, error=why, given_up=given_up)


def start_ray(address: str | None, workers: WorkersConfig) -> None:
    """Connect to the cluster at `address`, or start Ray on this machine for this process alone."""
    # Before ray is imported: it reads these once.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        # A token of our own, so that nothing is written to the user's home and nobody else gets in.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
    import ray

    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False, logging_level="error")
            return
        ray.init(
            num_cpus=max(1, -(-workers.count * workers.cpus // 1)),
            num_gpus=-(-workers.count * workers.gpus // 1) or None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=128 << 20,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise PoolError(f"Ray at {address or 'this machine'} does not start: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, on_terminate)  # Ray's own would leave without saving


def _cause(error: Exception) -> Exception:
    """The worker's own error behind what Ray raises, or what Ray says itself."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error
