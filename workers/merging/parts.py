"""The parts of a child's files: what one worker merges and writes at a time.

A part is a stretch of one file that begins and ends with merge units. Which parts there are depends on
the recipe and the layouts alone, so that every worker, and every attempt, speaks of the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from workers.checkpoints import LogicalTensor, WeightFile
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.merging.plan import Assignment, MergeUnit, Plan
from workers.storage import MOST_PARTS

PART_BYTES = 32 << 20
"""A part is at least this large, but for the last one of a file; and at most a unit larger."""

PARTS_OF_LARGE_FILES = MOST_PARTS * 9 // 10
"""About so many parts have the files that would have more of the usual size."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes `start` to `stop` of a file of the child, the header included in the first part."""

    file: str
    number: int
    """From 1 on, in each file."""
    start: int
    stop: int
    units: tuple[MergeUnit, ...]

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from the others."""
        return self.file, self.number


def cut_parts(plan: Plan, assigned: dict[str, Assignment]) -> tuple[Part, ...]:
    """All parts of the child, in the order of its files and of the bytes in them."""
    pieces: dict[str, list[LogicalTensor]] = {}
    for tensor in plan.child.tensors:
        pieces.setdefault(tensor.stored, []).append(tensor)
    for tensors in pieces.values():
        tensors.sort(key=lambda tensor: tensor.offset)
    return tuple(
        part
        for file in plan.layout.weight_files
        for part in _cut_file(plan, assigned, file, pieces)
    )


def _cut_file(
    plan: Plan,
    assigned: dict[str, Assignment],
    file: WeightFile,
    pieces: dict[str, list[LogicalTensor]],
) -> Iterator[Part]:
    least = max(PART_BYTES, -(-file.size // PARTS_OF_LARGE_FILES))
    number, start, stop = 1, 0, len(file.header.raw)
    units: list[MergeUnit] = []
    for entry in file.header.entries:
        for target in pieces[entry.name]:
            way = assigned[plan.merged_as(target).name]
            for unit in plan.units(target, way.grain(target)):
                units.append(unit)
                stop += unit.count * BITS_PER_ELEMENT[target.dtype] // 8
                if stop - start >= least and stop < file.size:
                    yield Part(file.name, number, start, stop, tuple(units))
                    number, start, units = number + 1, stop, []
    assert stop == file.size, (file.name, stop, file.size)
    yield Part(file.name, number, start, stop, tuple(units))
