"""What the live view says about scores."""

from __future__ import annotations

import math

import pytest

from orchestrator.progress import fitness_interval
from orchestrator.statistics import Results, Score, score


def results(right: int, n: int) -> Results:
    return {
        str(i): {"score": float(i < right), "unparsed": False, "truncated": False} for i in range(n)
    }


def test_a_single_task_keeps_its_own_interval() -> None:
    only = score(results(3, 10))
    for objective in ("mean", "worst"):
        assert fitness_interval({"t": only}, objective) == pytest.approx((only.low, only.high))


def test_the_mean_of_uneven_tasks_lies_in_its_interval() -> None:
    """Pooling the items would give the interval of another number."""
    scores = {"few": score(results(0, 2)), "many": score(results(64, 64))}
    low, high = fitness_interval(scores, "mean")
    assert low < 0.5 < high


def test_the_interval_of_a_mean_is_that_of_equal_normal_tasks() -> None:
    """Two equal symmetric intervals of half-width h: the mean's has h / sqrt(2)."""
    task = Score(0.5, 100, 0.4, 0.6, 0, 0)
    low, high = fitness_interval({"a": task, "b": task}, "mean")
    assert (low, high) == pytest.approx((0.5 - 0.1 / math.sqrt(2), 0.5 + 0.1 / math.sqrt(2)))
