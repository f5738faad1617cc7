"""The worker process that merges, scans and probes: parents opened once.

`orchestrator.pool.pool` runs workers as Ray actors, `orchestrator.pool.calls` in processes of this machine. A
worker decides nothing and keeps nothing that matters: it can die at any point, and another one continues from
what was recorded. The driver imports this module too, so torch is imported where it is used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from workers.checkpoints import ArchitectureMap, Checkpoint, check_same, open_checkpoint
from workers.heartbeat import keep_beating
from workers.merging import Recipe
from workers.merging.parts import Part, cut_parts
from workers.merging.plan import BASE
from workers.storage import Store, open_store
from workers.storage.traffic import TRAFFIC, Traffic

if TYPE_CHECKING:
    from workers.diagnostics.attribution import Products
    from workers.diagnostics.calibration import CalibrationSet
    from workers.diagnostics.probe import PackedStates, Rows
    from workers.diagnostics.probe_parts import PackedAsked, ProbeParts
    from workers.diagnostics.static import StaticScan
    from workers.experts.calibration import CalibratedLayer, Calibration
    from workers.experts.calibration_order import CalibrationOrder
    from workers.experts.quality import LayerMatching
    from workers.merging.child import PartReport
    from workers.merging.executor import Run
    from workers.merging.sources import Source

PLACE = "place"
"""In what a worker describes: where it runs and how long it took to load. The driver takes it out."""

BYTES_READ, BYTES_WRITTEN = "darwin_bytes_read", "darwin_bytes_written"
EXPORT_SECONDS = 5.0
"""So often a worker tells what it has read and written; Ray collects every ten seconds."""

PROBE_THREADS = 1
"""CPU threads of a probe. Sums depend on them in the last digits, so `workers.cpus` must not matter: what
one pool has probed is used by another."""


@dataclass(frozen=True)
class MergeSpec:
    """What a merging worker is built from. Locations are read by the worker, on its own machine."""

    parents: dict[str, str]
    """Name -> location, the father first."""
    base: str | None
    fingerprints: dict[str, str]
    """What the parents, and `base`, must be, wherever they are read."""
    threads: int = 1


class Actor:
    """What each worker process does besides its work, where it is an actor of Ray."""

    def introduce(self, beats: str, seconds: float, serial: int, member: int = 0) -> str:
        """Begin to give a sign of life to the `Beats` of this name every so many seconds, as soon as there is
        one; the id of the node where this is."""
        import ray

        known: list[Any] = []

        def beat() -> None:
            if not known:
                known.append(ray.get_actor(beats))
            ray.get(known[0].beat.remote(serial, member))

        keep_beating(beat, seconds)
        return self.node()

    def node(self) -> str:
        """The id of the node where this is."""
        import ray

        return str(ray.get_runtime_context().get_node_id())


def export_traffic(campaign: str) -> None:
    """From now on count what this process reads and writes as metrics of Ray, which serves them."""
    from ray.util.metrics import Counter

    labels = {"campaign": campaign}
    read = Counter(BYTES_READ, "Bytes that driver and workers read from stores", tuple(labels))
    written = Counter(BYTES_WRITTEN, "Bytes that driver and workers wrote to stores", tuple(labels))
    known = Traffic()

    def export() -> None:
        while True:
            now = TRAFFIC.read, TRAFFIC.written
            if now[0] > known.read:
                read.inc(now[0] - known.read, labels)
            if now[1] > known.written:
                written.inc(now[1] - known.written, labels)
            known.read, known.written = now
            time.sleep(EXPORT_SECONDS)

    threading.Thread(target=export, name="traffic", daemon=True).start()


class MergeWorker(Actor):
    """Writes parts of children. `describe` comes first: it opens the parents."""

    def __init__(self, spec: MergeSpec) -> None:
        self.spec = spec
        self.parents: dict[str, Checkpoint] = {}
        self.base: Checkpoint | None = None
        self._scan: StaticScan | None = None
        self._run: tuple[str, Run, dict[tuple[str, int], Part]] | None = None
        self._child: tuple[tuple[str, bool], ArchitectureMap, Source] | None = None
        self._calibration: Calibration | None = None
        self._starting = threading.Lock()
        self._parts: ProbeParts | None = None
        self.store: Callable[[str], Store] = lru_cache(maxsize=4)(open_store)

    def describe(self) -> dict[str, Any]:
        """Open the parents where they lie. Raises `BadInputError` if they cannot be merged."""
        self.open(lambda checkpoint: checkpoint)
        return {}

    def open(self, place: Callable[[Checkpoint], Checkpoint]) -> None:
        """Open parents and base, and check that they are what the driver has seen."""
        opened = {n: place(open_checkpoint(p)) for n, p in self.spec.parents.items()}
        self.base = place(open_checkpoint(self.spec.base)) if self.spec.base else None
        check_same(opened | ({BASE: self.base} if self.base else {}), self.spec.fingerprints)
        self.parents = opened

    def write_parts(
        self,
        recipe: dict[str, Any],
        target: str,
        uploads: dict[str, str],
        keys: list[tuple[str, int]],
    ) -> list[PartReport]:
        """Merge these parts of the recipe's child and write them into the open uploads."""
        from workers.merging.child import write_parts
        from workers.merging.threads import torch_threads

        run, parts = self.start(Recipe.from_dict(recipe))
        wanted = [parts[key[0], key[1]] for key in keys]
        with torch_threads(1):  # a merge brings its own
            return write_parts(run, wanted, self.store(target), uploads, self.spec.threads)

    def publish_file(self, target: str, *arguments: Any) -> str:
        """See `workers.merging.child.publish_file`."""
        from workers.merging.child import publish_file

        return publish_file(self.store(target), *arguments)

    def hash_file(self, target: str, file: str) -> str:
        """The SHA-256 of a file of `target`."""
        from workers.merging.child import hash_file

        return hash_file(self.store(target), file)

    def scan_tensors(self, names: list[str]) -> list[dict[str, Any]]:
        """What parents and base are like in these tensors of the father's: the scan's entries."""
        from workers.diagnostics.static import StaticScan

        if self._scan is None:
            self._scan = StaticScan(self.parents, self.base)
        return [self._scan.scan(name) for name in names]

    def probe(
        self,
        parent: str,
        sets: Sequence[CalibrationSet],
        streamed: bool,
        dtype: str = "auto",
        device: str = "cpu",
    ) -> dict[str, Rows]:
        """See `workers.diagnostics.probe.probe_checkpoint`."""
        from workers.diagnostics.probe import probe_checkpoint

        checkpoint = self.parents[parent]
        others = self._probe_parts().others(parent)
        return probe_checkpoint(checkpoint, sets, streamed, dtype, device, PROBE_THREADS, others)

    def probe_span(
        self,
        parent: str,
        sets: Sequence[CalibrationSet],
        span: tuple[int, int],
        states: PackedStates | None,
        dtype: str = "auto",
        device: str = "cpu",
    ) -> tuple[dict[str, Rows], PackedStates]:
        """See `workers.diagnostics.probe.probe_span`. The span's weights stay in memory for the next call."""
        return self._probe_parts().span(parent, sets, span, states, (dtype, device))

    def probe_ask(self, *given: Any) -> PackedAsked | None:
        """See `workers.diagnostics.probe_parts.ProbeParts.ask`."""
        return self._probe_parts().ask(*given)

    def probe_experts(self, *given: Any) -> PackedStates:
        """See `workers.diagnostics.probe_parts.ProbeParts.experts`."""
        return self._probe_parts().experts(*given)

    def probe_layer(self, *given: Any) -> tuple[dict[str, Rows], PackedStates]:
        """See `workers.diagnostics.probe_parts.ProbeParts.layer`."""
        return self._probe_parts().layer(*given)

    def _probe_parts(self) -> ProbeParts:
        from workers.diagnostics.probe_parts import ProbeParts

        if self._parts is None:
            self._parts = ProbeParts(self.parents, PROBE_THREADS)
        return self._parts

    def expert_inputs(
        self, sets: Sequence[CalibrationSet], device: str = "cpu"
    ) -> dict[int, PackedStates]:
        """See `workers.experts.expert_inputs`, of the father."""
        from workers.diagnostics.probe import pack_states
        from workers.experts.expert_inputs import expert_inputs

        father = next(iter(self.parents.values()))
        found = expert_inputs(father, sets, device=device, threads=PROBE_THREADS)
        return {layer: pack_states([states]) for layer, states in found.items()}

    def match_experts(
        self, donor: str, layer: int, states: PackedStates | None, device: str = "cpu"
    ) -> LayerMatching:
        """See `workers.experts.matching`: by outputs for hidden states that are given, else by weights."""
        from workers.diagnostics.probe import unpack_states
        from workers.experts.matching import Experts, match_by_outputs, match_by_weights
        from workers.merging.threads import torch_threads

        father = Experts(next(iter(self.parents.values())), layer)
        other = Experts(self.parents[donor], layer)
        with torch_threads(self.spec.threads):
            if states is None:
                return match_by_weights(father, other, device)
            return match_by_outputs(father, other, unpack_states(states)[0], device)

    def attribute(
        self, recipe: dict[str, Any], child: str, published: bool, chunks: list[tuple[str, int]]
    ) -> list[Products]:
        """See `workers.diagnostics.attribution.measure_chunk`, for chunks of the child at this place.

        `recipe` says which parents, layers and tokens belong together, not what was merged how.
        """
        from workers.diagnostics.attribution import measure_chunk, read_unpublished
        from workers.merging.sources import Source
        from workers.merging.threads import torch_threads

        run, _ = self.start(Recipe.from_dict(recipe))
        if self._child is None or self._child[0] != (child, published):
            store = self.store(child)
            opened = (
                open_checkpoint(child) if published else read_unpublished(store, run.plan.layout)
            )
            self._child = (child, published), ArchitectureMap.of(opened), Source(opened)
        tensors, source = self._child[1].by_name, self._child[2]
        with torch_threads(1):
            return [measure_chunk(run, source, tensors[name], first) for name, first in chunks]

    def calibrate_router(
        self, order: CalibrationOrder, layer: int, known: dict[int, str], records: str
    ) -> CalibratedLayer:
        """See `workers.experts.calibration`. `known`: the layers before and the SHA-256 of their routers,
        which a worker that has not calibrated them itself reads from their `records`."""
        from workers.experts.calibration import Calibration
        from workers.experts.calibration_order import read_record, router_bytes
        from workers.merging.threads import torch_threads

        with torch_threads(PROBE_THREADS):
            at = self._calibration
            if at is None or at.order != order or at.known != known:
                self._calibration = None  # what it holds goes before more comes
                place = self.store(records)
                routers = {one: router_bytes(read_record(place, one)) for one in known}
                self._calibration = Calibration(order, self.parents, self.base, routers)
            assert self._calibration is not None
            return self._calibration.calibrate(layer)

    def compare_routing(
        self,
        recipe: dict[str, Any],
        texts: dict[str, tuple[str, ...]],
        dtype: str = "auto",
        device: str = "cpu",
    ) -> list[dict[str, Any]]:
        """See `workers.experts.routing_comparison.compare_routing`."""
        from workers.experts.routing_comparison import compare_routing
        from workers.merging.threads import torch_threads

        with torch_threads(PROBE_THREADS):
            child = Recipe.from_dict(recipe)
            return compare_routing(child, self.parents, self.base, texts, dtype, device)

    def start(self, recipe: Recipe) -> tuple[Run, dict[tuple[str, int], Part]]:
        """The recipe's run over the opened parents, and the parts of its child by their keys."""
        from workers.merging.executor import Merger
        from workers.merging.plan import form_of

        with self._starting:
            if self._run is None or self._run[0] != recipe.id:
                run = Merger(self.parents, self.base, form=form_of(recipe)).start(recipe)
                parts = {part.key: part for part in cut_parts(run.plan, run.assigned)}
                self._run = recipe.id, run, parts
            return self._run[1:]


class Members:
    """Actors of one `kind` that a worker starts, with Ray's options in `places`. They end when it does."""

    def __init__(
        self,
        kind: type,
        spec: MergeSpec,
        places: Sequence[dict[str, Any]],
        beats: tuple[str, float, int] | None = None,
    ) -> None:
        """`beats`: what the leader was told of them (see `Actor.introduce`)."""
        import ray

        start = ray.remote(kind)
        self._actors = {
            f"member-{number}": start.options(**place).remote(spec)
            for number, place in enumerate(places, 1)
        }
        self.names = tuple(self._actors)
        self._nodes = [
            actor.introduce.remote(*beats, number)
            for number, actor in enumerate(self._actors.values(), 1)
            if beats is not None
        ]

    def nodes(self) -> list[str]:
        """The ids of the nodes that they are on."""
        import ray

        return list(ray.get(self._nodes))

    def ask(self, member: str, method: str, *arguments: Any) -> Callable[[], Any]:
        """Start a member's method; what waits for its result, and raises what it has raised."""
        import ray

        reference = getattr(self._actors[member], method).remote(*arguments)

        def wait() -> Any:
            try:
                return ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # the member's own error is this worker's

        return wait
