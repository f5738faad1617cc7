"""Which failures count against a candidate, by what is known of their nodes; and whose turn it is."""

from __future__ import annotations

import math

import pytest
import ray

from orchestrator.pool import attempts
from orchestrator.pool.attempts import Failure, SilentError, counted, unexcused
from orchestrator.pool.crew import Worker
from orchestrator.pool.node_watch import NodeWatch
from orchestrator.pool.waiting import Job, Waiting
from workers.errors import BadInputError
from workers.merging import ParentReference, Recipe

ACTOR = bytes(16)


def watch(lost: dict[str, float] | None = None, draining: tuple[str, ...] = ()) -> NodeWatch:
    """What is known of nodes, without a cluster to ask."""
    known = NodeWatch()
    known.note(lost or {}, draining)
    return known


def cut_off() -> Failure:
    """As Ray tells it before it knows why."""
    return Failure.of(ray.exceptions.ActorUnavailableError("socket closed", ACTOR), ("n1", "n2"))


def test_what_a_worker_says_itself_counts_wherever_it_was() -> None:
    said = [Failure.of(RuntimeError("no memory"), ("n1",)), Failure.of(BadInputError("no"), ())]
    assert counted(said, watch(lost={"n1": 0.0})) == 2


def test_no_number_of_lost_nodes_counts() -> None:
    failures = [cut_off() for _ in range(50)]
    known = watch(lost={"n2": failures[0].when + 20})
    assert counted(failures, known) == 0
    assert unexcused(failures, known) == []
    assert unexcused(failures, watch(draining=("n1",))) == []


def test_work_that_every_node_is_lost_with_is_given_up() -> None:
    """Else one candidate could take down a cluster for ever, machine by machine."""
    failures = [
        Failure(f"{attempts.NODE_DIED} {n}", (f"n{n}",), True, 0.0)
        for n in range(attempts.LOST_NODES)
    ]
    assert counted(failures[:-1], watch()) == 0
    assert counted([*failures[:-1], failures[0]], watch()) == 0, "one node is lost once"
    assert counted(failures, watch()) >= attempts.ATTEMPTS


def test_a_node_lost_long_after_is_no_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = cut_off()
    later = watch(lost={"n1": failure.when + attempts.AFTERMATH_SECONDS + 1})
    assert unexcused([failure], later) == [failure]
    assert counted([failure], later) == 0, "as long as it is not known what happened"
    monkeypatch.setattr(attempts, "VERDICT_SECONDS", -1.0)
    assert counted([failure], later) == 1


def test_a_process_that_ended_alone_counts_at_once() -> None:
    """Ray's own words for it: see the tests of the pool on real Ray."""
    died = Failure("ActorDiedError: its worker process has died. Exit", ("n1",), True, 0.0)
    assert counted([died], watch()) == 1
    assert counted([died], watch(lost={"n1": 1.0})) == 0, "with its machine"
    evicted = Failure.of(ray.exceptions.OutOfMemoryError("the node's memory was full"), ("n1",))
    assert counted([evicted], watch()) == 1
    with_node = Failure("ActorDiedError: because its node has died.", (), True, 0.0)
    assert counted([with_node], watch()) == 0


def test_a_silent_worker_counts_unless_its_node_is_found_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent = Failure.of(SilentError("no sign of life"), ("n1",))
    assert counted([silent], watch()) == 0
    monkeypatch.setattr(attempts, "VERDICT_SECONDS", -1.0)
    assert counted([silent], watch()) == 1
    assert counted([silent], watch(lost={"n1": silent.when + 1})) == 0


def job(seed: int, failed_on: set[int] | None = None, not_before: float = 0.0) -> Job:
    recipe = Recipe((ParentReference("a", "0" * 64),), (), None, seed)
    return Job(str(seed), recipe, "search", failed_on=failed_on or set(), not_before=not_before)


def test_a_job_that_failed_waits_for_another_worker_or_for_none() -> None:
    one, two = Worker(0, serial=1, actor="one"), Worker(1, serial=2, actor="two")
    failed, fresh = job(0, {1}), job(1)
    waiting = Waiting([fresh])
    waiting.put_back(failed)
    assert (len(waiting), waiting.fresh) == (2, 1)
    assert waiting.take(one, [one, two]) is fresh
    assert waiting.take(one, [one, two]) is None
    assert waiting.take(one, [one]) is failed, "there is nobody else"
    waiting.put_back(failed)
    assert waiting.take(two, [one, two]) is failed
    waiting.put_back(job(2, {1}, not_before=math.inf))
    assert waiting.take(two, [one, two]) is None
    assert len(waiting) == 1


def test_a_job_that_was_begun_comes_before_the_others() -> None:
    worker = Worker(0, serial=1, actor="one")
    begun, other = job(0), job(1)
    waiting = Waiting([other])
    waiting.put_back(begun)
    assert [waiting.take(worker, [worker]) for _ in range(3)] == [begun, other, None]
