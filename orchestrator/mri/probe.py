"""The probe of a campaign's parents: the `probe` part of a scan, made by workers.

Parents are independent of each other, and so are prompts: a call is one parent and one set, or all sets
where each call would hold the whole parent, or read it from a remote store again. A parent can also go
through the workers in a pipeline: each has a span of its layers and keeps them, and the sets' hidden states
go from one to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from orchestrator.config import find_shipped
from orchestrator.pool.calls import Calls
from workers.actors import PROBE_THREADS
from workers.checkpoints import ArchitectureMap, Checkpoint
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.diagnostics.calibration import CalibrationSet, read_calibration_set
from workers.errors import BadInputError

SHIPPED_SETS = ("reasoning", "code", "math", "knowledge", "language", "korean")
"""What is probed if nobody says."""

LARGE_LAYER = 1 << 30
"""Bytes of a layer's experts. With more, to read them is most of the work of a probe: workers that probed
one parent each would be as many as there are parents."""

ROWS_FORM = 2
"""Of what a probe finds: with another one, no probe that was kept is used again. 1 had no merits."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ActivationProbe:
    """A probe, ready to be run on parents.

    `streamed`: one layer in memory at a time, else the whole model; the result is the same. With more than
    one of `spans` the layers are divided among so many calls at a time (and always streamed): each worker
    keeps its span in memory. With more than one of `shards` the experts of each layer are divided among so
    many calls at a time: each reads only its own, and keeps none.
    """

    sets: tuple[CalibrationSet, ...]
    streamed: bool = True
    spans: int = 1
    dtype: str = "auto"
    device: str = "cpu"
    shards: int = 1

    @property
    def identity(self) -> dict[str, Any]:
        """What the result depends on beside the parents."""
        return {
            "form": ROWS_FORM,
            "sets": {calibration.name: calibration.sha256 for calibration in self.sets},
            "dtype": self.dtype,
            "device": self.device,
            "threads": PROBE_THREADS,
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    def run(self, parents: dict[str, Checkpoint], calls: Calls) -> dict[str, Any]:
        """The `probe` part of the scan of these parents, which the workers behind `calls` have opened.

        `{"sets": {set: summary}, "parents": {parent: {set: rows}}}`.
        """
        run = self._run_whole
        if self.spans > 1:
            run = self._run_spans
        elif self.shards > 1:
            run = self._run_shards
        found = run(parents, calls)
        return {
            "sets": {calibration.name: calibration.summary for calibration in self.sets},
            "parents": {
                parent: {
                    calibration.name: found[parent, calibration.name] for calibration in self.sets
                }
                for parent in parents
            },
        }

    def _run_whole(
        self, parents: dict[str, Checkpoint], calls: Calls
    ) -> dict[tuple[str, str], Rows]:
        arguments = [
            (name, group, self.streamed, self.dtype, self.device)
            for name, parent in parents.items()
            for group in (
                [self.sets]
                if parent.folder is None or not self.streamed
                else [(calibration,) for calibration in self.sets]
            )
        ]
        return {
            (arguments[number][0], called): rows
            for number, result in calls.each("probe", arguments)
            for called, rows in result.items()
        }

    def _run_spans(
        self, parents: dict[str, Checkpoint], calls: Calls
    ) -> dict[tuple[str, str], Rows]:
        found: dict[tuple[str, str], Rows] = {}
        for name, parent in parents.items():
            spans = cut_evenly(ArchitectureMap.of(parent).layers, self.spans)
            states: dict[int, Any] = {}
            for step in range(len(self.sets) + len(spans) - 1):
                # Each set is one span behind the set before it.
                due = [(step - stage, stage) for stage in range(len(spans))]
                due = [(number, stage) for number, stage in due if 0 <= number < len(self.sets)]
                arguments = [
                    (name, (self.sets[n],), spans[stage], states.get(n), self.dtype, self.device)
                    for n, stage in due
                ]
                for call, (rows, after) in calls.each("probe_span", arguments):
                    number, stage = due[call]
                    called = self.sets[number].name
                    states[number] = after if stage + 1 < len(spans) else None
                    found.setdefault((name, called), []).extend(rows[called])
        return found

    def _run_shards(
        self, parents: dict[str, Checkpoint], calls: Calls
    ) -> dict[tuple[str, str], Rows]:
        """Layer by layer: one worker runs all prompts up to the experts, all run experts, one the rest."""
        kind = (self.dtype, self.device)
        found: dict[tuple[str, str], Rows] = {}
        for name, parent in parents.items():
            architecture = ArchitectureMap.of(parent)
            ranges = cut_evenly(architecture.experts, self.shards)
            states: Any = None
            for layer in range(architecture.layers):
                asked = _call(calls, "probe_ask", name, self.sets, layer, states, kind)
                outputs = None
                if asked is not None:
                    arguments = [(name, layer, experts, asked, kind) for experts in ranges]
                    given = dict(calls.each("probe_experts", arguments))
                    outputs = [(experts, given[n]) for n, experts in enumerate(ranges)]
                rows, states = _call(
                    calls, "probe_layer", name, self.sets, layer, states, outputs, kind
                )
                for called, own in rows.items():
                    found.setdefault((name, called), []).extend(own)
        return found


def choose_probe(
    wanted: bool, names: Sequence[str], streamed: bool, spans: int, shards: int = 1
) -> ActivationProbe | None:
    """The probe that the command line asks for. Raises `BadInputError` for options that contradict."""
    if not wanted:
        if names:
            raise BadInputError("--set is for a probe: add --probe")
        return None
    if spans < 1:
        raise BadInputError(f"--spans: {spans} must be 1 or more")
    if spans > 1 and not streamed:
        raise BadInputError("--spans are streamed: leave out --whole")
    if shards < 1:
        raise BadInputError(f"--shards: {shards} must be 1 or more")
    if shards > 1 and (spans > 1 or not streamed):
        raise BadInputError(
            "--shards are of a layer that is streamed: leave out --spans and --whole"
        )
    return ActivationProbe(load_calibration_sets(names), streamed, spans, shards=shards)


def shards_for(parents: dict[str, Checkpoint], workers: int) -> int:
    """Among how many workers a campaign divides a layer's experts: all, if a parent's are `LARGE_LAYER`."""
    sizes: dict[tuple[str, int | None], int] = {}
    for name, parent in parents.items():
        for tensor in ArchitectureMap.of(parent).tensors:
            if tensor.expert is not None:
                own = tensor.elements * BITS_PER_ELEMENT[tensor.dtype] // 8
                sizes[name, tensor.layer] = sizes.get((name, tensor.layer), 0) + own
    return workers if max(sizes.values(), default=0) > LARGE_LAYER else 1


def probe_peaks(scan: dict[str, Any]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Set -> parent -> component -> its row of the greatest `mean_token`: where the set acts the most."""
    probe = scan["probe"]
    return {
        name: {
            parent: {
                component: max(defined, key=lambda row: row["mean_token"])
                for component in ("attention", "mlp")
                if (
                    defined := [
                        row
                        for row in of[name]
                        if row["component"] == component and row["mean_token"] is not None
                    ]
                )
            }
            for parent, of in probe["parents"].items()
        }
        for name in probe.get("sets", {})
    }


def render_peaks(scan: dict[str, Any]) -> Any:
    """The peaks for a terminal."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="none")
    table.add_column("probe")
    parents = list(scan["probe"]["parents"])
    for parent in parents:
        table.add_column(f"{parent}\nmost in attention of layer, mlp of layer")
    for name, of in probe_peaks(scan).items():
        table.add_row(
            name,
            *(
                ", ".join(
                    f"{row['layer']} ({row['mean_token']:.3f})" for row in of[parent].values()
                )
                for parent in parents
            ),
        )
    return table


def load_calibration_sets(names: Sequence[str] = ()) -> tuple[CalibrationSet, ...]:
    """Sets by the names of what ships, or the places of one's own .jsonl files; none is all that ship.

    Raises `BadInputError` for a set that is not there, is malformed, or has the name of another one.
    """
    sets = tuple(
        read_calibration_set(
            find_shipped("calibration", name, (".jsonl",)), name if "://" in name else None
        )
        for name in names or SHIPPED_SETS
    )
    called = [calibration.name for calibration in sets]
    if len(set(called)) < len(called):
        raise BadInputError(
            f"the calibration sets {', '.join(called)} are not all named differently"
        )
    return sets


def cut_evenly(count: int, spans: int) -> list[tuple[int, int]]:
    """(first, behind the last) of so many contiguous spans of about one length; fewer for a low `count`."""
    ends = sorted({count * number // spans for number in range(spans + 1)})
    return list(pairwise(ends))


def _call(calls: Calls, method: str, *arguments: Any) -> Any:
    """The result of one call."""
    ((_, result),) = calls.each(method, [arguments])
    return result
