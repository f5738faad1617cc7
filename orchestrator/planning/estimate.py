"""The plan of a campaign: bytes, memory, parts and times of its stages; docs/cluster.md has the formulas."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from orchestrator.config import CampaignConfig
from orchestrator.planning.cluster import GB, Cluster
from orchestrator.planning.fits import problems_of
from orchestrator.planning.inputs import PlannedInputs
from orchestrator.planning.memory import (
    memory_of,
    reads_by_request,
    with_parents,
)
from orchestrator.planning.placement import (
    ENGINE_BYTES,
    Placement,
    place_workers,
    share_out,
)
from orchestrator.planning.stages import Timing
from orchestrator.planning.traffic import total
from workers.storage import MOST_PARTS


def estimate(
    config: CampaignConfig,
    inputs: PlannedInputs,
    cluster: Cluster,
    keeps: bool | None = None,
    score_seconds: float = 0.0,
) -> dict[str, Any]:
    """Everything that `darwin plan` tells, as plain data; sizes in bytes, times in seconds.

    `keeps`: whether the parents' values stay in the nodes' memory between candidates; None: if they fit.
    `score_seconds`: what an engine takes to score a candidate, which no header tells.
    """
    placement = place_workers(config, cluster)
    members = share_out(config, inputs, placement.gang)
    memory = memory_of(config, inputs, placement, members)
    kept = with_parents(memory, config, placement, members)
    if keeps is None:
        remote = reads_by_request(inputs, placement.gang)
        keeps = kept.node <= cluster.node_memory * GB and not remote
    memory = kept if keeps else memory
    parts_of = Counter(part.file for part in inputs.parts)
    files = inputs.plan.layout.weight_files
    timing = Timing(config, inputs, cluster, placement, members, keeps)
    problems = problems_of(config, inputs, cluster, placement, members, memory, keeps)
    child_bytes = sum(file.size for file in files)
    stages = timing.stages(total(inputs.traffic.values()), child_bytes, score_seconds)
    return {
        "status": "does not fit" if problems else "fits",
        "problems": problems,
        "warnings": inputs.warnings,
        "campaign": config.name,
        "parents": [
            {"name": name, "place": parent.place, "kind": parent.kind, "like": parent.like,
             "bytes": parent.stored_bytes}
            for name, parent in inputs.all.items()
        ],
        "child": {
            "tensors": len(inputs.plan.layout.tensors),
            "units": len(inputs.plan.child.tensors),
            "bytes": inputs.plan.layout.total_bytes,
            "live_bytes": sum(member.live for member in members),
            "files": len(files),
            "largest_file": max(file.size for file in files),
            "parts_per_file": [min(parts_of.values()), max(parts_of.values())],
            "most_parts": MOST_PARTS,
            "parts": len(inputs.parts),
        },
        "token_bytes": _token_bytes(config, inputs, placement),
        "cluster": cluster.to_dict(),
        "workers": {
            "count": placement.workers,
            "gang": placement.gang,
            "engines": placement.engines,
            "nodes": len(placement.nodes),
            "most_on_a_node": placement.most,
            "keeps_parents": keeps,
        },
        "memory": memory.to_dict(),
        "stages": [asdict(stage) for stage in stages],
        "seconds": sum(stage.seconds for stage in stages),
        "score_seconds": score_seconds,
    }  # fmt: skip


def _token_bytes(config: CampaignConfig, inputs: PlannedInputs, placement: Placement) -> int | None:
    """Bytes that go between the workers of a gang for each token that is read, at most: hidden states to each
    chosen expert's holder and back. None if the model's configuration does not tell."""
    father = inputs.plan.father
    text = father.checkpoint.config.get("text_config") or father.checkpoint.config
    hidden, chosen = text.get("hidden_size"), text.get("num_experts_per_tok")
    if placement.gang == 1 or not isinstance(hidden, int) or not isinstance(chosen, int):
        return None
    layers = len({t.layer for t in father.tensors if t.expert is not None and t.layer is not None})
    size = ENGINE_BYTES.get(config.engine.dtype, 2)
    return 2 * layers * chosen * hidden * size * (placement.gang - 1) // placement.gang
