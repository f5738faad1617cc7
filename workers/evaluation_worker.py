"""The worker process of a search: one live engine over the parents, one candidate at a time.

It merges, scans and probes like any other. The driver imports this module too, so torch is imported where it
is used.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workers.actors import PLACE, MergeSpec, MergeWorker, export_traffic
from workers.checkpoints import localize
from workers.evaluation import (
    Engine,
    Item,
    ItemResult,
    Protocol,
    Task,
    choose_items,
    make_batches,
    prepare_task,
    run_protocol,
    score_batch,
)
from workers.merging import Recipe

if TYPE_CHECKING:
    from workers.evaluation.health import Examination


@dataclass(frozen=True)
class WorkerSpec(MergeSpec):
    """What an evaluating worker is built from."""

    tasks: tuple[Task, ...] = ()
    block_items: int = 1
    """Items that the engine is asked about in one call."""
    engine: dict[str, Any] = field(default_factory=dict)
    """See `workers.evaluation.engines.build_engine`."""
    protocol: Protocol | None = None
    """How items are asked; None: each once, as its task says."""
    campaign: str = ""
    """For an actor: the campaign's name, as a label of its metrics."""


@dataclass(frozen=True)
class Scored:
    """What came of one `evaluate` call."""

    items: dict[str, list[dict[str, Any]]]
    """Task -> results of the items scored in this call."""
    complete: bool
    """Whether every item that was asked for has been scored now."""
    realize_seconds: float
    score_seconds: float


class EvaluationWorker(MergeWorker):
    """Realizes recipes and scores them, too. `describe` loads the engine."""

    spec: WorkerSpec

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.engine: Engine | None = None
        self.realized: str | None = None
        self.born = time.monotonic()

    def describe(self) -> dict[str, Any]:
        """Open the parents and load the engine; what this worker's scores depend on.

        Equal for all workers of a campaign. Raises `BadInputError` if the inputs cannot work.
        """
        self.engine = self.make_engine()
        for task in self.spec.tasks:
            prepare_task(task)
        probe = self.spec.tasks[0].items["search"][0].prompt
        described = self.engine.describe(probe) | {"block_items": self.spec.block_items}
        if not self.spec.campaign:
            return described
        export_traffic(self.spec.campaign)
        loading = round(time.monotonic() - self.born, 3)
        return described | {PLACE: {"node": self.node(), "loading_seconds": loading}}

    def make_engine(self) -> Engine:
        """Open the parents, and an engine over them."""
        from workers.evaluation.engines import build_engine

        served = self.spec.engine.get("kind") == "openai"  # of which the tokenizer is enough
        self.open((lambda checkpoint: checkpoint) if served else localize)
        return build_engine(self.parents, self.base, **self.spec.engine)

    def evaluate(
        self,
        recipe: dict[str, Any],
        split: str,
        finished: dict[str, list[str]],
        seconds: float,
        chosen: dict[str, list[str]] | None = None,
    ) -> Scored:
        """Score the split's items that are not `finished` (task -> item ids), for about `seconds`.

        `chosen`, in the same form, are those that are asked for; None: all.

        Work goes block by block. Blocks depend on the items alone, not on time or on what was
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
            items = choose_items(task.items[split], chosen, task.name)
            for block in make_batches(items, self.spec.block_items):
                if all(item.id in done for item in block):
                    continue
                if scored and time.monotonic() - started > seconds:
                    complete = False
                    break
                results = self._score(task, block)
                scored.setdefault(task.name, []).extend(result.to_dict() for result in results)
        return Scored(scored, complete, realized - started, time.monotonic() - realized)

    def _score(self, task: Task, items: Sequence[Item]) -> Sequence[ItemResult]:
        assert self.engine is not None, "describe comes first"
        if self.spec.protocol is None:
            return score_batch(self.engine, task, items)
        return run_protocol(self.engine, task, items, self.spec.protocol)

    def examine(
        self, recipe: dict[str, Any], parents: dict[str, dict[str, Any]], examination: Examination
    ) -> dict[str, Any]:
        """See `workers.evaluation.health.examine`."""
        from workers.evaluation.health import examine

        assert self.engine is not None, "describe comes first"
        self.realized = None
        given = {name: Recipe.from_dict(parent) for name, parent in parents.items()}
        return examine(self.engine, Recipe.from_dict(recipe), given, examination)
