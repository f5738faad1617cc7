"""Memory and disk that a campaign needs: on a GPU, in a node, for one worker."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.config import CampaignConfig
from orchestrator.planning.inputs import PlannedInputs, PlannedParent
from orchestrator.planning.placement import Member, Placement, live_bytes, ranks, runs_on_gpu
from orchestrator.planning.traffic import largest_unit_memory, live_tensors, tables_of

PROCESS_BYTES = 600_000_000
"""Of a worker: Python, torch, transformers and Ray's own, before it has opened a parent."""

LOGICAL_TENSOR_BYTES = 500
"""Of a worker, for each logical tensor of each parent."""

STATISTIC_BYTES = 36_000
"""Of a table of one tensor of one parent, which a search keeps for methods that need it; as measured
(docs/performance.md)."""


@dataclass(frozen=True)
class Memory:
    """Bytes that must be there at the same time."""

    gpu: int
    """Of the worker that holds most: its part of the live model, and buffers. 0 for engines on CPUs."""
    live: int
    """That part of the live model alone."""
    resident: int
    """What of the parents belongs to it: kept in a node's memory, or streamed for each candidate."""
    streamed: int
    """Units in flight of a worker that realizes a candidate."""
    merging: int
    """Parts and units in flight of a worker that writes the child."""
    process: int
    """Of a worker, beside all this."""
    node: int
    """Of the fullest node, all its workers together."""
    copies: int
    """Of each node's disk: copies of parents."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def memory_of(
    config: CampaignConfig,
    inputs: PlannedInputs,
    placement: Placement,
    members: tuple[Member, ...],
) -> Memory:
    """What the campaign needs if the parents are streamed for each candidate."""
    remote = reads_by_request(inputs, placement.gang)
    unit = largest_unit_memory(inputs, remote)
    part = max(part.stop - part.start for part in inputs.parts)
    tensors = sum(len(found.tensors) for found in inputs.maps)
    tables = tables_of(inputs) * STATISTIC_BYTES // placement.gang
    process = PROCESS_BYTES + tensors * LOGICAL_TENSOR_BYTES + tables
    merging = max(needs.threads for _, needs in config.workers.groups) * (part + unit)
    live = max(member.live for member in members) // ranks(config)
    on_gpu = runs_on_gpu(config)
    # vLLM has a layer's new weights beside the old ones.
    beside = largest_layer(config, inputs) // ranks(config) if config.engine.kind == "vllm" else 0
    return Memory(
        gpu=live + beside + unit if on_gpu else 0,
        live=live,
        resident=max(member.traffic.touched for member in members),
        streamed=unit,
        merging=merging,
        process=process,
        node=node_bytes(placement, members, process + merging, not on_gpu, keeps=False),
        copies=sum(
            parent.stored_bytes
            for parent in inputs.places.values()
            if is_copied(parent, placement.gang)
        ),
    )


def node_bytes(
    placement: Placement, members: tuple[Member, ...], of_worker: int, has_live: bool, keeps: bool
) -> int:
    """Bytes of the fullest node's memory.

    Workers that hold the same part of the model share the parents' part; which of several gangs' workers are
    on a node together is Ray's choice, so they count as different ones.
    """
    live = max(member.live for member in members) * has_live
    parents = max(member.traffic.touched for member in members) * keeps
    return placement.most * (of_worker + live) + min(placement.most, placement.gang) * parents


def with_parents(
    memory: Memory, config: CampaignConfig, placement: Placement, members: tuple[Member, ...]
) -> Memory:
    """What it needs if the parents are kept in memory for the search."""
    of_worker, on_cpu = memory.process + memory.merging, not runs_on_gpu(config)
    return replace(memory, node=node_bytes(placement, members, of_worker, on_cpu, keeps=True))


def largest_layer(config: CampaignConfig, inputs: PlannedInputs) -> int:
    """Bytes of the live model's largest layer."""
    sizes: dict[int | None, int] = {}
    for tensor in live_tensors(inputs):
        sizes[tensor.layer] = sizes.get(tensor.layer, 0) + live_bytes(config, tensor)
    return max(size for layer, size in sizes.items() if layer is not None or len(sizes) == 1)


def is_copied(parent: PlannedParent, gang: int) -> bool:
    """Whether each node gets a copy on its disk: of a model of the hub, and of one in a bucket for engines
    that hold whole models. A gang reads what it needs where it lies."""
    return parent.kind == "hub" or (parent.kind == "bucket" and gang == 1)


def reads_by_request(inputs: PlannedInputs, gang: int) -> bool:
    """Whether some parent is read by requests to a store, again and again."""
    return any(
        parent.kind == "bucket" and not is_copied(parent, gang) for parent in inputs.places.values()
    )
