"""Whether a plan fits its cluster, and if not, what would."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from orchestrator.config import CampaignConfig
from orchestrator.planning.cluster import GB, Cluster
from orchestrator.planning.inputs import PlannedInputs
from orchestrator.planning.memory import Memory, node_bytes, reads_by_request
from orchestrator.planning.placement import (
    Member,
    Placement,
    place_workers,
    ranks,
    rooms,
    runs_on_gpu,
    share_out,
)
from workers.storage import MOST_PARTS

ENGINE_RESERVE = 0.1
"""Of a GPU's memory, what is left to the engine's activations and caches."""

MOST_WORKERS = 1 << 10
"""Of a gang that is looked for."""


def problems_of(
    config: CampaignConfig,
    inputs: PlannedInputs,
    cluster: Cluster,
    placement: Placement,
    members: tuple[Member, ...],
    memory: Memory,
    keeps: bool,
) -> list[str]:
    """Why the campaign cannot run like this, each with what would do."""
    found = [
        *_workers(config, cluster, placement, inputs.plan.father.experts > 0),
        *_gpu(config, inputs, cluster, memory),
        *_reserved(config, memory),
        *_node(config, cluster, placement, members, memory, keeps),
    ]
    if keeps and reads_by_request(inputs, placement.gang):
        found.append(
            "--keep: a gang asks a bucket for what it needs of the parents, and keeps nothing: --stream "
            "would do, or parents on a shared file system"
        )
    if memory.copies > cluster.disk_size * GB:
        found.append(
            f"disk: copies of the parents take {gigabytes(memory.copies)} on each node, which has "
            f"{gigabytes(cluster.disk_size * GB)}: a larger disk would do, or workers.gang with the "
            "parents in a bucket or on a shared file system, where each worker reads its part only"
        )
    most_parts = max(Counter(part.file for part in inputs.parts).values())
    if most_parts > MOST_PARTS:
        found.append(
            f"store: a file of the child would have {most_parts:,} parts, and a store takes {MOST_PARTS:,}: "
            "a father with smaller files would do"
        )
    return found


def _workers(
    config: CampaignConfig, cluster: Cluster, placement: Placement, has_experts: bool
) -> Iterator[str]:
    groups = config.workers.groups
    each = " or ".join(f"{needs} each" for _, needs in groups)
    gpus = min(needs.gpus for _, needs in groups)
    if runs_on_gpu(config) and math.ceil(gpus) < ranks(config):
        yield (
            f"workers: an engine runs on {ranks(config)} GPUs, and workers.gpus reserves {gpus:g}: "
            f"set it to {ranks(config)}"
        )
    if placement.gang > 1 and not has_experts:
        yield "workers.gang: the father has no routed experts to divide: vLLM divides such a model"
    too_large = [
        needs for (_, needs), n in zip(groups, rooms(config, cluster), strict=True) if not n
    ]
    for needs in too_large:
        others = "".join(f", {size:g} {name}" for name, size in cluster.resources.items())
        yield (
            f"workers: no node has room for one with {needs}: a node has {cluster.gpus_per_node} GPUs, "
            f"{cluster.cores_per_node} cores and {gigabytes(cluster.node_memory * GB)} of memory{others}"
        )
    if not too_large and placement.needed > cluster.nodes:
        fewer = cluster.nodes * placement.per_node // placement.gang
        gangs = f" in gangs of {placement.gang}" if placement.gang > 1 else ""
        many = f", {placement.per_node} on a node" if len(groups) == 1 else ""
        yield (
            f"workers: {placement.workers}{gangs} with {each} do not fit on {cluster.nodes} nodes{many}: "
            f"{placement.needed} nodes would do"
            + (
                f", or workers.count: {fewer}"
                if 0 < fewer < placement.engines and len(groups) == 1
                else ""
            )
        )


def _reserved(config: CampaignConfig, memory: Memory) -> Iterator[str]:
    """Of a worker's own memory; parents that are kept belong to all of a node."""
    needed = memory.process + memory.merging + (0 if runs_on_gpu(config) else memory.live)
    reserved = min((n.memory for _, n in config.workers.groups if n.memory), default=math.inf)
    if reserved * GB < needed:
        yield (
            f"workers.memory: reserves {gigabytes(reserved * GB)}, and a worker needs {gigabytes(needed)}: "
            f"set it to {math.ceil(needed / GB)}"
        )


def _gpu(
    config: CampaignConfig, inputs: PlannedInputs, cluster: Cluster, memory: Memory
) -> Iterator[str]:
    of_gpu = min(1.0, *(needs.gpus for _, needs in config.workers.groups))
    room = cluster.gpu_memory * GB * of_gpu * (1 - ENGINE_RESERVE)
    if not of_gpu or memory.gpu <= room:
        return
    left = room - (memory.gpu - memory.live)
    gang = None if config.engine.kind == "vllm" else _smallest_gang(config, inputs, left)
    if gang is not None:
        advice = f"a gang of {gang} workers would do (workers.gang)"
    elif left > 0:
        gpus = math.ceil(share_out(config, inputs, 1)[0].live / left)
        advice = f"vLLM over {gpus} GPUs would do (engine.kind, engine.vllm), or a larger GPU"
    else:
        advice = "a larger GPU would do"
    yield (
        f"GPU memory: a worker's part of the live model and its buffers take {gigabytes(memory.gpu)}, and "
        f"there is room for {gigabytes(room)} ({ENGINE_RESERVE:.0%} is left to the engine): {advice}"
        + (", or workers.gpus: 1" if of_gpu < 1 else "")
    )


def _smallest_gang(config: CampaignConfig, inputs: PlannedInputs, room: float) -> int | None:
    """How many workers hold the live model with so many bytes each; None if no number does: the first of them
    has everything that is no routed expert."""
    if not inputs.plan.father.experts or room <= 0:
        return None
    live = share_out(config, inputs, 1)[0].live
    for gang in range(max(2, math.ceil(live / room)), MOST_WORKERS):
        first, *others = (member.live for member in share_out(config, inputs, gang))
        if max(first, *others) <= room:
            return gang
        if first > room and not any(size > first for size in others):
            return None
    return None


def _node(
    config: CampaignConfig,
    cluster: Cluster,
    placement: Placement,
    members: tuple[Member, ...],
    memory: Memory,
    keeps: bool,
) -> Iterator[str]:
    room = cluster.node_memory * GB
    if memory.node <= room:
        return
    of_worker, on_cpu = memory.process + memory.merging, not runs_on_gpu(config)

    def needed(nodes: int) -> int:
        wider = place_workers(config, replace(cluster, nodes=nodes), placement="spread")
        return node_bytes(wider, members, of_worker, on_cpu, keeps)

    most = max(cluster.nodes, placement.workers)
    more = (n for n in range(cluster.nodes, most + 1) if needed(n) <= room)
    nodes = next(more, None)
    ways = [f"nodes with {gigabytes(memory.node)}"]
    if nodes is not None:
        ways.insert(
            0, f"{nodes} nodes with the workers spread over them (workers.placement: spread)"
        )
    if keeps and node_bytes(placement, members, of_worker, on_cpu, False) <= room:
        ways.append("parents that are streamed for each candidate (--stream)")
    yield (
        f"memory: the workers of a node need {gigabytes(memory.node)} of {gigabytes(room)}"
        f"{', with the parents kept there' if keeps else ''}: {', or '.join(ways)} would do"
    )


def gigabytes(size: float) -> str:
    """For people."""
    if size >= 1000 * GB:
        return f"{size / GB / 1000:,.2f} TB"
    return f"{size / GB:,.1f} GB" if size >= GB else f"{size / 10**6:,.0f} MB"
