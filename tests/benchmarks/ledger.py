"""How long a campaign with a long ledger takes to be resumed, and what a candidate takes of its memory.

    python -m tests.benchmarks.ledger [--records 100000] [--optimizer archive|cma_es] [--s3]

Campaign, search, optimizer, state and ledger are the real ones; candidates answer at once by a rule. A first
driver, a process of its own, searches until the ledger has so many records and is killed; then another one
resumes until it asks for a candidate that is new. Seconds are of the processor (user and system), and of the
clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from orchestrator.campaign import Campaign
from orchestrator.cli import OBJECTS_BETWEEN_COLLECTIONS
from orchestrator.config import load_config
from orchestrator.overview import campaign_overview
from orchestrator.pool.pool import Job, Progress
from tests.campaigns import write_campaign
from tests.scripted_campaign import Stages
from tests.servers import seaweedfs_server
from workers.evaluation.task import Task, choose_items
from workers.evaluation_worker import Scored

MEMORY = "/dev/shm"
"""Where the folder is kept: what a disk takes is no part of it."""
WORKERS = 16
ITEMS = 24
"""Of each of three tasks."""

gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)  # in each of the processes, as in that of `darwin`


class RecordsWrittenError(BaseException):
    """The ledger is as long as was asked for."""


class QuickPool:
    """Evaluates at once. Several candidates are open at a time; the one with the smallest key ends first."""

    idle_seconds = 0.0
    busy = 0
    workers = WORKERS

    def __init__(self, tasks: tuple[Task, ...], ended: Callable[[], None]) -> None:
        self.tasks = tasks
        self.ended = ended
        self.known: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> QuickPool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(
        self, jobs: Iterable[Job], supply: Callable[[], Job | None] = lambda: None
    ) -> Iterator[Progress]:
        open_jobs = list(jobs)
        while True:
            while len(open_jobs) < WORKERS and (job := supply()) is not None:
                open_jobs.append(job)
            if not open_jobs:
                return
            job = min(open_jobs, key=lambda job: job.key)
            open_jobs.remove(job)
            self.ended()
            yield Progress(job, 0, Scored(self._items(job), True, 0.1, 2.0))

    def _items(self, job: Job) -> dict[str, list[dict[str, Any]]]:
        bits = int(job.recipe.id, 16)
        found = {}
        for number, task in enumerate(self.tasks):
            finished = job.finished.get(task.name, ())
            found[task.name] = [
                {"id": item.id, "score": float(bits >> (number * ITEMS + place) & 1),
                 "truncated": False, "unparsed": False, "output": f"answer {place} of {job.key[:8]}",
                 "category": "", "calls": 1, "tokens": 9}
                for place, item in enumerate(choose_items(task.items[job.split], job.chosen, task.name))
                if item.id not in finished
            ]  # fmt: skip
        return found


class QuickCampaign(Campaign):
    """A campaign on such a pool."""

    ended: Callable[[], None]

    def _make_pool(self) -> Any:
        return QuickPool(self.inputs.tasks, self.ended)


def campaign(file: Path) -> QuickCampaign:
    return QuickCampaign(load_config(str(file)), Stages())


def used() -> float:
    """Seconds of the processor that this process has taken."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def write_records(file: Path, records: int, told: Any) -> None:
    """Search until there are so many records, then be killed."""
    found = campaign(file)
    start = used(), time.monotonic(), resident()

    def ended() -> None:
        if len(found.ledger.records) >= records:
            raise RecordsWrittenError

    found.ended = ended
    with suppress(RecordsWrittenError):
        found.run()
    candidates = len(found.state.evaluations)
    told.put(
        {
            "seconds": used() - start[0],
            "clock": time.monotonic() - start[1],
            "records": len(found.ledger.records),
            "candidates": candidates,
            "bytes": (resident() - start[2]) / candidates,
        }
    )


def resume(file: Path, told: Any) -> None:
    """Resume until something new is evaluated."""
    found = campaign(file)
    start = used(), time.monotonic(), resident()
    marks: dict[str, tuple[float, float]] = {}

    def stage(name: str) -> None:
        marks.setdefault(name, (used(), time.monotonic()))

    found.watcher.stage = stage  # type: ignore[method-assign]

    def ended() -> None:
        raise RecordsWrittenError

    found.ended = ended
    with suppress(RecordsWrittenError):
        found.run()
    read = marks["search"]
    told.put(
        {
            "read": read[0] - start[0],
            "read, clock": read[1] - start[1],
            "replay": used() - read[0],
            "replay, clock": time.monotonic() - read[1],
            "bytes": (resident() - start[2]) / len(found.state.evaluations),
        }
    )


def overview(place: str, told: Any) -> None:
    start = used(), time.monotonic()
    campaign_overview(place)
    told.put({"seconds": used() - start[0], "clock": time.monotonic() - start[1]})


def apart(work: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """What the work tells, done by a process of its own."""
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    process = context.Process(target=work, args=(*arguments, told))
    process.start()
    while not told._poll(0.5):  # type: ignore[attr-defined]
        assert process.exitcode in (None, 0), f"ended with {process.exitcode}"
    found: dict[str, float] = told.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--optimizer", default="archive")
    parser.add_argument("--s3", action="store_true", help="on SeaweedFS instead of a folder")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY)))
        store = str(folder)
        if arguments.s3:
            import boto3

            os.environ |= stack.enter_context(seaweedfs_server()).environment
            boto3.client("s3").create_bucket(Bucket="ledger")
            store = "s3://ledger"
        file = write_campaign(
            folder,
            store=store,
            tasks=[
                {"name": skill, "search_items": ITEMS, "holdout_items": ITEMS}
                for skill in ("reverse", "sort", "shift")
            ],
            search={"optimizer": arguments.optimizer, "evaluations": 10**6, "population": 16},
        )
        first = apart(write_records, file, arguments.records)
        second = apart(resume, file)
        status = apart(overview, f"{store}/small")
    print(json.dumps({"first": first, "resumed": second, "status": status}, indent=1))


if __name__ == "__main__":
    main()
