"""A crew's places in a cluster that others use too: what has room, and what is given up or taken back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from orchestrator.pool.board import Sharing
from orchestrator.pool.placement import Placement
from orchestrator.pool.sharing import GRACE_SECONDS, PATIENCE_SECONDS, Decision, Place
from orchestrator.workers_config import WorkersConfig

if TYPE_CHECKING:
    from orchestrator.pool.crew import Crew, Worker


class SharedPlaces:
    """Of a crew with these `placements`, of gangs by place, or one for all."""

    def __init__(
        self,
        crew: Crew,
        placements: dict[int, Placement],
        config: WorkersConfig,
        priority: int,
    ) -> None:
        self._crew = crew
        self._placements = placements
        self._config = config
        self._sharing = Sharing(priority)
        self._left: dict[int, list[str]] = {}
        """Nodes on which places had room that were given up."""

    def turn(self) -> None:
        """See what others need, if it is time. Quick."""
        self._sharing.turn(self)

    def leave(self) -> None:
        """Be no longer one of those that share the cluster."""
        self._sharing.leave()

    @property
    def _reserved_together(self) -> bool:
        return self._config.gang == 1 and bool(self._placements)

    def describe_places(self) -> list[Place]:
        """The places as `sharing` sees them, but for those whose workers have just been started."""
        now = time.monotonic()
        apart = self._config.placement == "strict"
        if self._reserved_together:
            return self._describe_reserved(now, apart)
        found = []
        for worker in self._crew.workers:
            nodes = self._left.get(worker.number) if worker.is_away else self._nodes_of(worker)
            if worker.is_away:
                state = "leaving" if now - worker.since < GRACE_SECONDS else "away"
            elif worker.makes_room:
                state = "leaving"
            elif worker.actor is None:
                continue  # it rests
            elif nodes is not None:
                state = "held"
            elif now - worker.since > PATIENCE_SECONDS:
                state = "waiting"
            else:
                continue
            bundles = [worker.needs.bundle] * self._config.gang
            found.append(Place(worker.number, state, bundles, nodes, apart))
        return found

    def _nodes_of(self, worker: Worker) -> list[str] | None:
        """Of each of its bundles; None while it waits for room."""
        if len(worker.nodes) == self._config.gang:  # no need to ask the head, which may be away
            return list(worker.nodes)
        if self._config.gang > 1 and worker.actor is not None:
            return self._placements[worker.number].nodes
        return None

    def _describe_reserved(self, now: float, apart: bool) -> list[Place]:
        """Places that are reserved together are one, which is never given up."""
        placement, bundles = self._placements[0], [w.needs.bundle for w in self._crew.workers]
        nodes = placement.nodes
        if nodes is not None:
            return [Place(0, "kept", bundles, nodes, apart)]
        waits = all(now - worker.since > PATIENCE_SECONDS for worker in self._crew.workers)
        return [Place(0, "waiting", bundles, None, apart)] if waits else []

    def may_use(self, node: str) -> bool:
        """Whether there may be workers on a node: it is not about to go."""
        return not self._crew.watch.is_leaving([node])

    def follow(self, decision: Decision) -> None:
        """Give places up, and take them back, as was decided."""
        if self._reserved_together:
            return
        for worker in self._crew.workers:
            if worker.number in decision.take_back and worker.is_away:
                self._crew.start(worker)
            elif worker.number in decision.withdraw and worker.ready is not None:
                self.send_away(worker)
            elif worker.number in decision.give_up and worker.actor is not None:
                if worker.ready is not None:
                    self.send_away(worker)
                else:
                    worker.makes_room = True

    def send_away(self, worker: Worker) -> None:
        """End the actor, and leave its place to others until it is taken back."""
        nodes = self._nodes_of(worker)
        if nodes is not None:
            self._left[worker.number] = nodes
        else:
            self._left.pop(worker.number, None)
        self._crew.vacate(worker, "made room")
        if self._config.gang > 1 and worker.number in self._placements:
            self._placements.pop(worker.number).release()
        worker.makes_room, worker.is_away = False, True
