"""Whole campaigns in this process, with right and wrong answers by a script instead of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from orchestrator.campaign import Campaign
from orchestrator.config import GATES, load_config
from orchestrator.pool.calls import LocalCalls
from orchestrator.pool.pool import Job, Progress
from tests.campaigns import write_campaign
from workers.evaluation.task import Item, Task, choose_items
from workers.evaluation_worker import EvaluationWorker, Scored, WorkerSpec
from workers.merging import Recipe

Answers = Callable[[Recipe, Item], bool]
"""Whether the recipe's child answers the item right."""


class CandidateFailedError(Exception):
    """What `answers` raises for a recipe that no worker can evaluate."""


class ScriptedPool:
    """What a campaign needs of its pool. All but the answers is done for true, by this process."""

    idle_seconds = 0.0
    busy = 0

    def __init__(self, campaign: Campaign, answers: Answers) -> None:
        inputs = campaign.inputs
        self.tasks: tuple[Task, ...] = inputs.tasks
        self.answers = answers
        self.evaluated: list[str] = []
        references = (*inputs.references, inputs.base_reference)
        self.worker = EvaluationWorker(
            WorkerSpec(
                parents={name: parent.location for name, parent in inputs.parents.items()},
                base=inputs.base.location if inputs.base else None,
                fingerprints={r.name: r.fingerprint for r in references if r is not None},
                threads=1,
                tasks=self.tasks,
                block_items=8,
                engine={"dtype": "float32", "device": "cpu", "threads": 1},
            )
        )
        self.worker.parents, self.worker.base = inputs.parents, inputs.base
        self.calls = LocalCalls(self.worker)
        self.called: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    at_once = 1
    """So many jobs run at the same time; of these the one with the smallest key ends first."""
    in_parts = False
    """Whether results come task by task, as those of a long evaluation do."""

    def run(
        self, jobs: Iterable[Job], supply: Callable[[], Job | None] = lambda: None
    ) -> Iterator[Progress]:
        for job in self._ending(list(jobs), supply):
            self.evaluated.append(job.key)
            try:
                items = self._items(job)
            except CandidateFailedError as error:
                yield Progress(job, 0, error=str(error), given_up=True)
                continue
            if self.in_parts:
                for task in list(items)[:-1]:
                    yield Progress(job, 0, Scored({task: items.pop(task)}, False, 0.0, 0.0))
            yield Progress(job, 0, Scored(items, True, 0.0, 0.0))

    def _items(self, job: Job) -> dict[str, list[dict[str, Any]]]:
        items = {
            task.name: [
                {"id": item.id, "score": float(self.answers(job.recipe, item)),
                 "truncated": False, "unparsed": False, "output": ""}
                for item in choose_items(task.items[job.split], job.chosen, task.name)
                if item.id not in job.finished.get(task.name, ())
            ]
            for task in self.tasks
        }  # fmt: skip
        return {task: own for task, own in items.items() if own}

    def _ending(self, given: list[Job], supply: Callable[[], Job | None]) -> Iterator[Job]:
        """Those given, in their order; then those supplied, in the order in which they end."""
        yield from given
        running: list[Job] = []
        while True:
            while len(running) < self.at_once and (job := supply()) is not None:
                running.append(job)
            if not running:
                return
            ended = min(running, key=lambda job: job.key)
            running.remove(ended)
            yield ended

    workers = 1

    def group_bytes(self, total: int) -> int:
        return self.calls.group_bytes(total)

    def each(
        self, method: str, arguments: list[tuple[Any, ...]], preferred: Any = None
    ) -> Iterator[tuple[int, Any]]:
        self.called.append(method)
        if method == "examine" and self.worker.engine is None:
            self.worker.describe()  # the only call that needs the live model
        return self.calls.each(method, arguments, preferred)


class ScriptedCampaign(Campaign):
    """A campaign whose candidates answer as `answers` says."""

    answers: Answers

    def _make_pool(self) -> Any:
        self.scripted = ScriptedPool(self, self.answers)
        return self.scripted


class Stages:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def begin(self, campaign: Campaign) -> None:
        pass

    def stage(self, name: str) -> None:
        self.names.append(name)

    def notify(self, campaign: Campaign) -> None:
        pass

    def happened(self, campaign: Campaign, event: Mapping[str, Any]) -> None:
        pass


def run_search(campaign: ScriptedCampaign) -> None:
    """Run the campaign until its winner is recorded, as if its driver were stopped then."""

    def stop(name: str) -> None:
        if name == "held-out evaluation":
            raise KeyboardInterrupt

    campaign.watcher.stage = stop  # type: ignore[method-assign]
    with suppress(KeyboardInterrupt):
        campaign.run()


def scripted(folder: Path, answers: Answers, **changes: Any) -> ScriptedCampaign:
    """A small campaign of the shipped family's first two parents, not begun; `changes` as in its file.

    Gates do not reject: what a script answers says nothing of the child.
    """
    parents = [{"name": skill, "path": f"shipped:strings/{skill}"} for skill in ("reverse", "sort")]
    settings = {"parents": parents, "health": {"allow": list(GATES)}} | changes
    file = write_campaign(folder, **settings)
    campaign = ScriptedCampaign(load_config(str(file)), Stages())
    campaign.answers = answers
    return campaign
