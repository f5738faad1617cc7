"""Calls to whichever workers are idle: parts of a merge, of a scan, of a probe."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.errors import PoolError
from orchestrator.pool import attempts
from orchestrator.pool.attempts import Failure, counted, unexcused
from orchestrator.pool.crew import Crew, Worker
from orchestrator.pool.ray_session import cause_of
from orchestrator.pool.tending import Tending
from orchestrator.pool.turns import Turns
from workers.errors import BadInputError
from workers.storage import StorageError


class Calling:
    """Calls to one method of a crew's workers."""

    def __init__(self, crew: Crew, tending: Tending, method: str) -> None:
        self._crew = crew
        self._tending = tending
        self._method = method
        uncut = method in attempts.UNCUT_CALLS
        self._longest = attempts.UNCUT_HUNG_SECONDS if uncut else attempts.HUNG_SECONDS
        self._failures: dict[int, list[Failure]] = {}
        self._running: dict[Any, tuple[Worker, int]] = {}
        self._rests: dict[int, float] = {}
        """Until when a worker takes no call."""

    def each(
        self, arguments: list[tuple[Any, ...]], preferred: Sequence[int] | None
    ) -> Iterator[tuple[int, Any]]:
        """See `orchestrator.pool.pool.Pool.each`."""
        import ray

        waiting = Turns(len(arguments), preferred)
        running = self._running
        try:
            while waiting or running:
                self._crew.wake()
                self._start(waiting, arguments)
                for reference in self._wait():
                    worker, number = running.pop(reference)
                    worker.call = None
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        self._fail(worker, number, cause_of(error))
                        waiting.put_back(number)
                    else:
                        yield number, result
                for worker, cause in self._tending.tend(self._longest):
                    if worker.call in running:
                        _, number = running.pop(worker.call)
                        self._fail(worker, number, cause)
                        waiting.put_back(number)
        finally:
            for worker, _ in running.values():  # whoever asked has heard enough
                worker.call = None

    def _start(self, waiting: Turns, arguments: list[tuple[Any, ...]]) -> None:
        """Give calls to idle workers."""
        now = time.monotonic()
        for worker in self._crew.workers:
            rests = self._rests.get(worker.number, 0.0) > now
            if waiting and worker.is_idle and not rests and not self._crew.must_move(worker):
                number = waiting.take(worker.number)
                worker.call = getattr(worker.actor, self._method).remote(*arguments[number])
                self._running[worker.call], worker.since = (worker, number), now

    def _wait(self) -> list[Any]:
        """Wait until something happens; calls that have ended."""
        import ray

        starting = {w.ready: w for w in self._crew.workers if w.ready is not None}
        if not self._running and not starting:
            time.sleep(attempts.BACK_OFF_SECONDS / 10)  # every place rests
            return []
        pending = [*self._running, *starting]
        done, _ = ray.wait(pending, num_returns=1, timeout=attempts.BACK_OFF_SECONDS)
        for reference in done:
            if reference in starting:
                self._crew.enter_service(starting[reference])
        return [reference for reference in done if reference in self._running]

    def _fail(self, worker: Worker, number: int, cause: Exception) -> None:
        """Note the failure, and replace a worker that is not sound. Raises what cannot be mended."""
        failures = self._failures.setdefault(number, [])
        failures.append(Failure.of(cause, worker.nodes))
        if isinstance(cause, BadInputError):
            raise cause
        if counted(failures, self._crew.watch) >= attempts.ATTEMPTS:
            if isinstance(cause, StorageError):
                raise cause
            raise PoolError(
                f"{self._method} failed {len(failures)} times; the last time: {failures[-1].error}"
            )
        if not isinstance(cause, StorageError):
            # Dead, or out of memory: it would fail the next call too.
            self._crew.start(worker)
        tries = len(unexcused(failures, self._crew.watch))
        rest = attempts.BACK_OFF_SECONDS * 2**tries
        self._rests[worker.number] = time.monotonic() + rest
