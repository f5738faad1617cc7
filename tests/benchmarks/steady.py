"""How busy searches with generations and without keep 16 workers whose evaluations take 1 to 5 minutes.

    python -m tests.benchmarks.steady

The searches, the scheduling of the pool and the ledger are the real ones; only workers and the clock are
simulated. An evaluation takes a time that its recipe decides, and gives back what it has scored every 20 s,
as a real one; to record something, and to ask the optimizer, the driver takes a time in which it does
nothing else.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from orchestrator.config import load_config
from orchestrator.pool.crew import Worker
from orchestrator.pool.pool import Pool, Progress
from orchestrator.pool.waiting import Waiting
from tests.campaigns import write_campaign
from tests.scripted_campaign import ScriptedCampaign, Stages, run_search
from workers.evaluation.task import Task
from workers.evaluation_worker import Scored

WORKERS = 16
EVALUATIONS = 320
SHORTEST, LONGEST = 60.0, 300.0
"""Seconds of an evaluation: drawn evenly between these, so 5 times apart."""
RECORD_SECONDS = 0.1
"""One write into the ledger, as to a bucket far away."""
MEMORY = "/dev/shm"
"""Where the simulated campaigns are kept: a disk's real seconds would only make one wait."""
ASK_SECONDS = 0.2
"""An ask, and the decoding of its genome."""


@dataclass
class Clock:
    """Simulated time, and when workers were busy in it."""

    now: float = 0.0
    work: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each call, of all workers."""
    asked: float = 0.0
    """When the last candidate was asked for."""

    def busy_share(self, begin: float, end: float) -> float:
        """Of all workers' time between the two."""
        busy = sum(max(0.0, min(end, last) - max(begin, first)) for first, last in self.work)
        return busy / (WORKERS * (end - begin))


@dataclass
class SimulatedWorker:
    """In the place of a Ray actor."""

    tasks: tuple[Task, ...]
    clock: Clock
    ends: float = 0.0
    result: Scored | None = None
    evaluate: Any = field(init=False)

    def __post_init__(self) -> None:
        self.evaluate = SimpleNamespace(remote=self._evaluate)

    def _evaluate(
        self,
        recipe: dict[str, Any],
        split: str,
        finished: dict[str, list[str]],
        seconds: float,
        chosen: None,
    ) -> object:
        left = [
            (task.name, item.id)
            for task in self.tasks
            for item in task.items[split]
            if item.id not in finished.get(task.name, ())
        ]
        count = sum(len(task.items[split]) for task in self.tasks)
        draw = random.Random(str(recipe))
        each = draw.uniform(SHORTEST, LONGEST) / count
        now = left[: max(1, round(seconds / each))]
        items: dict[str, list[dict[str, Any]]] = {}
        for task, item in now:
            right = float(random.Random(f"{recipe}{item}").random() < 0.5)
            items.setdefault(task, []).append({"id": item, "score": right})
        self.ends = self.clock.now + each * len(now)
        self.clock.work.append((self.clock.now, self.ends))
        self.result = Scored(items, len(now) == len(left), 0.0, each * len(now))
        return object()


class SimulatedPool(Pool):
    """The real pool over simulated workers: only waiting for them is another."""

    def __init__(self, tasks: tuple[Task, ...], clock: Clock) -> None:
        self.idle_seconds = self._collected = 0.0
        self.clock = clock
        places = [Worker(n, n, SimulatedWorker(tasks, clock)) for n in range(WORKERS)]
        self._crew: Any = SimpleNamespace(workers=places, must_move=lambda worker: False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def _collect(self, waiting: Waiting, seconds: float) -> list[Progress]:
        if not seconds:
            return []
        worker = min(
            (worker for worker in self._workers if worker.job is not None),
            key=lambda worker: worker.actor.ends,
        )
        # One that ended while the driver was busy has waited for it.
        self.clock.now = max(self.clock.now, worker.actor.ends)
        return [self._take(worker, waiting, worker.actor.result)]


class SimulatedCampaign(ScriptedCampaign):
    """A campaign whose records and asks take simulated time. Its parents are scored before it begins."""

    def __init__(self, config: Any, watcher: Any, clock: Clock) -> None:
        self.clock = clock
        super().__init__(config, watcher)

    def _make_pool(self) -> Any:
        return SimulatedPool(self.inputs.tasks, self.clock)

    def record(self, kind: str, **content: Any) -> None:
        super().record(kind, **content)
        self.clock.now += RECORD_SECONDS
        if kind == "asked":
            self.clock.now += ASK_SECONDS * len(content["candidates"])
            self.clock.asked = self.clock.now


def measure(
    optimizer: str, population: int | None, seed: int, evaluations: int = EVALUATIONS
) -> tuple[float, float, float]:
    """One search: its hours, and the busy share of the workers until the last candidate was asked for, and
    until the last one was scored."""
    clock = Clock()
    with tempfile.TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None) as folder:
        file = write_campaign(
            Path(folder),
            search={"optimizer": optimizer, "evaluations": evaluations, "population": population},
            genome={"space": "components", "method": "linear"},
            tasks=[{"name": "sort", "search_items": 24, "holdout_items": 24}],
            seed=seed,
        )
        campaign = SimulatedCampaign(load_config(str(file)), Stages(), clock)
        search = campaign.search.run
        ends: list[float] = []

        def run() -> None:
            ends.append(clock.now)
            search()
            ends.append(clock.now)

        campaign.search.run = run  # type: ignore[method-assign]
        run_search(campaign)
    begin, end = ends
    return (end - begin) / 3600, clock.busy_share(begin, clock.asked), clock.busy_share(begin, end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    print(
        f"{WORKERS} workers, {EVALUATIONS} evaluations of {SHORTEST:.0f} to {LONGEST:.0f} s, "
        f"{RECORD_SECONDS} s a record, {ASK_SECONDS} s an ask; median of {len(seeds)} seeds"
    )
    print(f"{'search':28} {'busy while it asks':>20} {'busy to its end':>17} {'hours':>7}")
    for name, optimizer, population in (
        ("cma_es, its own population", "cma_es", None),
        ("cma_es, population 16", "cma_es", 16),
        ("cma_es, population 48", "cma_es", 48),
        ("random_steady", "random_steady", None),
        ("archive", "archive", None),
    ):
        found = [measure(optimizer, population, seed) for seed in seeds]
        hours, asking, whole = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{name:28} {asking:20.1%} {whole:17.1%} {hours:7.2f}", flush=True)


if __name__ == "__main__":
    main()
