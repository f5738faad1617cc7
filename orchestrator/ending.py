"""Write a child where its gates say: in its own folder, or aside under `rejected/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.child_writer import ChildReport, ChildWriter
from orchestrator.config import HealthConfig
from orchestrator.gates import Gate, rejecting, weight_gates
from orchestrator.pool.calls import Calls
from workers.checkpoints import Checkpoint
from workers.merging import Recipe
from workers.storage import Store

REJECTED = "rejected"
"""The folder of children that did not pass the gates."""


@dataclass(frozen=True)
class WrittenChild:
    """A child whose files are written, and that is to be published in `folder`."""

    folder: str
    writer: ChildWriter
    weights: ChildReport
    gates: list[Gate]
    """All of them."""


@dataclass(frozen=True)
class Ending:
    """Where the child of `recipe` goes in a campaign's `store`."""

    store: Store
    recipe: Recipe
    parents: dict[str, Checkpoint]
    base: Checkpoint | None
    health: HealthConfig

    @property
    def good(self) -> str:
        """The folder of a child that passes."""
        return f"child-{self.recipe.id[:12]}"

    @property
    def aside(self) -> str:
        """The folder of one that does not."""
        return f"{REJECTED}/{self.good}"

    def write(
        self,
        calls: Calls,
        engine_gates: list[Gate],
        record: Callable[[str], None],
        decided: str | None = None,
    ) -> WrittenChild:
        """Write the weights. `record` is told of a folder before anything is done there.

        `engine_gates` are those of the live model, whose weights have the same bits. The rest is known when
        every part is written, but before any file appears: a child that fails only then is written once
        more, aside, as a store cannot move what it has. `decided` is the folder that was recorded last,
        by a try that was interrupted.
        """
        failed = decided == self.aside or rejecting(engine_gates, self.health)
        written = self._merge(self.aside if failed else self.good, calls, engine_gates, record)
        if not failed and rejecting(written.gates, self.health):
            written = self._merge(self.aside, calls, engine_gates, record)
        written.writer.finish(calls, written.weights)
        return written

    def _merge(
        self, folder: str, calls: Calls, gates: list[Gate], record: Callable[[str], None]
    ) -> WrittenChild:
        """The parts of the child in `folder`, as yet without any file that a reader could see."""
        record(folder)
        if folder == self.aside:
            self._clear()
        target = self.store.substore(folder)
        writer = ChildWriter.create(self.recipe, self.parents, self.base, target)
        weights = writer.merge(calls)
        judged = [*weight_gates(weights.tensors, list(self.parents), self.health), *gates]
        return WrittenChild(folder, writer, weights, judged)

    def _clear(self) -> None:
        """Remove what was begun in the good folder; a child that was published there stays."""
        if next(self.store.list_objects(f"{self.good}/config.json"), None) is None:
            self.store.discard_unfinished(f"{self.good}/")
            self.store.delete_folder(self.good)
