"""The statistics that every score carries: Wilson intervals, and paired tests of two models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.resampling import CONFIDENCE, Difference, paired_bootstrap, sign_flip_p_value

Results = Mapping[str, Mapping[str, Any]]
"""Item id -> its result, as `workers.evaluation.ItemResult.to_dict` gives it."""

POWER = 0.8
"""Probability of seeing a difference that is there."""

LEAST_DISCORDANT = 6
"""The fewest items, all in favour of one of two models, that the test calls significant: 2 / 2^6 < 0.05."""

MOST_ITEMS = 1 << 40

WARN_SHARE = 0.02
"""Of answers that were cut off, or from which no answer could be read: with more than this a score is one of
the token limit, or of reading, too, and that is worth a warning."""


@dataclass(frozen=True, slots=True)
class Score:
    """The mean score of a set of items, for most tasks the share of right answers, with its 95 % Wilson
    interval."""

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
    """The child against one parent on the same items: a paired test on those that differ."""

    parent: str
    task: str
    """A task, or "all" for the items of every task."""
    child_only: int
    """Items that only the child got right, or that it got more points for."""
    parent_only: int
    p_value: float
    """Two-sided, of this comparison alone."""
    test: str
    """`mcnemar` (exact), or `sign flip` where items give points between 0 and 1."""
    difference: Difference
    """Of the mean scores, the child's minus the parent's, with a paired bootstrap interval."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(results: Results) -> Score:
    """The score of one task's results, which are between 0 and 1 for each item.

    Wilson 1927. For items that are right or wrong it is the interval of their share. Points between 0 and
    1 vary less than right and wrong answers with the same mean (their variance is at most mean x (1 -
    mean)), so for those the same formula gives an interval that is too wide rather than too narrow.
    """
    n, mean = len(results), mean_score(results)
    squared = _quantile() ** 2
    middle = (mean + squared / (2 * n)) / (1 + squared / n)
    reach = math.sqrt(squared * (mean * (1 - mean) / n + squared / (4 * n * n))) / (1 + squared / n)
    return Score(
        mean,
        n,
        max(0.0, min(mean, middle - reach)),
        min(1.0, max(mean, middle + reach)),
        sum(result["unparsed"] for result in results.values()),
        sum(result["truncated"] for result in results.values()),
    )


def results_by_category(results: Results) -> dict[str, Results]:
    """Category -> the results of its items, in the order of the categories; "" where items have none."""
    parts: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, result in results.items():
        parts.setdefault(result.get("category", ""), {})[name] = result
    return dict(sorted(parts.items()))


def by_category(results: Results) -> dict[str, Score]:
    """Category -> the score of its items; empty if the items have none."""
    parts = results_by_category(results)
    return {} if set(parts) <= {""} else {name: score(own) for name, own in parts.items()}


def compare(child: Results, parent: Results, name: str, task: str) -> Comparison:
    """The paired test of child against parent: exact McNemar, or of points in between a sign flip."""
    given = differences(child, parent)
    return Comparison(
        name,
        task,
        sum(value > 0 for value in given),
        sum(value < 0 for value in given),
        sign_flip_p_value(given),
        "mcnemar" if {abs(value) for value in given} <= {0.0, 1.0} else "sign flip",
        paired_bootstrap([given]),
    )


def differences(child: Results, parent: Results) -> list[float]:
    """Item by item, the child's score minus the parent's."""
    assert child.keys() == parent.keys(), "both must have answered the same items"
    return [child[i]["score"] - parent[i]["score"] for i in child]


def mean_p_value(
    child: Mapping[str, Results], parent: Mapping[str, Results], shares: Mapping[str, float]
) -> float:
    """Two-sided p-value of the mean of the tasks by their `shares`: each item weighs what it adds to it.

    The sign-flip test; for one task of right and wrong answers it is McNemar's.
    """
    return sign_flip_p_value(
        [
            share / len(child[task]) * value
            for task, share in shares.items()
            for value in differences(child[task], parent[task])
        ]
    )


def two_sample_p_value(first: Score, second: Score) -> float:
    """Two-sided p-value of two scores on different items, by the pooled two-proportion z test.

    As with the interval, for points between 0 and 1 it is too large rather than too small.
    """
    pooled = (first.score * first.n + second.score * second.n) / (first.n + second.n)
    error = math.sqrt(pooled * (1 - pooled) * (1 / first.n + 1 / second.n))
    return math.erfc(abs(first.score - second.score) / error / math.sqrt(2)) if error else 1.0


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p-values adjusted so that to reject all that are under 5 % rejects any true one in at most 5 % of
    cases, however they depend on each other (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _quantile() -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + CONFIDENCE) / 2))


def format_p_value(value: float) -> str:
    """Two digits; the smallest values underflow to 0, which no p-value is."""
    return f"{value:.2g}" if value else "< 1e-300"


def mean_score(results: Results) -> float:
    """The plain mean of one task's results."""
    return math.fsum(result["score"] for result in results.values()) / len(results)


def objective(scores: Iterable[float], kind: str, weights: Iterable[float] = ()) -> float:
    """Fitness from the scores of the tasks: their `mean`, the `worst` of them, or their mean by `weights`.

    With the objective `pareto`, which has no one number, it is the mean. The order of the tasks does not
    matter, not even to the last bit.
    """
    values = list(scores)
    if kind == "worst":
        return min(values)
    if kind == "weighted":
        given = list(weights)
        products = (weight * value for weight, value in zip(given, values, strict=True))
        return math.fsum(products) / math.fsum(given)
    return math.fsum(values) / len(values)


def smallest_difference(items: int) -> float | None:
    """The smallest difference in scores that `items` shared items show with a probability of `POWER`.

    In the best case: all items on which two models differ favour the same one, so the exact McNemar test
    needs `LEAST_DISCORDANT` of them, and their number is binomial. None if there are not so many items.
    """
    from scipy.stats import beta

    if items < LEAST_DISCORDANT:
        return None
    return float(beta.ppf(POWER, LEAST_DISCORDANT, items - LEAST_DISCORDANT + 1))


def items_needed(difference: float) -> int:
    """The fewest shared items whose `smallest_difference` is not above this one, which is in (0, 1]."""
    fewest, enough = LEAST_DISCORDANT, LEAST_DISCORDANT
    while (smallest_difference(enough) or 1.0) > difference and enough < MOST_ITEMS:
        fewest, enough = enough + 1, 2 * enough
    while fewest < enough:
        middle = (fewest + enough) // 2
        if (smallest_difference(middle) or 1.0) > difference:
            fewest = middle + 1
        else:
            enough = middle
    return fewest
