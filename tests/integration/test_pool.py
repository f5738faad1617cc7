"""The pool on real Ray, with workers that go wrong in the ways workers do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator.pool.attempts as attempts_module
import orchestrator.pool.crew as crew_module
import workers.evaluation_worker
from orchestrator.errors import PoolError
from orchestrator.pool.pool import Job, Pool, Progress
from orchestrator.workers_config import PlacesConfig, WorkersConfig
from tests.unreliable_worker import UnreliableWorker
from workers.errors import BadInputError
from workers.evaluation_worker import WorkerSpec
from workers.merging import ParentReference, Recipe

PARENTS = (ParentReference("a", "0" * 64), ParentReference("b", "1" * 64))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.evaluation_worker, "EvaluationWorker", UnreliableWorker)
    monkeypatch.setattr(attempts_module, "BACK_OFF_SECONDS", 0.05)
    monkeypatch.setattr(crew_module, "FIRST_REST_SECONDS", 0.05)


def make_pool(folder: Path, count: int = 2, **plan: Any) -> Pool:
    spec = WorkerSpec({"a": "x", "b": "y"}, None, {}, engine={"folder": str(folder), **plan})
    return Pool(spec, WorkersConfig(count=count), None, lambda description: None)


def jobs(count: int) -> Iterator[Job]:
    for seed in range(count):
        recipe = Recipe(PARENTS, (), None, seed)
        yield Job(recipe.id, recipe, "search")


def outcomes(progress: list[Progress]) -> dict[int, str]:
    """Seed -> how it ended."""
    ends = {}
    for step in progress:
        if step.given_up:
            ends[step.job.recipe.seed] = "given up"
        elif step.scored is not None and step.scored.complete:
            ends[step.job.recipe.seed] = "scored"
    return ends


def test_a_candidate_that_kills_its_worker_is_given_up_after_three_tries(tmp_path: Path) -> None:
    with make_pool(tmp_path, fates={2: "dies", 4: "dies once"}) as pool:
        progress = list(pool.run(jobs(8)))
    assert outcomes(progress) == dict.fromkeys(range(8), "scored") | {2: "given up"}
    assert len([step for step in progress if step.job.recipe.seed == 2]) == 3
    assert len(list(tmp_path.glob("try-2-*"))) == 3
    assert len(list(tmp_path.glob("try-4-*"))) == 2


def test_what_a_worker_refuses_is_tried_once_more_elsewhere(tmp_path: Path) -> None:
    with make_pool(tmp_path, fates={1: "refuses"}) as pool:
        progress = list(pool.run(jobs(4)))
    assert outcomes(progress) == {0: "scored", 1: "given up", 2: "scored", 3: "scored"}
    refused = [step for step in progress if step.error is not None]
    assert [step.given_up for step in refused] == [False, True]
    assert len({step.worker for step in refused}) == 2
    assert len(list(tmp_path.glob("start-*"))) == 2, "a sound worker was replaced"


def test_a_poisoned_worker_does_not_poison_the_candidates(tmp_path: Path) -> None:
    with make_pool(tmp_path, poisoned=[1]) as pool:
        progress = list(pool.run(jobs(12)))
    assert outcomes(progress) == dict.fromkeys(range(12), "scored")


def test_slices_of_an_evaluation_go_on_where_they_stopped(tmp_path: Path) -> None:
    with make_pool(tmp_path, slices=3) as pool:
        progress = list(pool.run(jobs(2)))
    scored = [item["id"] for step in progress if step.scored for item in step.scored.items["t"]]
    assert sorted(scored) == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]


def test_of_a_worker_in_service_it_is_known_where_it_is_and_what_it_has(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    spec = WorkerSpec({}, None, {}, engine={"folder": str(tmp_path)})
    config = WorkersConfig(cpus=0.5, pools=[PlacesConfig(cpus=1.5)])
    with Pool(spec, config, None, lambda description: None, tell=told.append) as pool:
        import ray  # not before the pool has said how it is to start

        for worker in pool._workers:
            ray.wait([worker.ready])
            pool._crew.enter_service(worker)
        here = ray.get_runtime_context().get_node_id()
        assert [worker.node for worker in pool._workers] == [here, here]
    assert [(event["state"], event["cpus"]) for event in told] == [
        ("in service", 0.5),
        ("in service", 1.5),
    ]


def test_a_bad_machine_rests_while_others_work(tmp_path: Path) -> None:
    """One worker starts well, and dies of the first candidate; others start badly, in both ways."""
    with make_pool(
        tmp_path, count=3, bad_starts=[4, 6], dead_starts=[5], fates={0: "dies once"}
    ) as pool:
        progress = list(pool.run(jobs(6)))
    assert outcomes(progress) == dict.fromkeys(range(6), "scored")


def test_workers_that_never_start_end_it(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, count=1, dead_starts=list(range(1, 9)))
    with pytest.raises(PoolError, match="3 workers in a row did not start"), pool:
        list(pool.run(jobs(1)))


def test_the_first_worker_says_what_is_wrong_with_the_input(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, count=1, bad_starts=[1])
    with pytest.raises(BadInputError, match="disk of this machine is full"), pool:
        list(pool.run(jobs(1)))


def test_calls_are_made_by_all_and_again_elsewhere(tmp_path: Path) -> None:
    """The first one kills its worker."""
    with make_pool(tmp_path, count=2) as pool:
        results = dict(pool.each("long_call", [(value,) for value in range(7)]))
    assert results == {number: number + 1 for number in range(7)}
    assert len(list(tmp_path.glob("call-*"))) == 8
    assert len(list(tmp_path.glob("start-*"))) >= 2  # the others may be done before it is replaced


def test_a_worker_that_hangs_in_a_call_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.pool.attempts.HUNG_SECONDS", 1.0)
    with make_pool(tmp_path, count=2) as pool:
        results = dict(pool.each("hung_call", [(value,) for value in range(4)]))
    assert results == {number: number for number in range(4)}
    assert len(list(tmp_path.glob("call-*"))) == 5


@pytest.mark.parametrize(("seconds", "calls"), [(1.5, 4), (60.0, 5)])
def test_a_call_that_is_not_cut_to_size_has_more_time(
    seconds: float, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than others may take; but it is not waited for for ever."""
    monkeypatch.setattr("orchestrator.pool.attempts.HUNG_SECONDS", 0.1)
    monkeypatch.setattr("orchestrator.pool.attempts.UNCUT_HUNG_SECONDS", 5.0)
    with make_pool(tmp_path, count=1, seconds=seconds) as pool:
        results = dict(pool.each("examine", [(value,) for value in range(4)]))
    assert results == {number: number for number in range(4)}
    assert len(list(tmp_path.glob("call-*"))) == calls


def test_a_call_that_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    with make_pool(tmp_path, count=2) as pool, pytest.raises(PoolError, match="failed 3 times"):
        list(pool.each("fatal_call", [()]))


def test_what_a_call_refuses_is_told_as_it_is(tmp_path: Path) -> None:
    with make_pool(tmp_path) as pool, pytest.raises(BadInputError, match="no such tensor"):
        list(pool.each("refused_call", [()]))


def test_another_cluster_on_this_machine_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that leads nowhere, as a cluster that was killed leaves it behind."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with make_pool(tmp_path) as pool:
        assert outcomes(list(pool.run(jobs(2)))) == {0: "scored", 1: "scored"}
