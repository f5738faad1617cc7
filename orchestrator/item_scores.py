"""Results of items that have done their part: what is still asked of them, in few bytes.

A result with its answer takes the driver half a kilobyte or more. Of a candidate's search items nothing but
scores and two flags is wanted once they are recorded; the answers are in the ledger.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from orchestrator.statistics import Results


class ItemScores(Mapping[str, Mapping[str, Any]]):
    """Item id -> its id, score, and whether it was unparsed or truncated; immutable."""

    __slots__ = ("_flags", "_places", "_scores")

    def __init__(self, results: Results, shared: dict[tuple[str, ...], dict[str, int]]) -> None:
        """`shared` keeps the ids of all that have answered the same items in the same order."""
        ids = tuple(results)
        places = shared.get(ids)
        if places is None:
            places = shared[ids] = {item: place for place, item in enumerate(ids)}
        self._places = places
        self._scores = array("d", [result["score"] for result in results.values()])
        flags = bytes([r.get("unparsed", 0) + 2 * r.get("truncated", 0) for r in results.values()])
        self._flags = flags if any(flags) else b""

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

    def scores(self, items: Iterable[str]) -> list[float]:
        """Of these items, in their order."""
        return [self._scores[self._places[item]] for item in items]


def scores_of(results: Results, items: Iterable[str]) -> list[float]:
    """The scores of these items, in their order."""
    if isinstance(results, ItemScores):
        return results.scores(items)
    return [float(results[item]["score"]) for item in items]
