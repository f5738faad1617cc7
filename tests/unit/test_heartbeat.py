"""Signs of life: who is silent, whatever the driver and the one who counts were doing."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import orchestrator.pool.heartbeat as heartbeat_module
from orchestrator.pool.crew import Worker
from orchestrator.pool.heartbeat import Heartbeat
from workers.heartbeat import Beats, keep_beating


class Answers(Heartbeat):
    """With a counter in this process instead of one of Ray's, which answers at once."""

    def __init__(self) -> None:
        super().__init__()
        self.beats = Beats()

    def _ask(self, now: float) -> dict[tuple[int, int], int] | None:
        return self.beats.counts()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]

    class Time:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    monkeypatch.setattr(heartbeat_module, "time", Time)
    return now


def make(count: int = 2) -> tuple[Answers, list[Worker]]:
    workers = [Worker(n, n, actor="an actor", node="n1") for n in range(1, count + 1)]
    return Answers(), workers


def pass_time(found: Answers, clock: list[float], workers: list[Worker], beating: Any) -> list[int]:
    """Ten seconds, in which these beat; the serial numbers of those that are frozen."""
    clock[0] += 10.0
    for serial, member in beating:
        found.beats.beat(serial, member)
    return [worker.serial for worker in found.frozen(workers)]


def test_a_worker_is_frozen_after_a_minute_without_a_sign(clock: list[float]) -> None:
    found, workers = make()
    for _ in range(3):
        assert pass_time(found, clock, workers, [(1, 0), (2, 0)]) == []
    silent = [pass_time(found, clock, workers, [(1, 0)]) for _ in range(7)]
    assert silent == [[]] * 6 + [[2]]
    assert pass_time(found, clock, workers, [(1, 0), (2, 0)]) == []


def test_one_that_starts_has_more_time_and_one_without_a_process_all(clock: list[float]) -> None:
    found, workers = make()
    workers[0].ready = "a call"
    workers[1].node = None
    silent = [pass_time(found, clock, workers, []) for _ in range(31)]
    assert silent == [[]] * 30 + [[1]]


def test_every_member_of_a_gang_must_live(clock: list[float]) -> None:
    found, workers = make(1)
    assert pass_time(found, clock, workers, [(1, 0), (1, 1), (1, 2)]) == []
    silent = [pass_time(found, clock, workers, [(1, 0), (1, 1)]) for _ in range(7)]
    assert silent == [[]] * 6 + [[1]]


def test_neither_a_driver_nor_a_counter_that_was_away_makes_workers_silent(
    clock: list[float],
) -> None:
    found, workers = make(1)
    assert pass_time(found, clock, workers, [(1, 0)]) == []
    clock[0] += 3600.0  # the driver was asleep, and the workers with it
    assert pass_time(found, clock, workers, []) == []
    assert pass_time(found, clock, workers, [(1, 0)]) == []
    found.beats = Beats()  # the counter's node was lost
    assert pass_time(found, clock, workers, []) == []
    assert pass_time(found, clock, workers, [(1, 0)]) == []


def test_a_process_beats_whatever_goes_wrong_with_it() -> None:
    beaten = threading.Semaphore(0)

    def beat() -> None:
        beaten.release()
        raise ConnectionError("nobody is there")

    thread = keep_beating(beat, 0.001)
    for _ in range(3):
        assert beaten.acquire(timeout=10)
    assert thread.daemon
