"""The worker process: parents mapped once, one live engine, one candidate at a time.

`orchestrator.pool` runs `EvaluationWorker` as a Ray actor. A worker decides nothing and keeps nothing
that matters: it can die at any point, and another one continues from what was recorded. The driver
imports this module too, so torch is imported where it is used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from workers.checkpoints import Checkpoint, localize, open_checkpoint
from workers.errors import BadInputError
from workers.evaluation import Engine, Task, make_batches, score_batch
from workers.merging import Recipe
from workers.storage import open_store


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker is built from. Locations are read by the worker, on its own machine."""

    parents: dict[str, str]
    """Name -> location, the father first."""
    base: str | None
    fingerprints: dict[str, str]
    """What the parents must be, wherever they are read."""
    tasks: tuple[Task, ...]
    batch_size: int
    engine: dict[str, Any] = field(default_factory=dict)
    """Arguments of the engine: dtype, device, threads."""


@dataclass(frozen=True)
class Scored:
    """What came of one `evaluate` call."""

    items: dict[str, list[dict[str, Any]]]
    """Task -> results of the items scored in this call."""
    complete: bool
    """Whether every item of the split has been scored now."""
    realize_seconds: float
    score_seconds: float


class EvaluationWorker:
    """Realizes recipes and scores them. `describe` comes first: it loads everything."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.parents: dict[str, Checkpoint] = {}
        self.base: Checkpoint | None = None
        self.engine: Engine | None = None
        self.realized: str | None = None

    def describe(self) -> dict[str, Any]:
        """Open the parents and load the engine; what this worker's scores depend on.

        Equal for all workers of a campaign. Raises `BadInputError` if the inputs cannot work.
        """
        from workers.evaluation.transformers_engine import TransformersEngine

        self.parents = {n: localize(open_checkpoint(p)) for n, p in self.spec.parents.items()}
        self.base = localize(open_checkpoint(self.spec.base)) if self.spec.base else None
        for name, fingerprint in self.spec.fingerprints.items():
            if self.parents[name].fingerprint != fingerprint:
                raise BadInputError(
                    f"{self.spec.parents[name]}: is another checkpoint on this worker's machine than where "
                    "the campaign was started"
                )
        self.engine = TransformersEngine(self.parents, self.base, **self.spec.engine)
        probe = self.spec.tasks[0].items["search"][0].prompt
        return self.engine.describe(probe) | {"batch_size": self.spec.batch_size}

    def evaluate(
        self, recipe: dict[str, Any], split: str, finished: dict[str, list[str]], seconds: float
    ) -> Scored:
        """Score the split's items that are not `finished` (task -> item ids), for about `seconds`.

        Work goes batch by batch. Batches depend on the items alone, not on time or on what was
        finished before, so a result is the same however often an evaluation was interrupted.
        """
        assert self.engine is not None, "describe comes first"
        started = time.monotonic()
        child = Recipe.from_dict(recipe)
        if self.realized != child.id:
            self.realized = None
            self.engine.realize(child)
            self.realized = child.id
        realized = time.monotonic()
        scored: dict[str, list[dict[str, Any]]] = {}
        complete = True
        for task in self.spec.tasks:
            done = set(finished.get(task.name, ()))
            for batch in make_batches(task.items[split], self.spec.batch_size):
                if all(item.id in done for item in batch):
                    continue
                if scored and time.monotonic() - started > seconds:
                    complete = False
                    break
                results = score_batch(self.engine, task, batch)
                scored.setdefault(task.name, []).extend(result.to_dict() for result in results)
        return Scored(scored, complete, realized - started, time.monotonic() - realized)

    def write_child(self, recipe: dict[str, Any], target: str) -> dict[str, Any]:
        """Merge the recipe into the store at `target` and verify it; the child's report."""
        import torch

        from workers.merging.child import write_weights
        from workers.merging.executor import Merger

        merger = Merger(self.parents, self.base)
        threads = int(self.spec.engine.get("threads", 1))
        torch.set_num_threads(1)  # the merge brings its own threads
        return write_weights(
            merger, Recipe.from_dict(recipe), open_store(target), threads
        ).to_dict()
