"""Groups of a child's parts: what a worker merges in one call, and whose part of the model it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.checkpoints import LogicalTensor
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.experts.shard_map import ShardMap
from workers.merging.parts import Part

TENSOR_BYTES = 128 << 20
"""Parts of one tensor are given to one worker together, up to so many."""


@dataclass
class Group:
    """Parts that one call writes."""

    owner: int
    """The worker, from 0 on, that owns most of every part."""
    keys: list[tuple[str, int]] = field(default_factory=list)
    size: int = 0


def part_owners(
    parts: Sequence[Part], tensors: Sequence[LogicalTensor], workers: int
) -> dict[tuple[str, int], int]:
    """Part -> the worker, from 0 on, that owns most bytes of it by the shard map of the child's `tensors`.

    A worker that has read its part of the parents before, in a search, finds it in its machine's memory.
    """
    if workers == 1:
        return dict.fromkeys((part.key for part in parts), 0)
    shard_map = ShardMap.of(tensors, [str(number) for number in range(workers)])
    owners = {}
    for part in parts:
        owned: Counter[str] = Counter()
        for unit in part.units:
            owned[shard_map.owner(unit.target)] += unit.count * BITS_PER_ELEMENT[unit.target.dtype]
        # A part may hold nothing but a header, or tensors of no elements.
        owners[part.key] = int(max(owned, key=lambda worker: owned[worker], default="0"))
    return owners


def group_parts(
    parts: Sequence[Part], owners: dict[tuple[str, int], int], group_bytes: int
) -> list[Group]:
    """These parts, in their order, in groups of one owner and about so many bytes."""
    groups: list[Group] = []
    latest: dict[int, Group] = {}
    for part in parts:
        owner = owners[part.key]
        group = latest.get(owner)
        # The rest of a tensor goes to the same worker: it knows its statistics by then.
        goes_on = bool(part.units) and part.units[0].first > 0
        most = max(group_bytes, TENSOR_BYTES) if goes_on else group_bytes
        if group is None or group.size >= most:
            group = latest[owner] = Group(owner)
            groups.append(group)
        group.keys.append(part.key)
        group.size += part.stop - part.start
    return groups
