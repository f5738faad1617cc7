"""Bytes that merging a tensor takes: what is read of each input, and what is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.checkpoints import LogicalTensor
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.merging.plan import BASE, CHUNK_ELEMENTS, Assignment, MergeUnit
from workers.merging.recipe import CARRIED

if TYPE_CHECKING:
    from orchestrator.planning.inputs import PlannedInputs

FP32_BYTES = 4


@dataclass
class Traffic:
    """Bytes, summed over tensors."""

    requested: int = 0
    """Read for the merge, input by input."""
    distinct: int = 0
    """The same, what two inputs have in common (a father that is the base) once."""
    made: int = 0
    """Of the child."""
    compared: int = 0
    """What writing the child reads in all from places that keep nothing: the merge, the statistics that a
    method needs of whole tensors, and every parent, which the child is compared with."""
    touched: int = 0
    """The same where what was read stays in memory for the moment: every place's bytes once."""
    computed: int = 0
    """Bytes that a GPU moves in its own memory: inputs arrive, go to fp32 and are read; the result is written
    and read as fp32, and written."""

    def add(self, other: Traffic) -> None:
        self.requested += other.requested
        self.distinct += other.distinct
        self.made += other.made
        self.compared += other.compared
        self.touched += other.touched
        self.computed += other.computed


def traffic_of(inputs: PlannedInputs, target: LogicalTensor) -> Traffic:
    """What merging one tensor of the child takes."""
    tensor = inputs.plan.merged_as(target)
    way = inputs.assigned[tensor.name]
    read = {name: input_bytes(inputs, name, tensor) for name in merged_inputs(inputs, way)}
    parents = {name: input_bytes(inputs, name, target) for name in inputs.parents}
    requested = sum(read.values())
    compared = requested + sum(
        size for name, size in parents.items() if way.copies or name not in read
    )
    if needs_statistic(way):
        compared += requested
    made = target.elements * BITS_PER_ELEMENT[target.dtype] // 8
    fp32 = FP32_BYTES * target.elements
    return Traffic(
        requested,
        _once(inputs, read),
        made,
        compared,
        _once(inputs, parents | read),
        made + requested if way.copies else requested + 2 * fp32 * (len(read) + 1) + made,
    )


def needs_statistic(way: Assignment) -> bool:
    """Whether the method must have seen the whole tensor first."""
    statistic = way.method.statistic
    return not way.copies and statistic is not None and statistic(way.values) is not None


def tables_of(inputs: PlannedInputs) -> int:
    """How many statistics a search keeps of the live model: one for each tensor and input."""
    ways = (inputs.assigned[tensor.name] for tensor in live_tensors(inputs))
    counts: dict[int, int] = {}
    for way in ways:
        if id(way) not in counts:
            counts[id(way)] = len(merged_inputs(inputs, way)) if needs_statistic(way) else 0
    return sum(counts[id(inputs.assigned[tensor.name])] for tensor in live_tensors(inputs))


def merged_inputs(inputs: PlannedInputs, way: Assignment) -> tuple[str, ...]:
    """The parents, and the base, that a merge reads."""
    if way.copies:
        return way.parents[:1]
    return (*way.parents, *([BASE] if way.uses_base(inputs.base is not None) else []))


def input_bytes(inputs: PlannedInputs, name: str, tensor: LogicalTensor) -> int:
    """Stored bytes of what one input has for a tensor of the child, the scales of FP8 codes included."""
    source = inputs.plan.source(name, tensor)
    if source is None:
        return 0
    size = source.elements * BITS_PER_ELEMENT[source.dtype] // 8
    if source.scales is not None:
        rows, columns = source.scales.block
        blocks = math.ceil(source.shape[0] / rows) * math.ceil(source.shape[1] / columns)
        size += blocks * BITS_PER_ELEMENT[source.scales.dtype] // 8
    return size


def total(traffic: Iterable[Traffic]) -> Traffic:
    """The sum."""
    found = Traffic()
    for one in traffic:
        found.add(one)
    return found


def live_tensors(inputs: PlannedInputs) -> list[LogicalTensor]:
    """Those that a live causal language model has: no vision tower, no prediction of further tokens."""
    return [tensor for tensor in inputs.plan.child.tensors if tensor.component not in CARRIED]


def largest_unit_memory(inputs: PlannedInputs, remote: bool) -> int:
    """The most that `unit_memory` is for any unit of the child."""
    # Most units are alike: tens of thousands of experts' matrices.
    kinds = {
        (
            id(inputs.assigned[unit.tensor.name]),
            unit.count,
            unit.tensor.elements,
            unit.tensor.dtype,
        ): unit
        for part in inputs.parts
        for unit in part.units
    }
    return max((unit_memory(inputs, unit, remote) for unit in kinds.values()), default=0)


def unit_memory(inputs: PlannedInputs, unit: MergeUnit, remote: bool) -> int:
    """Bytes that merging a unit needs beside its result: buffers in fp32, of the whole matrix where the
    method needs one, and the values that were read of it over the network."""
    way = inputs.assigned[unit.tensor.name]
    names = merged_inputs(inputs, way)
    sources = (inputs.plan.source(name, unit.tensor) for name in names)
    held = sum(BITS_PER_ELEMENT[s.values_dtype] // 8 * unit.count for s in sources if s) * remote
    if way.copies:
        return held
    whole = way.grain(unit.tensor) == "matrix"
    buffered = unit.tensor.elements if whole else min(CHUNK_ELEMENTS, unit.count)
    return held + (len(names) + 1) * buffered * FP32_BYTES


def _once(inputs: PlannedInputs, sizes: dict[str, int]) -> int:
    places: dict[str, int] = {}
    for name, size in sizes.items():
        place = inputs.all[name].place
        places[place] = max(size, places.get(place, 0))
    return sum(places.values())
