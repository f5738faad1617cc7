"""One evaluation against another on the same items: exact McNemar test and paired bootstrap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orchestrator.config import differing_keys
from orchestrator.evaluating.evaluation import Recorded
from orchestrator.resampling import Difference, paired_bootstrap
from orchestrator.statistics import Results, compare, differences, mean_p_value, score
from workers.errors import BadInputError

SAME = ("split", "protocol", "tasks")
"""What two evaluations must have in common to be compared; the protocol has the seed."""


def check_comparable(identity: dict[str, Any], other: Recorded) -> None:
    """Raise `BadInputError` if an evaluation of this identity asks other questions, or in another way."""
    for key in SAME:
        different = differing_keys({key: other.identity[key]}, {key: identity[key]})
        if different:
            raise BadInputError(
                f"{other.place}: cannot be compared with this evaluation, as they differ in "
                f"{', '.join(different)}: a difference in scores would not be one between models"
            )


def compare_evaluations(own: Recorded, other: Recorded) -> dict[str, Any]:
    """The difference own - other, for each task and over all items.

    The interval is the 95 % percentile interval of the mean paired difference; over all items each task
    counts the same, in the interval and in the test. Raises `BadInputError` as `check_comparable` does.
    """
    check_comparable(own.identity, other)
    names = list(own.results)
    for name, results in own.results.items():
        if other.results.get(name, {}).keys() != results.keys():
            raise BadInputError(
                f"{other.place}: has not the results of all items of task {name}: its records are damaged; "
                "evaluate that checkpoint again, into another --out"
            )
    compared = {name: _of_task(own.results[name], other.results[name]) for name in names}
    scores = {name: score(results).score for name, results in other.results.items()}
    if len(names) > 1:
        compared["all"] = _over_all(own.results, other.results)
        scores["all"] = math.fsum(scores.values()) / len(scores)
    return {
        "checkpoint": other.location,
        "evaluation": other.place,
        "scores": scores,
        "tasks": compared,
        "warnings": _engine_warnings(own, other),
    }


def _over_all(own: Mapping[str, Results], other: Mapping[str, Results]) -> dict[str, Any]:
    """Of the mean of the tasks: interval and p-value are both of this one number."""
    given = [differences(own[task], other[task]) for task in own]
    return {
        "only_this": sum(value > 0 for values in given for value in values),
        "only_other": sum(value < 0 for values in given for value in values),
        "p_value": mean_p_value(own, other, dict.fromkeys(own, 1 / len(own))),
        "test": "sign flip",
        **_interval(paired_bootstrap(given)),
    }


def _of_task(own: Results, other: Results) -> dict[str, Any]:
    paired = compare(own, other, "", "")
    return {
        "only_this": paired.child_only,
        "only_other": paired.parent_only,
        "p_value": paired.p_value,
        "test": paired.test,
        **_interval(paired.difference),
    }


def _interval(difference: Difference) -> dict[str, float]:
    return {"difference": difference.mean, "low": difference.low, "high": difference.high}


def _engine_warnings(own: Recorded, other: Recorded) -> list[str]:
    """How the engines differ, but for what follows from another checkpoint."""
    ours, theirs = (
        {**(one.description or {}), "engine_settings": one.identity["engine"]}
        for one in (own, other)
    )
    of_checkpoint = (
        "model", "probe_tokens", "chat_tokens", "chat_template", "bos", "put_before", "put_after",
        "special_tokens",
    )  # fmt: skip
    different = [
        key for key in differing_keys(theirs, ours) if key.split(".")[0] not in of_checkpoint
    ]
    if not different:
        return []
    return [f"{other.place} was evaluated by another engine: {', '.join(different)} differ"]
