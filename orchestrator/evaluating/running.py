"""Run an evaluation, or go on with it: in this process, or on a pool of Ray workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator.engine_description import engine_changes
from orchestrator.errors import PoolError
from orchestrator.evaluating.evaluation import ADDRESS, RECORDS, Evaluation, Recorded, read_recorded
from orchestrator.evaluating.threshold import fix_threshold
from orchestrator.ledger.lease import acquire_lease
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.record_shapes import evaluation_records
from orchestrator.pool.pool import Job, Pool
from orchestrator.workers_config import WorkersConfig
from workers.errors import BadInputError
from workers.evaluation.protocols import Protocol
from workers.evaluation.protocols.retrying import ConfidenceRetry
from workers.evaluation.task import make_batches
from workers.merging import ParentReference, Recipe, passthrough_recipe
from workers.storage import Store, check_store

if TYPE_CHECKING:
    from workers.evaluation_worker import EvaluationWorker, Scored, WorkerSpec

RECORD_SECONDS = 2.0
"""In this process, results are recorded about so often; at most a block is lost."""

PARTS_PER_WORKER = 4
"""Items are dealt into so many parts for each worker, so that none waits long for the last one."""

NAME = "checkpoint"
"""What the one parent of the recipe is called."""

Finished = dict[str, list[str]]
"""Task -> ids of items that need no scoring any more."""


@dataclass(frozen=True)
class Machines:
    """Where it runs: in this process, or on `workers` of the Ray cluster at `address`, or of this machine."""

    workers: WorkersConfig | None = None
    address: str | None = None


def run_evaluation(
    evaluation: Evaluation,
    out: Store,
    machines: Machines,
    say: Callable[[str], None],
    notify: Callable[[int], None],
) -> Recorded:
    """Score what is not recorded yet; the finished record. `notify` is told numbers of items.

    Raises `BadInputError` for input that cannot work and where the engine has changed meanwhile,
    `LeaseLostError` if another process takes over, `PoolError` if workers keep failing.
    """
    store = evaluation.store(out)
    ledger = Ledger(store.substore(RECORDS), check=evaluation_records())
    recorded = read_recorded(store, ledger.records)
    if recorded.complete:
        say("all of it is recorded; nothing is asked again")
        return recorded
    parts = (*recorded.dev_results.values(), *recorded.results.values())
    if known := sum(map(len, parts)):
        say(f"going on: {known} items are recorded")
    check_store(out)
    newest = max((record["epoch"] for record in ledger.records), default=0)
    lease = acquire_lease(ledger.store, say, newest)
    try:
        ledger.open_epoch(lease.epoch)
        # A former process may have written while it was waited for.
        run = _Run(evaluation, ledger, read_recorded(store, ledger.records), notify)
        run.to_the_end(machines)
        return run.recorded
    finally:
        ledger.close()
        lease.release()


class _Run:
    """One process's part of an evaluation."""

    def __init__(
        self,
        evaluation: Evaluation,
        ledger: Ledger,
        recorded: Recorded,
        notify: Callable[[int], None],
    ) -> None:
        self.evaluation = evaluation
        self.ledger = ledger
        self.recorded = recorded
        self._notify = notify
        self._worker: EvaluationWorker | None = None

    def to_the_end(self, machines: Machines) -> None:
        if not self.recorded.identity:
            location = self.evaluation.checkpoint.location
            self._record("evaluation", identity=self.evaluation.identity, location=location)
        protocol = self.evaluation.wish.protocol
        if isinstance(protocol, ConfidenceRetry) and protocol.dev_items:
            if self.recorded.thresholds is None:
                self._score("dev", "search", protocol, machines)
                fixed = {
                    t: fix_threshold(t, items) for t, items in self.recorded.dev_results.items()
                }
                self._record("thresholds", thresholds=fixed)
            assert self.recorded.thresholds is not None
            known = {task: found["threshold"] for task, found in self.recorded.thresholds.items()}
            protocol = replace(protocol, thresholds=known)
        self._score("judged", self.evaluation.wish.split, protocol, machines)
        self._record("evaluated")

    def _record(self, kind: str, **content: Any) -> None:
        self.recorded.apply(self.ledger.append(kind, **content))

    def _score(self, stage: str, split: str, protocol: Protocol, machines: Machines) -> None:
        """Score the items of the split, as far as they are not recorded."""
        known = self.recorded.dev_results if stage == "dev" else self.recorded.results
        finished = {task: list(items) for task, items in known.items()}
        self._notify(sum(map(len, finished.values())))
        tasks = self.evaluation.wish.tasks
        if all(len(finished.get(task.name, ())) == len(task.items[split]) for task in tasks):
            return
        score = self._score_here if machines.workers is None else self._score_on_pool
        for scored in score(split, protocol, finished, machines):
            self._record("scored", stage=stage, items=scored.items)
            self._notify(sum(map(len, scored.items.values())))

    def _score_here(
        self, split: str, protocol: Protocol, finished: Finished, machines: Machines
    ) -> Iterator[Scored]:
        from workers.evaluation_worker import EvaluationWorker

        if self._worker is None:
            worker = EvaluationWorker(self._spec(protocol))
            self._check_engine(worker.describe())
            self._worker = worker
        self._worker.spec = replace(self._worker.spec, protocol=protocol)
        recipe = self._recipe().to_dict()
        complete = False
        while not complete:
            scored = self._worker.evaluate(recipe, split, finished, RECORD_SECONDS)
            for task, items in scored.items.items():
                finished.setdefault(task, []).extend(item["id"] for item in items)
            complete = scored.complete
            yield scored

    def _score_on_pool(
        self, split: str, protocol: Protocol, finished: Finished, machines: Machines
    ) -> Iterator[Scored]:
        assert machines.workers is not None
        jobs = self._jobs(split, finished, PARTS_PER_WORKER * machines.workers.total)
        spec = self._spec(protocol)
        with Pool(spec, machines.workers, machines.address, self._check_engine) as pool:
            for progress in pool.run(jobs):
                if progress.given_up:
                    raise PoolError(
                        f"{self.evaluation.checkpoint.location}: the evaluation failed: {progress.error}"
                    )
                if progress.scored is not None:
                    yield progress.scored

    def _jobs(self, split: str, finished: Finished, count: int) -> list[Job]:
        """The items that are left, in `count` parts or fewer. Blocks stay whole, and a worker cuts its part
        into them again: all but a task's last one, which is last there too, have the same size."""
        wish = self.evaluation.wish
        done = {task: set(ids) for task, ids in finished.items()}
        blocks = [
            (task.name, [item.id for item in block])
            for task in wish.tasks
            for block in make_batches(task.items[split], wish.block_items)
        ]
        left = [(t, ids) for t, ids in blocks if not done.get(t, set()).issuperset(ids)]
        recipe = self._recipe()
        jobs = []
        for number in range(min(count, len(left))):
            own: dict[str, list[str]] = {}
            for task, ids in left[number::count]:
                own.setdefault(task, []).extend(ids)
            jobs.append(Job(f"{recipe.id}/{number}", recipe, split, chosen=own))
        return jobs

    def _spec(self, protocol: Protocol) -> WorkerSpec:
        from workers.evaluation_worker import WorkerSpec

        checkpoint, wish = self.evaluation.checkpoint, self.evaluation.wish
        return WorkerSpec(
            parents={NAME: checkpoint.location},
            base=None,
            fingerprints={NAME: checkpoint.fingerprint},
            tasks=wish.tasks,
            block_items=wish.block_items,
            engine=wish.engine,
            protocol=protocol,
        )

    def _recipe(self) -> Recipe:
        reference = ParentReference(NAME, self.evaluation.checkpoint.fingerprint)
        return passthrough_recipe((reference,), NAME)

    def _check_engine(self, description: dict[str, Any]) -> None:
        """All results of an evaluation come from engines that are alike, today's and last week's."""
        described = json.loads(json.dumps(description))
        described.pop(ADDRESS, None)
        if self.recorded.description is None:
            self._record("engine", description=described)
            return
        changes = engine_changes(self.recorded.description, described)
        if changes:
            raise BadInputError(
                f"{self.recorded.place}: this engine would score differently from the one that this began "
                f"with ({', '.join(changes)}); restore that environment, or evaluate into another --out"
            )
