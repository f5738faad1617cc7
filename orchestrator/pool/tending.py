"""Care for workers that say nothing themselves: those that hang, are frozen, or are on nodes about to go."""

from __future__ import annotations

import time
from contextlib import suppress

from orchestrator.pool.attempts import SilentError
from orchestrator.pool.crew import Crew, Worker
from orchestrator.pool.heartbeat import SILENT_SECONDS

TEND_SECONDS = 0.25
"""The workers are looked at so often."""


class Tending:
    """Looks after the workers of a crew."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._tended = 0.0

    def tend(self, longest: float) -> list[tuple[Worker, Exception]]:
        """Move and replace workers where it is time; those whose call is to be given up, and why.

        `longest`: how many seconds a call may take. Costs nothing most of the times.
        """
        now = time.monotonic()
        if now - self._tended < TEND_SECONDS:
            return []
        self._tended = now
        self._meet()
        for worker in self._crew.workers:
            if worker.actor is not None and worker.call is None and self._crew.must_move(worker):
                self._crew.start(worker)
        given_up: list[tuple[Worker, Exception]] = []
        for worker in self._crew.heartbeat.frozen(self._crew.workers):
            silent = SilentError(f"no sign of life for {SILENT_SECONDS:.0f} s")
            if worker.call is not None:
                given_up.append((worker, silent))
            elif worker.ready is not None:
                self._crew.handle_bad_start(worker, silent)
            else:
                self._crew.start(worker)
        for worker in self._crew.workers:
            if worker.call is not None and now - worker.since > longest:
                given_up.append((worker, TimeoutError("the worker hangs")))
        return given_up

    def _meet(self) -> None:
        """Learn where new actors are."""
        import ray

        new = {worker.introduction: worker for worker in self._crew.workers if worker.introduction}
        if not new:
            return
        for reference in ray.wait(list(new), num_returns=len(new), timeout=0)[0]:
            worker, found = new[reference], None
            worker.introduction = None
            with suppress(ray.exceptions.RayError):  # it did not start, which `ready` tells
                found = ray.get(reference)
            if isinstance(found, str):
                worker.node = found
            elif found is not None:
                worker.member_nodes = tuple(found)
