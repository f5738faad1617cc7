"""What the scheduler costs: 1,000 workers whose evaluations do nothing.

    python -m tests.benchmarks.scheduler [--workers N] [--candidates N] [--seconds S] [--campaign N]

The pool, the campaign, its ledger in a folder and all that Ray does for a call are the real ones: references
of calls that are under way, waits for them, results that come over sockets. Only the workers share processes:
a few asynchronous actors stand for hundreds of workers each. An evaluation lasts `--seconds` on average,
between half and one and a half of that, and gives back one item.

Dispatch latency is what a worker sees: from the return of one evaluation to the start of its next one.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import resource
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestrator.config import load_config
from orchestrator.pool.crew import Crew, Worker
from orchestrator.pool.pool import Job, Pool
from orchestrator.workers_config import WorkersConfig
from tests.campaigns import write_campaign
from tests.scripted_campaign import ScriptedCampaign, Stages, run_search
from workers.actors import MergeSpec
from workers.evaluation_worker import Scored
from workers.merging import ParentReference, Recipe

PROCESSES = 4
"""Actors that stand for all workers."""
MOST_MILLISECONDS = 2.0
"""Of the driver's processor time, for a candidate."""
MOST_LATENCY_SECONDS = 0.1
"""At the 99th percentile."""
MOST_GROWTH_BYTES = 100.0
"""Of the driver's memory, for a candidate, in the second half of them."""

POOL = "pool"
CAMPAIGN = "campaign in a folder"

PARENTS = (ParentReference("a", "0" * 64), ParentReference("b", "1" * 64))


class ManyWorkers:
    """Hundreds of workers in one process."""

    def __init__(self, seconds: float, items: dict[str, list[str]]) -> None:
        self._seconds = seconds
        self._items = items
        self._ended: dict[int, float] = {}
        self._beating: list[asyncio.Task[None]] = []
        self._counter: Any = None
        self.latencies: list[float] = []

    async def introduce(self, beats: str, seconds: float, serial: int) -> str:
        self._beating.append(asyncio.create_task(self._beat(beats, seconds, serial)))
        return "the node"

    async def _beat(self, beats: str, seconds: float, serial: int) -> None:
        import ray

        while True:
            await asyncio.sleep(seconds)
            with suppress(ValueError):  # nobody counts yet
                self._counter = self._counter or ray.get_actor(beats)
                await self._counter.beat.remote(serial, 0)

    async def describe(self) -> dict[str, Any]:
        return {}

    async def evaluate(
        self,
        seat: int,
        recipe: dict[str, Any],
        split: str,
        finished: Any,
        seconds: float,
        chosen: Any,
    ) -> Scored:
        if seat in self._ended:
            self.latencies.append(time.monotonic() - self._ended[seat])
        draw = random.Random(str(recipe))
        await asyncio.sleep(self._seconds * draw.uniform(0.5, 1.5))
        items = {
            task: [{"id": one, "score": float(draw.random() < 0.5), "truncated": False,
                    "unparsed": False, "output": ""} for one in ids]
            for task, ids in self._items.items()
        }  # fmt: skip
        self._ended[seat] = time.monotonic()
        return Scored(items, True, 0.0, 0.0)

    async def take_latencies(self) -> list[float]:
        taken, self.latencies = self.latencies, []
        return taken


class Seat:
    """A worker's place in an actor: what the pool has for its handle."""

    def __init__(self, actor: Any, number: int) -> None:
        self.introduce = actor.introduce
        self.describe = actor.describe
        self.evaluate = SimpleNamespace(remote=lambda *given: actor.evaluate.remote(number, *given))


class SeatedCrew(Crew):
    """A crew whose places are seats."""

    seconds: float
    items: dict[str, list[str]]
    actors: list[Any]

    def _new_actor(self, worker: Worker) -> Any:
        import ray

        number = worker.number
        if number == 0:
            seats = -(-self._config.count // PROCESSES)
            kind = ray.remote(num_cpus=0, max_concurrency=seats + 1)(ManyWorkers)
            self.actors = [kind.remote(self.seconds, self.items) for _ in range(PROCESSES)]
        return Seat(self.actors[number % PROCESSES], number)

    def latencies(self) -> list[float]:
        """Of all dispatches since the last question."""
        import ray

        found = ray.get([actor.take_latencies.remote() for actor in self.actors])
        return [latency for own in found for latency in own]

    def __exit__(self, *exception: object) -> None:
        import ray

        self.workers = []  # seats cannot be killed
        for actor in self.actors:
            ray.kill(actor)
        super().__exit__(*exception)


class SeatedPool(Pool):
    """The real pool on such a crew."""

    def __init__(self, count: int, seconds: float, items: dict[str, list[str]]) -> None:
        config = WorkersConfig(count=count, cpus=0)
        super().__init__(MergeSpec({}, None, {}), config, None, lambda description: None)
        crew = SeatedCrew(MergeSpec({}, None, {}), config, None, lambda description: None)
        crew.seconds, crew.items = seconds, items
        self._crew = self._tending._crew = crew

    @property
    def latencies(self) -> list[float]:
        """See `SeatedCrew.latencies`."""
        assert isinstance(self._crew, SeatedCrew)
        return self._crew.latencies()


@dataclass
class Cost:
    """Of a number of candidates."""

    candidates: int
    wall: float
    driver: float
    latencies: list[float]
    growth: float
    """Bytes of the driver's memory for a candidate, in the second half of them."""

    def show(self, name: str) -> bool:
        """Print a line; whether all is as it should be. A campaign remembers its candidates."""
        ranked = sorted(self.latencies)
        p99 = ranked[int(0.99 * (len(ranked) - 1))]
        print(
            f"{name:38} {self.candidates:8} {self.candidates / self.wall:8.0f} "
            f"{1e3 * self.driver / self.candidates:8.2f} {1e3 * statistics.median(ranked):8.1f} "
            f"{1e3 * p99:8.1f} {self.growth:8.0f}",
            flush=True,
        )
        return (
            1e3 * self.driver / self.candidates < MOST_MILLISECONDS
            and p99 < MOST_LATENCY_SECONDS
            and (self.growth < MOST_GROWTH_BYTES or name != POOL)
        )


def processor_seconds() -> float:
    """Of this process, in all its threads: Ray's own work in it is counted."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def resident_bytes() -> int:
    """What this process holds in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_pool(workers: int, candidates: int, seconds: float) -> Cost:
    """The pool alone: jobs are supplied, and progress is dropped. A first round of all workers is not
    counted."""
    left = iter(range(workers + candidates))

    def supply() -> Job | None:
        number = next(left, None)
        if number is None:
            return None
        recipe = Recipe(PARENTS, (), None, number)
        return Job(str(number), recipe, "search")

    with SeatedPool(workers, seconds, {"t": ["0"]}) as pool:
        wall = driver = 0.0
        held = 0
        for done, progress in enumerate(pool.run((), supply), 1):
            assert progress.scored is not None and progress.scored.complete
            if done == workers:
                assert pool.latencies
                wall, driver = time.monotonic(), processor_seconds()
            elif done == workers + candidates // 2:
                held = resident_bytes()
        wall, driver = time.monotonic() - wall, processor_seconds() - driver
        growth = (resident_bytes() - held) / (candidates - candidates // 2)
        assert done == workers + candidates
        return Cost(candidates, wall, driver, pool.latencies, growth)


class SeatedCampaign(ScriptedCampaign):
    """A campaign whose workers are seats."""

    workers_count: int
    seconds: float

    def _make_pool(self) -> Any:
        tasks = self.inputs.tasks
        items = {task.name: [item.id for item in task.items["search"]] for task in tasks}
        self.seated = SeatedPool(self.workers_count, self.seconds, items)
        return self.seated


def measure_campaign(workers: int, candidates: int, seconds: float) -> Cost:
    """A whole search: asks, decoded genomes, ledger records in a folder, tells."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_campaign(
            Path(folder),
            search={"optimizer": "random_steady", "evaluations": candidates},
            genome={"space": "components", "method": "linear"},
            tasks=[{"name": "sort", "search_items": 24, "holdout_items": 24}],
        )
        campaign = SeatedCampaign(load_config(str(file)), Stages())
        campaign.workers_count, campaign.seconds = workers, seconds
        search, found = campaign.search.run, []

        def run() -> None:
            campaign.seated.latencies  # noqa: B018  those of the parents are dropped
            held, wall, driver = resident_bytes(), time.monotonic(), processor_seconds()
            search()
            wall, driver = time.monotonic() - wall, processor_seconds() - driver
            growth = (resident_bytes() - held) / candidates
            found.append(Cost(candidates, wall, driver, campaign.seated.latencies, growth))

        campaign.search.run = run  # type: ignore[method-assign]
        run_search(campaign)
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--campaign", type=int, default=5_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    print(f"{given.workers} workers in {PROCESSES} processes, {given.seconds} s an evaluation")
    print(
        f"{'':38} {'number':>8} {'each s':>8} {'driver':>8} {'median':>8} {'p99':>8} {'growth':>8}\n"
        f"{'':38} {'':8} {'':8} {'CPU ms':>8} {'ms':>8} {'ms':>8} {'bytes':>8}"
    )
    as_wished = True
    if given.candidates:
        as_wished &= measure_pool(given.workers, given.candidates, given.seconds).show(POOL)
    if given.campaign:
        as_wished &= measure_campaign(given.workers, given.campaign, given.seconds).show(CAMPAIGN)
    if not as_wished:
        raise SystemExit(
            f"more than {MOST_MILLISECONDS:g} ms or {1e3 * MOST_LATENCY_SECONDS:g} ms of latency, or the "
            "pool's memory grows: is the machine idle?"
        )


if __name__ == "__main__":
    main()
