"""A campaign's metrics, for Prometheus: Ray serves them with its own, on every node's metrics port.

What only grows while a driver lives is a counter; what the ledger knows of the campaign as a whole, of
earlier drivers too, is a gauge. Ray puts `ray_` before the names, and `_total` behind those of counters.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.watching.spending import Seconds
from workers.actors import BYTES_READ, BYTES_WRITTEN, export_traffic

if TYPE_CHECKING:
    from orchestrator.campaign import Campaign

REFRESH_SECONDS = 1.0
"""Gauges are set at most so often: Ray collects them every ten seconds."""

SECONDS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Upper ends of the bins of a histogram of times."""


@dataclass(frozen=True)
class Metric:
    """One metric, as Ray is told of it. Every one has the label `campaign`, too."""

    kind: str
    """`Counter`, `Gauge` or `Histogram`."""
    name: str
    what: str
    labels: tuple[str, ...] = ()

    @property
    def served_as(self) -> str:
        """The name that Prometheus reads; of a histogram, before `_bucket`, `_sum` and `_count`."""
        return f"ray_{self.name}{'_total' if self.kind == 'Counter' else ''}"


METRICS = (
    Metric(
        "Gauge", "darwin_candidates", "Candidates asked for, running, scored, failed", ("state",)
    ),
    Metric("Gauge", "darwin_budget", "Candidates that the campaign may score"),
    Metric("Gauge", "darwin_best_fitness", "Fitness of the best candidate so far"),
    Metric("Gauge", "darwin_workers", "Workers in service, and those at work", ("state",)),
    Metric(
        "Gauge",
        "darwin_used_seconds",
        "Seconds of CPUs and GPUs that merged and scored, failed attempts among them",
        ("resource",),
    ),
    Metric(
        "Gauge",
        "darwin_reserved_seconds",
        "Seconds of workers, and of the CPUs and GPUs reserved for them",
        ("resource",),
    ),
    Metric("Gauge", "darwin_spend", "Reserved worker-hours at `cost.per_hour`", ("currency",)),
    Metric("Counter", "darwin_items", "Items scored", ("split",)),
    Metric("Counter", "darwin_failed_attempts", "Attempts to evaluate that failed"),
    Metric("Counter", "darwin_worker_restarts", "Workers replaced, or that did not start"),
    Metric("Histogram", "darwin_queue_wait_seconds", "How long an evaluation waited for a worker"),
    Metric("Histogram", "darwin_realize_seconds", "How long a worker merged a candidate"),
    Metric("Histogram", "darwin_evaluate_seconds", "How long a worker scored items in one call"),
    Metric("Counter", BYTES_READ, "Bytes that driver and workers read from stores"),
    Metric("Counter", BYTES_WRITTEN, "Bytes that driver and workers wrote to stores"),
)


class Metrics:
    """A watcher that counts. It begins when Ray runs: Ray drops what comes before."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._labels: dict[str, str] = {}
        self._in_service: set[int] = set()
        self._refreshed = float("-inf")

    def begin(self, campaign: Campaign) -> None:
        """See `Watcher`."""

    def stage(self, name: str) -> None:
        """See `Watcher`."""

    def notify(self, campaign: Campaign) -> None:
        """See `Watcher`."""
        if self._open(campaign) and time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            self._refresh(campaign)

    def happened(self, campaign: Campaign, event: Mapping[str, Any]) -> None:
        """See `Watcher`."""
        if not self._open(campaign):
            return
        kind = event["kind"]
        if kind == "worker":
            self._count_worker(event)
        elif kind == "scored":
            self._count_scored(event)
        elif kind == "failed":
            self._add("darwin_failed_attempts", 1)
            self._observe("darwin_queue_wait_seconds", event["waited_seconds"])
        if kind in ("worker", "finished", "rejected"):
            self._refresh(campaign)

    def _open(self, campaign: Campaign) -> bool:
        """Whether Ray runs, so that there are metrics."""
        if self._metrics:
            return True
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return False
        from ray.util import metrics

        self._labels = {"campaign": campaign.config.name}
        for metric in METRICS:
            if metric.name not in (BYTES_READ, BYTES_WRITTEN):
                keys = ("campaign", *metric.labels)
                bins = {"boundaries": list(SECONDS)} if metric.kind == "Histogram" else {}
                make = getattr(metrics, metric.kind)
                self._metrics[metric.name] = make(metric.name, metric.what, tag_keys=keys, **bins)
        export_traffic(campaign.config.name)
        return True

    def _count_worker(self, event: Mapping[str, Any]) -> None:
        if event["state"] == "in service":
            self._in_service.add(event["worker"])
        else:
            self._in_service.discard(event["worker"])
        if event["state"] in ("replaced", "not started"):
            self._add("darwin_worker_restarts", 1)

    def _count_scored(self, record: Mapping[str, Any]) -> None:
        items = sum(map(len, record["items"].values()))
        self._add("darwin_items", items, split=record["split"])
        self._observe("darwin_queue_wait_seconds", record["waited_seconds"])
        self._observe("darwin_realize_seconds", record["realize_seconds"])
        self._observe("darwin_evaluate_seconds", record["score_seconds"])

    def _refresh(self, campaign: Campaign) -> None:
        """Set the gauges."""
        self._refreshed = time.monotonic()
        state, budget = campaign.state, campaign.config.search.evaluations
        busy, failed = campaign.busy_workers, state.given_up(budget)
        counts = {
            "asked": state.asked,
            "scored": state.evaluated(budget) - failed,
            "failed": failed,
        }
        for name, count in {**counts, "running": busy}.items():
            self._set("darwin_candidates", count, state=name)
        self._set("darwin_budget", budget)
        best = state.best(budget)
        if best is not None:
            self._set("darwin_best_fitness", best[1])
        self._set("darwin_workers", len(self._in_service), state="in service")
        self._set("darwin_workers", busy, state="busy")
        spending = state.spending
        used = Seconds()
        for seconds in spending.used.values():
            used.add(seconds)
        for name, found in (("used", used), ("reserved", spending.reserved)):
            for resource in ("worker", "cpu", "gpu"):
                value = getattr(found, resource)
                self._set(f"darwin_{name}_seconds", value, resource=resource)
        if spending.money is not None:
            self._set("darwin_spend", spending.money, currency=spending.price[1])

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._metrics[name].set(value, self._labels | labels)

    def _add(self, name: str, value: float, **labels: str) -> None:
        if value > 0:  # Ray's counters take nothing else
            self._metrics[name].inc(value, self._labels | labels)

    def _observe(self, name: str, value: float) -> None:
        self._metrics[name].observe(max(value, 0.0), self._labels)
