"""What a campaign costs, from its ledger: seconds of CPUs and GPUs that it used, and that it reserved.

Used is what merged and scored candidates: the time of that, times what Ray reserves for the worker (or the
gang). An attempt that failed counts from its call to its failure. Reserved is all the time that workers were
there, loading, idle or at work: what a cluster would bill.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.ledger.ledger import Record
from orchestrator.watching_config import CostConfig

HOUR = 3600.0
SHORT = HOUR / 10
"""Less than so much is told in seconds."""


@dataclass
class Seconds:
    """Of workers, and of the CPUs and GPUs that Ray reserves for them."""

    worker: float = 0.0
    cpu: float = 0.0
    gpu: float = 0.0

    def add(self, other: Seconds, times: float = 1.0) -> None:
        """Add the other's, so many times."""
        self.worker += other.worker * times
        self.cpu += other.cpu * times
        self.gpu += other.gpu * times

    def of(self, unit: str) -> float:
        """Those of a GPU or a CPU."""
        return self.gpu if unit == "GPU" else self.cpu

    def to_dict(self) -> dict[str, float]:
        """For a record, without what is nothing."""
        found = {"worker": self.worker, "cpu": self.cpu, "gpu": self.gpu}
        return {name: round(value, 3) for name, value in found.items() if value}

    @classmethod
    def parse(cls, found: Any) -> Seconds:
        """What `to_dict` made; nothing in records of earlier versions."""
        given = found if isinstance(found, Mapping) else {}
        return cls(*(float(given.get(name, 0.0)) for name in ("worker", "cpu", "gpu")))


class Spending:
    """What the records told so far; `apply` takes them in order."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.used: dict[str, Seconds] = {}
        """Seconds of `candidates` and `parents` on search items, of the `holdout`, and of `failed`
        attempts."""
        self.reserved = Seconds()
        self.price: tuple[float | None, str] = None, CostConfig.currency
        """Of a worker for an hour, if it is known, and the currency."""
        self._asked: set[str] = set()
        for record in records:
            self.apply(record)

    def apply(self, record: Record) -> None:
        """Take in one record."""
        if record["kind"] == "price":
            self.price = record["per_hour"], record["currency"]
        if "reserved" in record:
            self.reserved.add(Seconds.parse(record["reserved"]))
        if record["kind"] == "asked":
            self._asked.update(candidate["recipe"] for candidate in record["candidates"])
        if "used" in record:
            for_what = record["split"]
            if record["kind"] == "failed":
                for_what = "failed"
            elif for_what == "search":
                for_what = "candidates" if record["recipe"] in self._asked else "parents"
            self.used.setdefault(for_what, Seconds()).add(Seconds.parse(record["used"]))

    @property
    def unit(self) -> str:
        """What is counted: GPUs if there are any, else CPUs."""
        return "GPU" if self.reserved.gpu > 0 else "CPU"

    @property
    def total_used(self) -> float:
        """Seconds of the unit."""
        return sum(seconds.of(self.unit) for seconds in self.used.values())

    @property
    def money(self) -> float | None:
        """The price of all reserved time; None without a price."""
        per_hour, _ = self.price
        return None if per_hour is None else per_hour * self.reserved.worker / HOUR

    def to_dict(self, candidates: int) -> dict[str, Any] | None:
        """For `--json`, given how many candidates were scored; None if nothing is known."""
        if not self.reserved.worker:
            return None
        unit = self.unit
        searched = self.used.get("candidates", Seconds()).of(unit)
        return {
            "unit": unit,
            "used_seconds": round(self.total_used, 3),
            "reserved_seconds": round(self.reserved.of(unit), 3),
            "worker_seconds": round(self.reserved.worker, 3),
            "used_for": {name: round(own.of(unit), 3) for name, own in sorted(self.used.items())},
            "seconds_per_candidate": round(searched / candidates, 3) if candidates else None,
            "price": {"per_hour": self.price[0], "currency": self.price[1]},
            "money": None if self.money is None else round(self.money, 4),
        }


def cost_words(cost: Mapping[str, Any]) -> str:
    """The cost, as `Spending.to_dict` gives it, in a sentence without its full stop."""
    unit = cost["unit"]
    words = f"{hours(cost['reserved_seconds'], unit)} reserved, {hours(cost['used_seconds'], unit)} used"
    if cost["seconds_per_candidate"] is not None:
        words += f", {number(cost['seconds_per_candidate'])} {unit}-seconds a candidate"
    if failed := cost["used_for"].get("failed"):
        words += f", {hours(failed, unit)} in attempts that failed"
    if cost["money"] is not None:
        words += f"; {money_words(cost)}"
    return words


def money_words(cost: Mapping[str, Any]) -> str:
    """The money, and the price it comes from."""
    price = cost["price"]
    return (
        f"{price['currency']} {cost['money']:,.2f} at {price['per_hour']:g} a worker-hour "
        f"({number(cost['worker_seconds'] / HOUR)} worker-hours)"
    )


def hours(seconds: float, unit: str) -> str:
    """In hours of the unit, or in seconds."""
    if seconds < SHORT:
        return f"{number(seconds)} {unit}-seconds"
    return f"{number(seconds / HOUR)} {unit}-hours"


def number(value: float) -> str:
    """With three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 or value == 0 else "under 0.001"
