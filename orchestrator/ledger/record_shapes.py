"""What the records of a ledger must be like: each by itself, and among those before it.

Whoever reads a ledger takes its records apart without further questions. A record that was damaged, or that
another program wrote, is refused here, by its place in the store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from orchestrator.objectives import OBJECTIVES
from workers.storage.documents import (
    Shape,
    ShapeError,
    anything,
    each,
    flag,
    is_number,
    keys,
    maybe,
    number,
    one_of,
    plain_key,
    table,
    text,
    whole,
)


def items(value: Any) -> None:
    """Results of items. By columns, as a ledger has millions of them."""
    if type(value) is not list:
        raise ShapeError("is no list")
    try:
        types = [set(map(type, map(field, value))) for field in _FIELDS]
    except (TypeError, LookupError):  # no table, or one without all that is written today
        types = []
    if types != _TYPES or not math.isfinite(sum(map(_SCORE, value))):
        _EACH_ITEM(value)


def item(value: Any) -> None:
    """One of them."""
    if (
        type(value) is not dict
        or type(value.get("id")) is not str
        or not is_number(value.get("score"))
        or type(value.get("truncated", False)) is not bool
        or type(value.get("unparsed", False)) is not bool
        or type(value.get("output", "")) is not str
        or type(value.get("category", "")) is not str
        or not is_number(value.get("calls", 0))
        or not is_number(value.get("tokens", 0))
    ):
        raise ShapeError("is no result of an item")


_FIELDS = [
    itemgetter(field)
    for field in ("id", "score", "truncated", "unparsed", "output", "category", "calls", "tokens")
]
_ID, _SCORE, *_ = _FIELDS
_TYPES: list[set[type]] = [{str}, {float}, {bool}, {bool}, {str}, {str}, {int}, {int}]
"""Of those; others may do as well, and are looked at one by one."""
_EACH_ITEM = each(item)


SPLIT = one_of("search", "holdout")
NUMBERS = table(number)
OF_RACE = {"generation": whole, "candidates": whole}
ENDED = keys(
    {"child": plain_key, "report": plain_key},
    {
        "recipe_id": text,
        "evaluations": whole,
        "holdout": table(table(keys({"score": number}))),
        "holdout_fitness": NUMBERS,
        "comparisons": each(keys({"parent": text, "task": text})),
        "beaten": each(text),
        "gates": table(text),
        "reasons": each(text),
    },
)
RACING = table(
    keys(
        {"ids": each(text)},
        {
            "prior": each(number),
            "weight": each(number),
            "arrival": each(number),
            "slope": each(number),
            "difficulty": each(number),
            "asked": each(text),
        },
    )
)

ALL = keys(
    {"epoch": whole},
    {
        "time": number,
        "worker": whole,
        "waited_seconds": number,
        "used": NUMBERS,
        "reserved": NUMBERS,
    },
)
"""What any record may have beside its own."""

CAMPAIGN: dict[str, Shape] = {
    "epoch": anything,
    "price": keys({"per_hour": maybe(number), "currency": text}),
    "campaign": keys(
        {
            "identity": keys(
                {},
                {
                    "search": keys({"evaluations": whole}),
                    "parents": each(keys({"name": text, "content": text})),
                },
            ),
            "config": keys(
                {},
                {
                    "name": text,
                    "search": keys({"evaluations": whole}),
                    "objective": one_of(*OBJECTIVES),
                },
            ),
        }
    ),
    "engine": keys({"description": table(anything)}),
    "matching": keys({"of": anything, "matching": table(anything)}),
    "prescription": keys({"of": anything, "prescription": table(anything)}),
    "space": keys({"genes": each(text), "removed": each(table(anything))}),
    "round": keys(
        {
            "round": whole,
            "limit": whole,
            "parents": each(keys({"name": text, "recipe": text})),
        }
    ),
    "asked": keys(
        {"candidates": each(keys({"genome": NUMBERS, "recipe": text}), least=1)},
        {"generation": whole, "number": whole, "round": whole},
    ),
    "scored": keys(
        {
            "recipe": text,
            "split": SPLIT,
            "items": table(items),
            "complete": flag,
            "realize_seconds": number,
            "score_seconds": number,
        }
    ),
    "failed": keys({"recipe": text, "split": SPLIT, "error": maybe(text), "given_up": flag}),
    "race": keys(
        OF_RACE
        | {
            "places": whole,
            "standing": NUMBERS,
            "items": RACING,
        }
    ),
    "block": keys(
        OF_RACE | {"block": whole, "stopped": NUMBERS, "failed": each(text), "estimates": NUMBERS}
    ),
    "raced": keys(
        OF_RACE
        | {"stopped": NUMBERS, "estimates": NUMBERS, "told": NUMBERS, "asked": whole, "of": whole}
    ),
    "searched": keys({"reason": text}, {"evaluations": whole}),
    "front": table(anything),
    "selected": keys({"recipe": text, "genome": NUMBERS, "fitness": number}),
    "examined": keys({"recipe": text, "examination": anything, "measured": table(anything)}),
    "routed": keys({"recipe": text, "prompts": anything, "routing": anything}),
    "child": keys({"recipe": text, "folder": plain_key}),
    "publishing": keys({"recipe": text}),
    "finished": ENDED,
    "rejected": ENDED,
}
"""Kind -> what a campaign's records of it are like; what more they have is read by nobody."""

EVALUATION: dict[str, Shape] = {
    "epoch": anything,
    "evaluation": keys(
        {
            "identity": keys(
                {
                    "checkpoint": text,
                    "tasks": table(text),
                    "split": SPLIT,
                    "protocol": table(anything),
                    "engine": table(anything),
                }
            ),
            "location": text,
        }
    ),
    "engine": keys({"description": table(anything)}),
    "scored": keys({"stage": one_of("dev", "judged"), "items": table(items)}),
    "thresholds": keys({"thresholds": table(keys({"threshold": number}))}),
    "evaluated": anything,
}
"""The same of an evaluation's."""


class RecordCheck:
    """Looks at the records of one ledger, in their order."""

    def __init__(self, kinds: Mapping[str, Shape]) -> None:
        self._kinds = kinds
        self._epoch = 0
        self._asked = 0
        self._items: dict[tuple[str, str], dict[str, set[str]] | None] = {}
        """(recipe, split) -> task -> the items it has results of; None where it does not matter any more."""
        self._whole: dict[str, dict[str, int]] = {}
        """Split -> task -> how many items a complete evaluation has."""
        self._races: set[tuple[int, int]] = set()

    def __call__(self, record: dict[str, Any]) -> None:
        """Raise `ValueError` for a record that cannot be the next one."""
        kind = record["kind"]
        shape = self._kinds.get(kind)
        if shape is None:
            raise ShapeError(
                f"of a kind {kind[:80]!r} that this version of Darwin does not know here"
            )
        ALL(record)
        shape(record)
        if record["epoch"] < max(1, self._epoch):
            raise ShapeError("behind a record of a later driver")
        if record["epoch"] > self._epoch and kind != "epoch":
            raise ShapeError("of a driver that has not begun")
        self._epoch = record["epoch"]
        if kind == "asked":
            given = record.get("number", record.get("generation", self._asked))
            if given != self._asked:
                raise ShapeError(f"asked as number {given}, where {self._asked} is next")
            self._asked += 1
        elif kind == "scored" and "complete" in record:
            self._check_complete(record, (record["recipe"], record["split"]))
        elif kind in ("race", "block", "raced"):
            self._check_race(kind, (record["generation"], record["candidates"]))
            for recipe in record.get("told", ()):
                self._items[recipe, "search"] = (
                    None  # those that were stopped may never be complete
                )

    def _check_complete(self, record: dict[str, Any], key: tuple[str, str]) -> None:
        """What is said to be complete has as many items as all that is."""
        known = self._items.setdefault(key, {})
        if known is None:
            return
        for task, items in record["items"].items():
            known.setdefault(task, set()).update(map(_ID, items))
        if record["complete"]:
            self._items[key] = None
            found = {task: len(ids) for task, ids in known.items()}
            if found != self._whole.setdefault(key[1], found) or not all(found.values()):
                raise ShapeError("complete, but without the items of others that are")

    def _check_race(self, kind: str, race: tuple[int, int]) -> None:
        if kind == "race":
            if race[0] >= self._asked:
                raise ShapeError("a race of candidates that were not asked for")
            self._races.add(race)
        elif race not in self._races:
            raise ShapeError("of a race that was not begun")


def campaign_records() -> RecordCheck:
    """For the ledger of a campaign."""
    return RecordCheck(CAMPAIGN)


def evaluation_records() -> RecordCheck:
    """For the ledger of an evaluation."""
    return RecordCheck(EVALUATION)
