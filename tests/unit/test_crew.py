"""The places of a pool, by a clock that the test turns."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.pool import crew as crew_module
from orchestrator.pool.crew import LONGEST_REST_SECONDS, Crew, Worker
from orchestrator.workers_config import WorkersConfig


def test_a_place_whose_workers_do_not_start_rests_longer_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While others work and start well: an hour of tries must not be hundreds of processes and copies."""
    now, starts = 0.0, []
    monkeypatch.setattr(crew_module, "time", SimpleNamespace(monotonic=lambda: now))

    def start(crew: Crew, worker: Worker) -> None:
        if worker.number:
            starts.append(now)
            crew.handle_bad_start(worker, OSError("the disk is full"))
        else:
            serve(crew, worker)

    def serve(crew: Crew, worker: Worker) -> None:
        worker.actor, worker.ready = object(), object()
        crew.enter_service(worker)

    spec: Any = None
    crew = Crew(spec, WorkersConfig(count=2), None, lambda description: None)
    good, bad = crew.workers = [Worker(0), Worker(1)]
    monkeypatch.setattr("ray.get", lambda reference: {})
    monkeypatch.setattr(Crew, "start", start)
    serve(crew, good)
    while now < 3600:
        now += 0.5
        if now % 60 == 0:
            serve(crew, good)  # replaced, and there again
        crew.wake()
    rests = [later - earlier for earlier, later in pairwise(starts)]
    assert rests[:8] == pytest.approx([2, 4, 8, 16, 32, 64, 128, 256], abs=1)
    assert rests[8:] == pytest.approx([LONGEST_REST_SECONDS] * len(rests[8:]), abs=1)
    assert 15 < len(starts) < 25
    bad.bad_starts = 0
    assert bad.rest == crew_module.FIRST_REST_SECONDS


def test_a_rest_has_an_end_after_any_number_of_bad_starts() -> None:
    assert Worker(0, bad_starts=5000).rest == LONGEST_REST_SECONDS
