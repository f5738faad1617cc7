"""The statistics that every score carries: Wilson intervals and the exact McNemar test (scipy)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

Results = dict[str, dict[str, Any]]
"""Item id -> its result, as `workers.evaluation.ItemResult.to_dict` gives it."""

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Score:
    """The share of right answers on a set of items, with its 95 % Wilson interval."""

    score: float
    n: int
    low: float
    high: float
    unparsed: int
    truncated: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The child against one parent on the same items: exact McNemar test on those that differ."""

    parent: str
    task: str
    """A task, or "all" for the items of every task."""
    child_only: int
    """Items that only the child got right."""
    parent_only: int
    p_value: float
    """Two-sided."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(results: Results) -> Score:
    """The score of one task's results."""
    from scipy.stats import binomtest

    right = sum(result["score"] == 1.0 for result in results.values())
    interval = binomtest(right, len(results)).proportion_ci(CONFIDENCE, method="wilson")
    return Score(
        right / len(results),
        len(results),
        float(interval.low),
        float(interval.high),
        sum(result["unparsed"] for result in results.values()),
        sum(result["truncated"] for result in results.values()),
    )


def compare(child: Results, parent: Results, name: str, task: str) -> Comparison:
    """Exact McNemar test (a binomial test on the discordant items) of child against parent."""
    from scipy.stats import binomtest

    assert child.keys() == parent.keys(), "both must have answered the same items"
    child_only = sum(child[i]["score"] > parent[i]["score"] for i in child)
    parent_only = sum(child[i]["score"] < parent[i]["score"] for i in child)
    discordant = child_only + parent_only
    p_value = float(binomtest(child_only, discordant).pvalue) if discordant else 1.0
    return Comparison(name, task, child_only, parent_only, p_value)


def format_p_value(value: float) -> str:
    """Two digits; the smallest values underflow to 0, which no p-value is."""
    return f"{value:.2g}" if value else "< 1e-300"


def mean_score(results: Results) -> float:
    """The plain mean of one task's results."""
    return math.fsum(result["score"] for result in results.values()) / len(results)


def objective(scores: Iterable[float], kind: str) -> float:
    """Fitness from the scores of the tasks: their `mean`, or the `worst` of them.

    The order of the tasks does not matter, not even to the last bit.
    """
    values = list(scores)
    return min(values) if kind == "worst" else math.fsum(values) / len(values)
