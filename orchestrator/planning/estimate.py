"""The plan of a campaign: bytes, memory, parts and times of its stages, by the formulas of docs/cluster.md."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from orchestrator.config import CampaignConfig
from orchestrator.planning.cluster import GB, Cluster
from orchestrator.planning.fits import problems_of
from orchestrator.planning.inputs import PlannedInputs
from orchestrator.planning.memory import (
    is_copied,
    memory_of,
    reads_by_request,
    with_parents,
)
from orchestrator.planning.placement import (
    ENGINE_BYTES,
    Member,
    Placement,
    place_workers,
    share_out,
)
from orchestrator.planning.traffic import Traffic, total, traffic_by_tensor
from workers.merging.parts import cut_parts
from workers.storage import MOST_PARTS

EXAMINATIONS = 3
"""Realizations of every parent beside the search: for its score there, on held-out items, and examined."""

CHILD_EXAMINATIONS = 2
"""Of the child, on held-out items and examined."""


@dataclass(frozen=True)
class Stage:
    """One step of a campaign, over the whole cluster."""

    name: str
    times: int
    read: int
    """Bytes, of all `times`, from wherever they lie."""
    written: int
    moved: int
    """Of what is read and written, over the network."""
    seconds: float
    bound: str
    """What is busy all the time."""


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
    traffic = traffic_by_tensor(inputs)
    share = partial(share_out, config, inputs, traffic)
    members = share(placement.gang)
    parts = cut_parts(inputs.plan, inputs.assigned)
    memory = memory_of(config, inputs, placement, members, parts)
    kept = with_parents(memory, config, placement, members)
    if keeps is None:
        remote = reads_by_request(inputs, placement.gang)
        keeps = kept.node <= cluster.node_memory * GB and not remote
    memory = kept if keeps else memory
    parts_of = Counter(part.file for part in parts)
    files = inputs.plan.layout.weight_files
    timing = _Timing(config, inputs, cluster, placement, members, keeps)
    most_parts = max(parts_of.values())
    problems = problems_of(config, cluster, placement, members, memory, keeps, most_parts, share)
    child_bytes = sum(file.size for file in files)
    stages = timing.stages(total(traffic.values()), child_bytes, score_seconds)
    return {
        "status": "does not fit" if problems else "fits",
        "problems": problems,
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
            "parts": len(parts),
        },
        "token_bytes": _token_bytes(config, inputs, placement),
        "cluster": cluster.to_dict(),
        "workers": {
            "count": placement.workers,
            "gang": placement.gang,
            "engines": placement.engines,
            "nodes": len(placement.nodes),
            "most_on_a_node": max(map(len, placement.nodes)),
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


@dataclass(frozen=True)
class _Timing:
    """Stages on one placement."""

    config: CampaignConfig
    inputs: PlannedInputs
    cluster: Cluster
    placement: Placement
    members: tuple[Member, ...]
    keeps: bool

    @property
    def nodes(self) -> int:
        return len(self.placement.nodes)

    @property
    def network_share(self) -> float:
        """The part of the parents' bytes that no node has on its own disk."""
        sizes = [
            (parent.stored_bytes, is_copied(parent, self.placement.gang) or self._is_local(parent.place))
            for parent in self.inputs.places.values()
        ]  # fmt: skip
        return sum(size for size, local in sizes if not local) / sum(size for size, _ in sizes)

    def _is_local(self, place: str) -> bool:
        """Whether a path is a disk of the only node, not a file system that several share."""
        return self.nodes == 1 and "://" not in place

    @property
    def writes_over_network(self) -> bool:
        return not self._is_local(self.config.store)

    def stages(self, child: Traffic, child_bytes: int, score_seconds: float) -> list[Stage]:
        """All of them, in order."""
        places = self.inputs.places.values()
        all_bytes = sum(parent.stored_bytes for parent in places)
        copied = sum(p.stored_bytes for p in places if is_copied(p, self.placement.gang))
        found = []
        if copied:
            found.append(self._copy(copied))
        if self.inputs.scans and self.config.scan.static:
            found.append(self._read("scan the weights", all_bytes))
        if self.inputs.scans and self.config.scan.probe:
            live = sum(member.live for member in self.members) * len(self.inputs.parents)
            found.append(self._read("probe the parents, layer by layer", live))
        if self.placement.gang == 1:
            live = self.members[0].live
            found.append(self._read("load the live models", live * self.nodes))
        found.append(self._search(score_seconds))
        by_request = reads_by_request(self.inputs, self.placement.gang)
        read = child.compared if by_request else child.touched
        return [*found, *self._ending(read, child, child_bytes, all_bytes)]

    def _copy(self, copied: int) -> Stage:
        seconds, bound = _slowest(
            {"nic": copied / (self.cluster.nic * GB), "disk": copied / (self.cluster.disk * GB)}
        )
        size = copied * self.nodes
        return Stage("copy the parents to every node", 1, size, size, size, seconds, bound)

    def _read(self, name: str, size: int, more: dict[str, float] | None = None) -> Stage:
        """Parents read once, by all nodes together."""
        moved = round(size * self.network_share)
        seconds, bound = _slowest(self._reading(size) | (more or {}))
        return Stage(name, 1, size, 0, moved, seconds, bound)

    def _reading(self, size: float) -> dict[str, float]:
        over_network = size * self.network_share
        return {
            "nic": over_network / (self.nodes * self.cluster.nic * GB),
            "disk": (size - over_network) / (self.nodes * self.cluster.disk * GB),
        }

    def _search(self, score_seconds: float) -> Stage:
        parents = len(self.inputs.parents)
        times = self.config.search.evaluations + EXAMINATIONS * parents + CHILD_EXAMINATIONS
        rounds = math.ceil(times / max(self.placement.engines, 1))
        by_request = reads_by_request(self.inputs, self.placement.gang)
        read = sum(m.traffic.requested if by_request else m.traffic.distinct for m in self.members)
        made = sum(member.live for member in self.members)
        seconds, bound = self.realize_seconds()
        moved = 0 if self.keeps else round(times * read * self.network_share)
        return Stage(
            "realize the candidates" + (" and score them" if score_seconds else ""),
            times,
            times * read,
            times * made,
            moved,
            rounds * (seconds + score_seconds),
            bound if seconds >= score_seconds else "scoring",
        )

    def realize_seconds(self) -> tuple[float, str]:
        """Of one candidate, while the other engines do the same; and what bounds it."""
        cluster, by_request = self.cluster, reads_by_request(self.inputs, self.placement.gang)
        shares = {}
        if self.config.engine.device == "cpu":
            threads = self.config.engine.threads
            most = max(member.traffic.made for member in self.members)
            shares["cores"] = most / (threads * cluster.core_merge * GB)
        else:
            copied = max(member.traffic.requested for member in self.members)
            shares["gpu copy"] = copied / (cluster.gpu_copy * GB)
            computed = max(member.traffic.computed for member in self.members)
            shares["gpu"] = computed / (cluster.gpu_bandwidth * GB)
        if not self.keeps:
            of_node = max(
                sum(
                    self.members[worker % self.placement.gang].traffic.requested
                    if by_request
                    else self.members[worker % self.placement.gang].traffic.distinct
                    for worker in node
                )
                for node in self.placement.nodes
            )
            over_network = of_node * self.network_share
            shares["nic"] = over_network / (cluster.nic * GB)
            shares["disk"] = (of_node - over_network) / (cluster.disk * GB)
        return _slowest(shares)

    def _ending(self, read: int, child: Traffic, size: int, parents: int) -> list[Stage]:
        """The child written, read back, and measured beside its parents."""
        cores = self.placement.workers * max(1, int(self.config.workers.cpus))
        nic, disk = (self.nodes * rate * GB for rate in (self.cluster.nic, self.cluster.disk))
        out = size if self.writes_over_network else 0
        from_parents = self._reading(read)
        writing = {"nic": size / nic} if out else {"disk": size / disk}
        merging = {
            "cores": child.made / (cores * self.cluster.core_merge * GB),
            "nic": from_parents["nic"] + writing.get("nic", 0.0),
            "disk": from_parents["disk"] + writing.get("disk", 0.0),
        }
        files = self.inputs.plan.layout.weight_files
        rounds = math.ceil(len(files) / self.placement.workers)
        largest = max(file.size for file in files)
        hashing = {"cores": rounds * largest / (self.cluster.core_hash * GB)} | writing
        all_parents = self._reading(parents)
        measuring = {
            "cores": child.made / (cores * self.cluster.core_merge * GB),
            "nic": all_parents["nic"] + writing.get("nic", 0.0),
            "disk": all_parents["disk"] + writing.get("disk", 0.0),
        }
        moved = [round(count * self.network_share) for count in (read, parents)]
        return [
            Stage("merge and write the child", 1, read, size, moved[0] + out, *_slowest(merging)),
            Stage("read it back", 1, size, 0, out, *_slowest(hashing)),
            Stage(
                "measure it beside its parents", 1, size + parents, 0, moved[1] + out,
                *_slowest(measuring),
            ),
        ]  # fmt: skip


def _slowest(shares: dict[str, float]) -> tuple[float, str]:
    """Seconds of what takes longest, and its name: all of it goes on at the same time."""
    bound = max(shares, key=lambda name: shares[name])
    return shares[bound], bound
