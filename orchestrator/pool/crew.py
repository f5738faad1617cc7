"""The pool's places, and the Ray actors in them: started, replaced, left to rest after bad starts, and ended
where others are to have their room."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from orchestrator.errors import EngineMismatchError, PoolError
from orchestrator.pool.attempts import Failure, unexcused
from orchestrator.pool.heartbeat import BEAT_SECONDS, Heartbeat
from orchestrator.pool.node_watch import NodeWatch
from orchestrator.pool.placement import Placement, check_placement, no_room_at_all
from orchestrator.pool.ray_session import cause_of, start_ray
from orchestrator.pool.shared_places import SharedPlaces
from orchestrator.workers_config import Needs, WorkersConfig
from workers.actors import PLACE
from workers.errors import BadInputError

if TYPE_CHECKING:
    from orchestrator.pool.waiting import Job
    from workers.actors import MergeSpec

START_ATTEMPTS = 3
"""How many workers in a row may fail to start, before any has, until the campaign does."""

START_SECONDS = 1800.0
"""With no worker in service for this long, the cluster will not give any: long enough for machines that
must be started first, and for parents that must be copied to them."""

WARNING_SECONDS = 30.0
"""After so long without any worker in service it is said why."""

FIRST_REST_SECONDS = 1.0

LONGEST_REST_SECONDS = 300.0
"""After failed starts a place rests, twice as long each time, up to this long."""


@dataclass
class Worker:
    """A place for a worker, and the actor that has it now."""

    number: int
    serial: int = 0
    """Counts the actors of the pool: no two have the same."""
    actor: Any = None
    """None while the place rests after a failed start, or others have its room."""
    ready: Any = None
    """The pending `describe` call of an actor that is starting."""
    introduction: Any = None
    """The pending call that says on which node a new actor is."""
    node: str | None = None
    """Its id, when it is known: the process is there."""
    member_nodes: tuple[str, ...] = ()
    """Of a gang: those of its members."""
    job: Job | None = None
    call: Any = None
    since: float = 0.0
    """When the actor was started, or called, or when the rest began."""
    makes_room: bool = False
    """Whether the actor is to end after the call that it is in."""
    is_away: bool = False
    """Whether others have its room."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=1.0, gpus=0.0))
    waited: float = 0.0
    """Seconds for which its job could have run before, had it been free."""
    bad_starts: int = 0
    """How many of its actors in a row did not start, and were not lost with their nodes."""

    @property
    def in_service(self) -> bool:
        return self.actor is not None and self.ready is None

    @property
    def is_idle(self) -> bool:
        """Whether it could take a call."""
        return self.call is None and self.ready is None and self.actor is not None

    @property
    def nodes(self) -> tuple[str, ...]:
        """What is known of where it runs."""
        return (self.node, *self.member_nodes) if self.node is not None else ()

    @property
    def rest(self) -> float:
        """Seconds until an actor is started where there is none."""
        doublings = min(self.bad_starts, 30)  # far more than any rest is long
        return min(FIRST_REST_SECONDS * 2.0**doublings, LONGEST_REST_SECONDS)

    @property
    def is_expected(self) -> bool:
        """Whether it is in service, or will soon be: a place of a lost node may wait for ever."""
        starting = self.ready is not None and time.monotonic() - self.since < START_SECONDS
        return (self.in_service or starting) and not self.makes_room


class Crew:
    """The places of `workers`, each with a worker that is replaced when it dies. A context manager."""

    def __init__(
        self,
        spec: MergeSpec,
        config: WorkersConfig,
        address: str | None,
        check_engine: Callable[[dict[str, Any]], None],
        priority: int = 0,
        tell: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        """`priority`: among those who share the cluster at `address`."""
        self.workers: list[Worker] = []
        self.watch = NodeWatch()
        self.heartbeat = Heartbeat()
        self._spec = spec
        self._config = config
        self._address = address
        self._check_engine = check_engine
        self._placements: dict[int, Placement] = {}
        """By place that of its gang, the leader's place first; or one for all workers, the same for each."""
        self._shared = SharedPlaces(self, self._placements, config, priority)
        self._tell = tell
        self._serial = 0
        self._failed_starts: list[str] = []
        """While no worker is in service."""
        self._was_in_service = False
        """Whether any worker ever was: from then on, a bad start is the fault of its machine."""
        self._last_service = time.monotonic()
        self._warned = False

    @property
    def gang(self) -> int:
        """How many workers share the work of a place."""
        return self._config.gang

    def __enter__(self) -> Crew:
        check_placement(self._config, self._address)
        start_ray(self._address, self._config)
        self.watch.start()
        self.workers += [
            Worker(number, needs=own) for number, own in enumerate(self._config.places)
        ]
        if self._config.gang == 1 and self._config.placement != "none":
            together = Placement(self._config)
            self._placements.update(dict.fromkeys(range(self._config.total), together))
        for worker in self.workers:
            self.start(worker)
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        self.watch.stop()
        self.heartbeat.stop()
        for worker in self.workers:
            if worker.actor is not None:
                ray.kill(worker.actor)
        self.workers.clear()
        for placement in set(self._placements.values()):
            placement.release()
        self._shared.leave()
        ray.shutdown()

    def start(self, worker: Worker) -> None:
        """Put a new actor into the place, instead of the one it may have."""
        if worker.makes_room:
            self._shared.send_away(worker)
            return
        self.vacate(worker, "replaced")
        self._serial += 1
        worker.serial, worker.is_away = self._serial, False
        worker.actor = self._new_actor(worker)
        worker.introduction = worker.actor.introduce.remote(
            self.heartbeat.name, BEAT_SECONDS, self._serial
        )
        worker.ready, worker.since = worker.actor.describe.remote(), time.monotonic()

    def vacate(self, worker: Worker, told: str = "") -> None:
        """End the actor that the place may have, and tell of it, if in a word."""
        import ray

        if worker.actor is not None:
            ray.kill(worker.actor)
            if told:
                self.tell(worker, told)
        worker.actor = worker.ready = worker.introduction = worker.node = None
        worker.member_nodes, worker.job, worker.call = (), None, None
        worker.since = time.monotonic()

    def _new_actor(self, worker: Worker) -> Any:
        import ray

        from workers import actors, evaluation_worker, gang

        number, placements = worker.number, self._placements
        needs = worker.needs.options | {"max_restarts": 0}
        spec = replace(self._spec, threads=worker.needs.threads)
        if self._config.gang > 1:
            if number not in placements:
                placements[number] = Placement(self._config.gang_in(worker.needs))
            bundles = range(self._config.gang)
            own, *others = [needs | placements[number].options(n) for n in bundles]
            return ray.remote(gang.GangLeader).options(**own).remote(spec, others)
        evaluates = isinstance(spec, evaluation_worker.WorkerSpec)
        kind = evaluation_worker.EvaluationWorker if evaluates else actors.MergeWorker
        place = placements[number].options(number) if placements else {}
        return ray.remote(kind).options(**needs, **place).remote(spec)

    def enter_service(self, worker: Worker) -> None:
        import ray

        try:
            description = ray.get(worker.ready)
            if worker.introduction is not None:  # it came first, so it is there
                worker.node = ray.get(worker.introduction)
            place = description.pop(PLACE, {})
            self._check_engine(description)
        except (ray.exceptions.RayError, EngineMismatchError) as error:
            self.handle_bad_start(worker, cause_of(error))
            return
        worker.ready = worker.introduction = None
        if self._config.gang > 1:
            worker.introduction = worker.actor.member_nodes.remote()
        self._was_in_service = True
        worker.bad_starts = 0
        gang = self._config.gang
        self.tell(
            worker,
            "in service",
            node=place.get("node"),
            loading_seconds=place.get("loading_seconds", 0.0),
            members=gang,
            cpus=worker.needs.cpus * gang,
            gpus=worker.needs.gpus * gang,
        )

    def tell(self, worker: Worker, state: str, **content: Any) -> None:
        """Say what became of a worker: "in service", with what Ray reserves for it; "replaced";
        "made room" for another campaign's; or "not started", and why."""
        self._tell({"worker": worker.number, "serial": worker.serial, "state": state, **content})

    def handle_bad_start(self, worker: Worker, cause: Exception) -> None:
        """Let the place rest; give up at once, or soon, if no worker has ever come into service."""
        if not self._was_in_service and isinstance(cause, BadInputError | EngineMismatchError):
            raise cause
        if unexcused([Failure.of(cause, worker.nodes)], self.watch):
            self._failed_starts.append(str(cause))
            worker.bad_starts += 1
        self.tell(worker, "not started", error=str(cause))
        if not self._was_in_service and len(self._failed_starts) >= START_ATTEMPTS:
            raise PoolError(
                f"{START_ATTEMPTS} workers in a row did not start; the last one: {cause}"
            ) from cause
        self.vacate(worker)

    def must_move(self, worker: Worker) -> bool:
        """Whether it shall take no more calls where it is."""
        return worker.makes_room or self.watch.is_leaving(worker.nodes)

    def wake(self) -> None:
        """Start actors in places that have rested; end those that make room; give up if none has been in
        service for long, though there is or cannot be room for one."""
        now = time.monotonic()
        for worker in self.workers:
            if worker.actor is None and not worker.is_away and now - worker.since > worker.rest:
                self.start(worker)
        if self._address is not None:
            self._shared.turn()
        if any(worker.in_service for worker in self.workers):
            self._last_service = now
            self._failed_starts.clear()
        elif now - self._last_service > START_SECONDS:
            lacking = no_room_at_all(self._config)
            if lacking is None and not self._failed_starts and self._waits():
                self._last_service = now  # others use the cluster: it is a queue
                return
            reason = (
                self._failed_starts[-1] if self._failed_starts else lacking or "all are starting"
            )
            raise PoolError(f"no worker has been in service for {START_SECONDS:.0f} s: {reason}")
        elif now - self._last_service > WARNING_SECONDS and not self._warned and self._waits():
            self._warned = True
            reason = no_room_at_all(self._config) or "others use the cluster"
            print(f"darwin: warning: workers wait for room: {reason}", file=sys.stderr)

    def _waits(self) -> bool:
        """Whether no worker has room now, and none rests."""
        return all(w.is_away or (w.actor is not None and w.node is None) for w in self.workers)
