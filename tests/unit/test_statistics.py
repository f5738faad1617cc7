"""Intervals and tests, against published values and a plain reference."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb, sqrt
from typing import Any

import pytest

from orchestrator.statistics import Results, compare, mean_score, objective, score


def results(scores: list[float], unparsed: int = 0, truncated: int = 0) -> Results:
    """Results of items 0, 1, ...; the first few of them unparsed or truncated."""
    return {
        str(number): {
            "id": str(number),
            "score": value,
            "unparsed": number < unparsed,
            "truncated": number < truncated,
            "output": "",
        }
        for number, value in enumerate(scores)
    }


def right_and_wrong(right: int, n: int) -> Results:
    return results([1.0] * right + [0.0] * (n - right))


# -- Wilson ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_one(right: int, n: int, low: float, high: float) -> None:
    found = score(right_and_wrong(right, n))
    assert (found.score, found.n) == (right / n, n)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson 1927, equation by hand."""
    z, share = 1.959963984540054, right / n
    middle = share + z * z / (2 * n)
    reach = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)


def test_the_interval_is_the_formula_for_all_small_counts() -> None:
    for n in (1, 2, 5, 17):
        for right in range(n + 1):
            found = score(right_and_wrong(right, n))
            assert (found.low, found.high) == pytest.approx(wilson(right, n), abs=1e-12)
            assert 0.0 <= found.low <= found.score <= found.high <= 1.0


def test_a_score_counts_what_went_wrong_on_the_way() -> None:
    found = score(results([1.0, 0.0, 1.0, 0.0], unparsed=1, truncated=3))
    assert found.to_dict() == {
        "score": 0.5, "n": 4, "low": found.low, "high": found.high, "unparsed": 1, "truncated": 3,
    }  # fmt: skip


# -- McNemar ---------------------------------------------------------------------------------


def exact_p(first: int, second: int) -> Fraction:
    """Two-sided exact binomial test at 1/2: all outcomes at most as likely as this one."""
    n = first + second
    ways = comb(n, first)
    return Fraction(sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= ways), 2**n)


def pair(child_only: int, parent_only: int, both: int, neither: int) -> tuple[Results, Results]:
    child = [1.0] * child_only + [0.0] * parent_only + [1.0] * both + [0.0] * neither
    parent = [0.0] * child_only + [1.0] * parent_only + [1.0] * both + [0.0] * neither
    return results(child), results(parent)


@pytest.mark.parametrize(("child_only", "parent_only"), [*itertools.product(range(8), range(8))])
def test_the_p_value_is_the_exact_binomial_sum(child_only: int, parent_only: int) -> None:
    found = compare(*pair(child_only, parent_only, both=3, neither=2), "mother", "sort")
    assert (found.child_only, found.parent_only) == (child_only, parent_only)
    assert found.p_value == pytest.approx(float(exact_p(child_only, parent_only)), rel=1e-9)
    assert (found.parent, found.task) == ("mother", "sort")


def test_larger_counts_and_their_direction() -> None:
    child, parent = pair(40, 15, both=100, neither=57)
    found, mirrored = compare(child, parent, "p", "all"), compare(parent, child, "p", "all")
    assert found.p_value == pytest.approx(float(exact_p(40, 15)), rel=1e-9)
    assert found.p_value < 0.05
    assert mirrored.p_value == pytest.approx(found.p_value, rel=1e-12)
    assert (mirrored.child_only, mirrored.parent_only) == (15, 40)


def test_equal_answers_prove_nothing() -> None:
    assert compare(*pair(0, 0, both=5, neither=5), "p", "t").p_value == 1.0
    assert compare(*pair(0, 0, both=0, neither=1), "p", "t").p_value == 1.0


def test_the_order_of_the_items_does_not_matter() -> None:
    child, parent = pair(6, 1, both=2, neither=2)
    shuffled = dict(reversed(list(parent.items())))
    assert compare(child, shuffled, "p", "t") == compare(child, parent, "p", "t")


def test_only_the_same_items_can_be_compared() -> None:
    child, parent = pair(2, 1, both=1, neither=1)
    del parent["0"]
    with pytest.raises(AssertionError, match="same items"):
        compare(child, parent, "p", "t")


# -- fitness ---------------------------------------------------------------------------------


def test_the_mean_score_is_the_share_of_right_answers() -> None:
    assert mean_score(right_and_wrong(3, 8)) == 0.375
    assert mean_score(right_and_wrong(0, 3)) == 0.0


def test_the_objective_is_the_mean_or_the_worst() -> None:
    scores = [0.25, 0.75, 0.5]
    assert objective(scores, "mean") == 0.5
    assert objective(scores, "worst") == 0.25
    assert objective(iter(scores), "mean") == 0.5
    assert objective([0.125], "mean") == objective([0.125], "worst") == 0.125


@pytest.mark.parametrize("kind", ["mean", "worst"])
def test_the_order_of_the_tasks_does_not_reach_the_last_bit(kind: str) -> None:
    scores: list[Any] = [0.1, 0.2, 0.3, 0.7]  # left to right, these sum to different numbers
    assert len({sum(order) for order in itertools.permutations(scores)}) > 1
    assert len({objective(order, kind) for order in itertools.permutations(scores)}) == 1
