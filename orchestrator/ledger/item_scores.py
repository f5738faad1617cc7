"""Results of items that have done their part: what is still asked of them, in few bytes.

A result with its answer takes the driver half a kilobyte or more. Of a candidate's search items nothing but
scores and two flags is wanted once they are recorded; the answers are in the ledger.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from orchestrator.statistics import Results

SharedIds = dict[tuple[str, ...], dict[str, int]]
"""The ids of items, in the order of their answers -> id -> its place: kept once for all candidates that have
answered the same ones."""

_ID_OF = itemgetter("id")
_SCORE_OF = itemgetter("score")


class ItemScores(Mapping[str, Mapping[str, Any]]):
    """Item id -> its id, score, and whether it was unparsed or truncated; immutable."""

    __slots__ = ("_flags", "_places", "_scores")

    def __init__(self, results: Sequence[Mapping[str, Any]], shared: SharedIds) -> None:
        """`results` are of different items: if they are not, this has fewer than them, and is of no use."""
        ids = tuple(map(_ID_OF, results))
        places = shared.get(ids)
        if places is None:
            places = shared[ids] = {item: place for place, item in enumerate(ids)}
        self._places = places
        self._scores = array("d", map(_SCORE_OF, results))
        flags = [r.get("unparsed", 0) + 2 * r.get("truncated", 0) for r in results]
        self._flags = bytes(flags) if any(flags) else b""

    def __getitem__(self, item: str) -> Mapping[str, Any]:
        place = self._places[item]
        flags = self._flags[place] if self._flags else 0
        return {
            "id": item,
            "score": self._scores[place],
            "unparsed": bool(flags & 1),
            "truncated": bool(flags & 2),
        }

    def __contains__(self, item: object) -> bool:
        return item in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def mean(self) -> float:
        """The plain mean; the order of the items does not matter, not even to the last bit."""
        return math.fsum(self._scores) / len(self._scores)

    def scores(self, items: Sequence[str]) -> list[float]:
        """Of these items, in their order."""
        if list(self._places) == items:
            return self._scores.tolist()
        return [self._scores[place] for place in map(self._places.__getitem__, items)]


def scores_of(results: Results, items: Sequence[str]) -> list[float]:
    """The scores of these items, in their order."""
    if isinstance(results, ItemScores):
        return results.scores(items)
    return [float(results[item]["score"]) for item in items]
