"""What a cluster has too little of for workers to be spread as asked, and whose turn a call is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pool.placement import check_placement, what_lacks
from orchestrator.pool.turns import Turns
from orchestrator.workers_config import PlacesConfig, WorkersConfig
from workers.errors import BadInputError

NODES = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}, {"memory": 1e9}]


@pytest.mark.parametrize(
    ("placement", "count", "cpus", "gpus", "lacking"),
    [
        ("strict", 3, 1, 0, None),
        ("strict", 4, 1, 0, "4 nodes with 1 CPUs and 0 GPUs each; the cluster has 3 such nodes among 4"),
        ("strict", 2, 1, 1, None),
        ("strict", 3, 1, 1, "3 nodes with 1 CPUs and 1 GPUs each; the cluster has 2 such nodes among 4"),
        ("strict", 1, 2, 2, None),
        ("strict", 1, 0, 3, "1 nodes with 0 CPUs and 3 GPUs each; the cluster has 0 such nodes among 4"),
        ("spread", 13, 1, 0, None),
        ("spread", 26, 0.5, 0, None),
        ("pack", 13, 1, 0, None),
        ("pack", 14, 1, 0, "room for 14 workers with 1 CPUs and 0 GPUs each; the cluster's 4 nodes "
         "have room for 13"),
        ("spread", 14, 1, 0, "room for 14 workers with 1 CPUs and 0 GPUs each; the cluster's 4 nodes "
                             "have room for 13"),
        ("spread", 3, 0, 1, None),
        ("spread", 6, 0, 0.5, None),
        ("spread", 4, 0, 0.6, "room for 4 workers with 0 CPUs and 0.6 GPUs each; the cluster's 4 nodes have "
                              "room for 3"),  # not of 2 GPUs
        ("spread", 4, 0, 1, "room for 4 workers with 0 CPUs and 1 GPUs each; the cluster's 4 nodes have "
                            "room for 3"),
    ],
)  # fmt: skip
def test_what_a_cluster_lacks(
    placement: str, count: int, cpus: float, gpus: float, lacking: str | None
) -> None:
    config = WorkersConfig(count=count, cpus=cpus, gpus=gpus, placement=placement)
    expected = None if lacking is None else f"workers.placement: {placement} needs {lacking}"
    assert what_lacks(config, NODES) == expected


@pytest.mark.parametrize(
    ("placement", "pools", "fits"),
    [
        # 4 CPUs with 2 GPUs, 8 CPUs, 1 CPU with 1 GPU
        ("pack", [(3, 1, 1), (10, 1, 0)], True),
        ("pack", [(3, 1, 1), (11, 1, 0)], False),
        ("spread", [(2, 1, 1), (1, 8, 0), (1, 1, 1)], True),
        ("spread", [(2, 1, 1), (2, 8, 0)], False),
        ("strict", [(2, 1, 1), (1, 8, 0)], True),
        ("strict", [(3, 1, 1)], False),
        ("strict", [(1, 1, 1), (2, 4, 0)], True),
        ("strict", [(2, 1, 1), (1, 4, 0), (1, 1, 0)], False),
    ],
)
def test_what_a_cluster_lacks_for_workers_that_differ(
    placement: str, pools: list[tuple[int, float, float]], fits: bool
) -> None:
    first, *others = ({"count": n, "cpus": cpus, "gpus": gpus} for n, cpus, gpus in pools)
    others = others or [{"count": 1, "cpus": 1, "gpus": 0}]
    config = WorkersConfig(**first, placement=placement, pools=[PlacesConfig(**o) for o in others])  # type: ignore[arg-type]
    lacking = what_lacks(config, NODES)
    if fits:
        assert lacking is None
    else:
        assert lacking is not None
        for count, cpus, gpus in pools:
            assert f"{count} workers with {cpus:g} CPUs and {gpus:g} GPUs each" in lacking


@pytest.mark.parametrize(
    ("workers", "address", "problem"),
    [
        (
            WorkersConfig(count=2, placement="wide"),
            "auto",
            "'wide' is none of none, pack, spread, strict",
        ),
        (WorkersConfig(count=2, placement="strict"), None, "give the address of a cluster"),
        (WorkersConfig(gang=2, placement="strict"), None, "strict puts 2 workers on as many nodes"),
        (WorkersConfig(cpus=0, placement="spread"), "auto", "need nothing of a node"),
    ],
)
def test_a_spread_that_no_cluster_has_is_refused(
    workers: WorkersConfig, address: str | None, problem: str
) -> None:
    with pytest.raises(BadInputError, match=problem):
        check_placement(workers, address)


def test_a_spread_that_some_cluster_has_is_not() -> None:
    check_placement(WorkersConfig(count=2, placement="strict"), "auto")
    check_placement(WorkersConfig(count=1, placement="strict"), None)
    check_placement(WorkersConfig(count=2, placement="spread"), None)
    check_placement(WorkersConfig(count=2, cpus=0), None)


def test_workers_take_their_own_calls_first_and_then_the_last_of_the_busiest() -> None:
    turns = Turns(7, [0, 1, 0, 1, 1, 1, 0])
    assert [turns.take(0) for _ in range(2)] == [0, 2]
    turns.put_back(2)
    assert [turns.take(0) for _ in range(3)] == [6, 2, 5]
    assert [turns.take(1) for _ in range(2)] == [1, 3]
    assert len(turns) == 1
    assert turns.take(2) == 4  # of a worker that is lost
    assert not turns


def test_calls_that_are_meant_for_nobody_are_taken_in_their_order() -> None:
    turns = Turns(3)
    assert turns.take(4) == 0
    turns.put_back(0)
    assert [turns.take(worker) for worker in (2, 1, 0)] == [1, 2, 0]


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 5), min_size=12))
def test_every_call_is_taken_once(preferred: list[int], takers: list[int]) -> None:
    turns = Turns(len(preferred), preferred)
    taken = [turns.take(worker) for worker in takers[: len(preferred)]]
    assert sorted(taken) == list(range(len(preferred)))
    assert not turns
