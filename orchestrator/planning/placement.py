"""Which workers run on which nodes, and what of a model each of them holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.config import CampaignConfig
from orchestrator.placement import room_on
from orchestrator.planning.cluster import Cluster
from orchestrator.planning.inputs import PlannedInputs
from orchestrator.planning.traffic import Traffic, live_tensors
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
    """As many workers as a node has room for."""
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
    count = workers.count * gang
    per_node = _per_node(config, cluster)
    needed = math.ceil(count / max(per_node, 1))
    if placement == "strict":
        needed = max(needed, gang if gang > 1 else count)
    nodes: dict[int, int] = {}
    leading = set()
    for worker in range(count):
        apart = max(cluster.nodes, needed)
        node = worker // max(per_node, 1) if placement in ("none", "pack") else worker % apart
        nodes[node] = nodes.get(node, 0) + 1
        if worker % gang == 0:
            leading.add(node)
    return Placement(workers.count, gang, per_node, tuple(nodes.values()), len(leading), needed)


def _per_node(config: CampaignConfig, cluster: Cluster) -> int:
    if not config.workers.cpus and not config.workers.gpus:
        return cluster.cores_per_node
    return room_on(config.workers, {"CPU": cluster.cores_per_node, "GPU": cluster.gpus_per_node})


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
