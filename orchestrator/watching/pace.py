"""How fast a campaign goes, by the times of its records: the driver's clock, told and never decided by."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from orchestrator.ledger.ledger import Record

WINDOW_SECONDS = 600.0
"""Rates are those of this last while of the search."""

STAGES = {
    "epoch": "starting",
    "campaign": "starting",
    "asked": "search",
    "selected": "held-out evaluation",
    "examined": "writing the child",
    "child": "writing the child",
    "publishing": "publishing the child",
    "finished": "done",
    "rejected": "done",
}
"""Kind of a record -> what the driver does from then on, where that changes."""


@dataclass(frozen=True)
class Step:
    """What one record brought."""

    time: float
    items: int
    candidates: int


class Pace:
    """Follows the records, in order. A new driver begins anew: nobody knows what lies between two."""

    def __init__(self) -> None:
        self.stage = "starting"
        self.newest: float | None = None
        """When the newest record was written, in seconds since 1970."""
        self._steps: deque[Step] = deque()
        self._races = False

    def apply(self, record: Record) -> None:
        """Take in one record."""
        kind, written = record["kind"], record.get("time")
        self.stage = STAGES.get(kind, self.stage)
        if not isinstance(written, int | float):
            return  # of an earlier version
        self.newest = float(written)
        if kind == "epoch":
            self._steps.clear()
        self._races = self._races or kind == "race"
        step = Step(self.newest, _items(record), self._candidates(record))
        # What was scored before anything was asked is parents.
        if self.stage == "search" and (step.items or step.candidates or not self._steps):
            self._steps.append(step)
            # One from before that while stays: a candidate may take longer.
            while len(self._steps) > 1 and self.newest - self._steps[1].time > WINDOW_SECONDS:
                self._steps.popleft()

    def _candidates(self, record: Record) -> int:
        """How many candidates are through with this record."""
        if record["kind"] == "raced":
            return len(record["told"])
        if self._races or record.get("split") != "search":
            return 0
        return int(bool(record.get("complete") or record.get("given_up")))

    def rates(self) -> tuple[float, float] | None:
        """Items and candidates a second; None before anything is known."""
        if len(self._steps) < 2:
            return None
        span = self._steps[-1].time - self._steps[0].time
        if span <= 0:
            return None
        later = list(self._steps)[1:]
        return sum(s.items for s in later) / span, sum(s.candidates for s in later) / span

    def to_dict(self, candidates_left: int) -> dict[str, Any]:
        """For `--json`: rates while it searches, and how long the rest takes at them."""
        rates = self.rates() if self.stage == "search" else None
        left = candidates_left / rates[1] if rates and rates[1] else None
        return {
            "stage": self.stage,
            "newest_record": self.newest,
            "items_per_second": round(rates[0], 4) if rates else None,
            "candidates_per_hour": round(rates[1] * 3600, 4) if rates else None,
            "seconds_left": None if left is None else round(left, 1),
        }


def _items(record: Record) -> int:
    return sum(map(len, record["items"].values())) if record["kind"] == "scored" else 0
