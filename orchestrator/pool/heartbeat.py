"""Which workers are frozen, or out of reach: those that give no sign of life any more.

Ray notices a process that has ended and, after a while, a machine that is gone. It does not notice a process
that was stopped, or that waits for a dead disk or device in the kernel.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from workers.heartbeat import Beats

if TYPE_CHECKING:
    from orchestrator.pool.crew import Worker

BEAT_SECONDS = 10.0
"""Between two signs of life of a process, and between two questions for them."""

SILENT_SECONDS = 60.0
"""A worker of which nothing was heard for this long is replaced."""

SILENT_START_SECONDS = 300.0
"""The same while it starts: libraries that are loaded from a slow disk let no other thread run meanwhile."""


class Heartbeat:
    """Asks for the workers' signs of life now and then, and never waits for an answer."""

    def __init__(self) -> None:
        self.name = f"darwin-beats-{uuid.uuid4().hex}"
        """Of the actor that counts them. It is started when the pool has lived for a while: most short ones
        need none."""
        self._began = time.monotonic()
        self._beats: Any = None
        self._answer: Any = None
        self._asked = self._answered = self._began
        self._counts: dict[tuple[int, int], int] = {}
        self._silence: dict[tuple[int, int], float] = {}
        """Seconds for which a count has not grown, those alone in which there were answers: neither a
        driver that was busy nor a counter that was away makes workers silent."""

    def frozen(self, workers: Iterable[Worker]) -> list[Worker]:
        """Those of the workers that are to be replaced. Costs nothing most of the times."""
        counts = self._ask(time.monotonic())
        if counts is None:
            return []
        now = time.monotonic()
        passed, self._answered = min(now - self._answered, 2 * BEAT_SECONDS), now
        known, self._counts = self._counts, counts
        present = {worker.serial: worker for worker in workers if worker.node is not None}
        expected = counts.keys() | {(serial, 0) for serial in present}
        self._silence = {
            key: 0.0 if counts.get(key) != known.get(key) else self._silence.get(key, 0.0) + passed
            for key in expected
            if key[0] in present
        }
        longest = dict.fromkeys(present, 0.0)
        for (serial, _), silence in self._silence.items():
            longest[serial] = max(longest[serial], silence)
        return [
            worker
            for serial, worker in present.items()
            if longest[serial] > (SILENT_SECONDS if worker.in_service else SILENT_START_SECONDS)
        ]

    def _ask(self, now: float) -> dict[tuple[int, int], int] | None:
        """The counts, if there is news of them."""
        import ray

        if self._beats is None:
            if now - self._began > BEAT_SECONDS:
                self._beats = self._start()
            return None
        if self._answer is None:
            if now - self._asked > BEAT_SECONDS:
                self._answer, self._asked = self._beats.counts.remote(), now
            return None
        if not ray.wait([self._answer], timeout=0)[0]:
            return None
        answer, self._answer = self._answer, None
        try:
            counts: dict[tuple[int, int], int] = ray.get(answer)
        except ray.exceptions.RayError:  # Ray starts it again
            return None
        return counts

    def _start(self) -> Any:
        """The counter, beside the driver, whose end is its own."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        place = NodeAffinitySchedulingStrategy(here, soft=True)
        return (
            ray.remote(num_cpus=0, max_restarts=-1)(Beats)
            .options(name=self.name, scheduling_strategy=place)
            .remote()
        )

    def stop(self) -> None:
        """End the counter."""
        import ray

        if self._beats is not None:
            ray.kill(self._beats)
