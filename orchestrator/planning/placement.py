"""Which workers run on which nodes, and what of a model each of them holds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from orchestrator.config import CampaignConfig
from orchestrator.planning.cluster import GB, Cluster
from orchestrator.planning.inputs import PlannedInputs
from orchestrator.planning.traffic import Traffic, live_tensors
from orchestrator.pool.placement import room_on
from orchestrator.pool.room import has_room, take
from orchestrator.workers_config import Needs
from workers.checkpoints import LogicalTensor
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.errors import BadInputError
from workers.experts.shard_map import ShardMap

ENGINE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of an element of a live model, where its dtype is not the checkpoint's."""


@dataclass(frozen=True)
class Placement:
    """Workers on nodes. An engine is one worker, or a gang of them, whose first one leads."""

    engines: int
    gang: int
    """Workers that hold one live model together."""
    per_node: int
    """As many workers as a node has room for; of those that need most."""
    nodes: tuple[int, ...]
    """Workers on each node that has any."""
    leading_nodes: int
    """Nodes with an engine's first worker."""
    needed: int
    """Nodes without which the workers have no places."""

    @property
    def workers(self) -> int:
        return self.engines * self.gang

    @property
    def most(self) -> int:
        """Workers of the fullest node."""
        return max(self.nodes)


def place_workers(config: CampaignConfig, cluster: Cluster, placement: str = "none") -> Placement:
    """The campaign's workers on as many nodes as they need: node after node, or spread over the cluster's."""
    workers = config.workers
    gang = workers.gang
    placement = workers.placement if workers.placement != "none" else placement
    count = workers.total * gang
    per_node = min(rooms(config, cluster))
    apart = placement == "strict" and (gang if gang > 1 else count)
    if workers.pools and per_node:
        on_nodes = _pack(config, cluster, placement, cluster.nodes)
        needed = max(max(on_nodes) + 1, apart)
        if placement not in ("none", "pack"):
            needed = max(max(_pack(config, cluster, "none", cluster.nodes)) + 1, apart)
            on_nodes = _pack(config, cluster, placement, max(cluster.nodes, needed))
    else:
        needed = max(math.ceil(count / max(per_node, 1)), apart)
        wide = max(cluster.nodes, needed)
        packs = placement in ("none", "pack")
        on_nodes = [w // max(per_node, 1) if packs else w % wide for w in range(count)]
    leading = {node for worker, node in enumerate(on_nodes) if worker % gang == 0}
    nodes = tuple(Counter(on_nodes).values())
    return Placement(workers.total, gang, per_node, nodes, len(leading), needed)


def _pack(config: CampaignConfig, cluster: Cluster, placement: str, nodes: int) -> list[int]:
    """The node of each worker, where they need different things: each on the first node that has room, or
    (`spread`, `strict`) on that with fewest workers among so many; on further nodes if it must."""
    left = [node_of(cluster) for _ in range(nodes)]
    found: list[int] = []
    there = [0] * nodes
    for needs in (n for n in config.workers.places for _ in range(config.workers.gang)):
        bundle = _of_whole_gpus(needs)
        fitting = [number for number, node in enumerate(left) if has_room(node, bundle)]
        if not fitting:
            left.append(node_of(cluster))
            there.append(0)
            fitting = [len(left) - 1]
        packs = placement in ("none", "pack")
        node = fitting[0] if packs else min(fitting, key=there.__getitem__)
        take(left[node], bundle)
        there[node] += 1
        found.append(node)
    return found


def _of_whole_gpus(needs: Needs) -> dict[str, float]:
    """What a worker takes: of a GPU as much as makes others that need the same fit on it or not."""
    bundle = needs.bundle
    if 0 < needs.gpus < 1:
        bundle["GPU"] = 1 / int(1 / needs.gpus + 1e-9)
    return bundle


def node_of(cluster: Cluster) -> dict[str, float]:
    """What a node of the cluster has, by Ray's names."""
    own = {"CPU": float(cluster.cores_per_node), "GPU": float(cluster.gpus_per_node)}
    return own | {"memory": cluster.node_memory * GB} | cluster.resources


def rooms(config: CampaignConfig, cluster: Cluster) -> list[int]:
    """For how many workers of each group a node that has no others has room."""
    return [
        room_on(needs, node_of(cluster)) if needs.bundle else cluster.cores_per_node
        for _, needs in config.workers.groups
    ]


def ranks(config: CampaignConfig) -> int:
    """GPUs over which vLLM divides the model of one worker."""
    return math.prod(_parallel(config, way) for way in ("tensor", "pipeline"))


def merging_ranks(config: CampaignConfig) -> int:
    """Among how many of them the merging is divided: of a matrix that is cut each one merges the whole."""
    experts = config.engine.vllm.get("enable_expert_parallel")
    return _parallel(config, "pipeline") * (_parallel(config, "tensor") if experts else 1)


def _parallel(config: CampaignConfig, way: str) -> int:
    size = config.engine.vllm.get(f"{way}_parallel_size", 1)
    if type(size) is not int or size < 1:
        raise BadInputError(f"engine.vllm.{way}_parallel_size: {size!r} is not 1 or more")
    return size


def runs_on_gpu(config: CampaignConfig) -> bool:
    """Whether live models are in GPUs' memory."""
    return config.engine.kind == "vllm" or config.engine.device != "cpu"


@dataclass(frozen=True)
class Member:
    """What one worker of a gang holds of the live model, and what realizing a candidate takes there."""

    live: int
    """Bytes of its weights in the engine."""
    traffic: Traffic


def share_out(config: CampaignConfig, inputs: PlannedInputs, gang: int) -> tuple[Member, ...]:
    """The live model's tensors, shared out among the workers of a gang; the first of them leads."""
    tensors = live_tensors(inputs)
    names = [f"member {number}" for number in range(gang)]
    shards = ShardMap.of(tensors, names, lead=names[0]) if gang > 1 else None
    live = dict.fromkeys(names, 0)
    shares = {name: Traffic() for name in names}
    for tensor in tensors:
        owner = shards.owner(tensor) if shards else names[0]
        live[owner] += live_bytes(config, tensor)
        shares[owner].add(inputs.traffic[tensor.name])
    return tuple(Member(live[name], shares[name]) for name in names)


def live_bytes(config: CampaignConfig, tensor: LogicalTensor) -> int:
    """Bytes of a tensor in the engine."""
    own = BITS_PER_ELEMENT[tensor.dtype] // 8
    return tensor.elements * ENGINE_BYTES.get(config.engine.dtype, own)
