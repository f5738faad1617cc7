"""The workers of a gang, which share one model: a leader that is called, and members that it starts.

`orchestrator.pool.crew` puts a gang into a place of the pool instead of one worker, and calls its leader as
it would call that one. If a member dies every call that needs it fails, and the gang is replaced as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workers.actors import Members, MergeWorker
from workers.evaluation import Engine
from workers.evaluation_worker import EvaluationWorker, WorkerSpec

if TYPE_CHECKING:
    import torch

    from workers.diagnostics.attribution import Products
    from workers.evaluation.engines.sharded_engine import GangMember
    from workers.merging.child import PartReport


class GangWorker(MergeWorker):
    """A member: holds some experts of the model that its leader runs; merges and scans for it, too."""

    spec: WorkerSpec

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.member: GangMember | None = None

    def hold(self, names: list[str]) -> None:
        """Open the parents where they lie, and hold these tensors."""
        from workers.evaluation.engines.sharded_engine import GangMember

        self.open(lambda checkpoint: checkpoint)
        self.member = GangMember(self.parents, self.base, **self.spec.engine)
        self.member.hold(names)

    def realize(self, recipe: dict[str, Any]) -> None:
        """See `GangMember.realize`."""
        assert self.member is not None, "hold comes first"
        self.member.realize(recipe)

    def compute(self, *arguments: Any) -> torch.Tensor:
        """See `GangMember.compute`."""
        assert self.member is not None, "hold comes first"
        return self.member.compute(*arguments)


class GangLeader(EvaluationWorker):
    """Evaluates, merges and scans with the help of members. `places`: the options of their Ray actors."""

    def __init__(self, spec: WorkerSpec, places: list[dict[str, Any]]) -> None:
        super().__init__(spec)
        self._places = places
        self._members: Members | None = None
        self._beats: tuple[str, float, int] | None = None

    def introduce(self, beats: str, seconds: float, serial: int, member: int = 0) -> str:
        """See `Actor.introduce`; for the members, too."""
        self._beats = beats, seconds, serial
        return super().introduce(beats, seconds, serial, member)

    def member_nodes(self) -> list[str]:
        """The ids of the nodes that members are on. `describe` comes first."""
        assert self._members is not None, "describe comes first"
        return self._members.nodes()

    def make_engine(self) -> Engine:
        """Open the parents where they lie, start the members, and spread the model's experts over all."""
        from workers.evaluation.engines.sharded_engine import ShardedEngine

        self.open(lambda checkpoint: checkpoint)
        self._members = members = Members(GangWorker, self.spec, self._places, self._beats)
        return ShardedEngine(
            self.parents, self.base, members.names, members.ask, **self.spec.engine
        )

    def write_parts(
        self,
        recipe: dict[str, Any],
        target: str,
        uploads: dict[str, str],
        keys: list[tuple[str, int]],
    ) -> list[PartReport]:
        """See `MergeWorker.write_parts`; everybody writes some of the parts."""
        return self._share(keys, "write_parts", recipe, target, uploads)

    def scan_tensors(self, names: list[str]) -> list[dict[str, Any]]:
        """See `MergeWorker.scan_tensors`; everybody scans some of the tensors."""
        return self._share(names, "scan_tensors")

    def attribute(
        self, recipe: dict[str, Any], child: str, published: bool, chunks: list[tuple[str, int]]
    ) -> list[Products]:
        """See `MergeWorker.attribute`; everybody measures some of the chunks."""
        return self._share(chunks, "attribute", recipe, child, published)

    def _share(self, work: list[Any], method: str, *arguments: Any) -> list[Any]:
        """What a method makes of each piece of `work`, its last argument."""
        assert self._members is not None, "describe comes first"
        step = 1 + len(self._members.names)
        waiting = [
            (first, self._members.ask(member, method, *arguments, work[first::step]))
            for first, member in enumerate(self._members.names, 1)
            if work[first::step]
        ]
        results: list[Any] = [None] * len(work)
        results[::step] = getattr(super(), method)(*arguments, work[::step])
        for first, wait in waiting:
            results[first::step] = wait()
        return results
