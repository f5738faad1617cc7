"""The stages of a campaign on its nodes: what each reads, writes and moves, and what it waits for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.config import CampaignConfig
from orchestrator.planning.cluster import GB, Cluster
from orchestrator.planning.inputs import PlannedInputs
from orchestrator.planning.memory import is_copied, reads_by_request
from orchestrator.planning.placement import Member, Placement, merging_ranks, runs_on_gpu
from orchestrator.planning.traffic import Traffic, live_tensors, total

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


@dataclass(frozen=True)
class Timing:
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
        leading = self.placement.leading_nodes
        if self.config.experts.match != "none":
            # Each donor's experts beside the father's.
            experts = [t for t in self.inputs.plan.father.tensors if t.component == "expert"]
            size = (
                2
                * (len(self.inputs.parents) - 1)
                * sum(self.inputs.traffic[t.name].made for t in experts)
            )
            found.append(self._read("read the experts to match them", size, leading))
        if self.inputs.scans and self.config.scan.static:
            cores = all_bytes / (self.placement.workers * self.cluster.core_scan * GB)
            found.append(self._read("scan the weights", all_bytes, self.nodes, cores))
        if self.inputs.scans and self.config.scan.probe:
            live = sum(member.live for member in self.members) * len(self.inputs.parents)
            found.append(self._read("read the parents for the probe", live, leading))
        if self.placement.gang == 1:
            found.append(
                self._read("load the live models", self.members[0].live * self.nodes, self.nodes)
            )
        if self.keeps:
            resident = max(member.traffic.touched for member in self.members)
            size = self.nodes * min(self.placement.most, self.placement.gang) * resident
            found.append(self._read("read the parents into memory", size, self.nodes))
        found.append(self._search(score_seconds))
        if self.config.engine.kind == "vllm":
            found.append(self._canary())
        by_request = reads_by_request(self.inputs, self.placement.gang)
        read = child.compared if by_request else child.touched
        return [*found, *self._ending(read, child, child_bytes, all_bytes)]

    def _copy(self, copied: int) -> Stage:
        seconds, bound = _slowest(
            {"nic": copied / (self.cluster.nic * GB), "disk": copied / (self.cluster.disk * GB)}
        )
        size = copied * self.nodes
        return Stage("copy the parents to every node", 1, size, size, size, seconds, bound)

    def _read(self, name: str, size: int, nodes: int, cores: float = 0.0) -> Stage:
        """Parents read once, by so many nodes together."""
        reading = self._reading(size, nodes) | {"cores": cores}
        return Stage(name, 1, size, 0, self._moved(size), *_slowest(reading))

    def _moved(self, size: int) -> int:
        """Of what is read of parents, over the network."""
        return round(size * self.network_share)

    def _reading(self, size: float, nodes: int) -> dict[str, float]:
        over_network = size * self.network_share
        return {
            "nic": over_network / (nodes * self.cluster.nic * GB),
            "disk": (size - over_network) / (nodes * self.cluster.disk * GB),
        }

    @property
    def _scored(self) -> int:
        """How many times an engine scores a model."""
        parents = EXAMINATIONS * len(self.inputs.parents)
        return self.config.search.evaluations + parents + CHILD_EXAMINATIONS

    @property
    def _realized(self) -> int:
        """How many times an engine realizes a model. In a race that is for each block of items that a
        candidate is asked, and once more for a leader: here as if every candidate came so far."""
        racing = self.config.racing
        more = {"none": 0, "race": len(racing.shares), "irt": 1}[racing.use]
        return self._scored + more * self.config.search.evaluations

    def _rounds(self, times: int) -> int:
        """The engines take turns."""
        return math.ceil(times / max(self.placement.engines, 1))

    def _search(self, score_seconds: float) -> Stage:
        times = self._realized
        by_request = reads_by_request(self.inputs, self.placement.gang)
        read = sum(m.traffic.requested if by_request else m.traffic.distinct for m in self.members)
        made = sum(member.live for member in self.members)
        seconds, bound = self.realize_seconds()
        moved = 0 if self.keeps else self._moved(times * read)
        name = "realize the candidates" + (" and score them" if score_seconds else "")
        return Stage(
            name + (", at most" if times > self._scored else ""),
            times,
            times * read,
            times * made,
            moved,
            self._rounds(times) * seconds + self._rounds(self._scored) * score_seconds,
            bound if seconds >= score_seconds else "scoring",
        )

    def _canary(self) -> Stage:
        """Comparisons of each live model with transformers, which merges it once more on one core while the
        engine waits; the first is of the father, before the search."""
        every = self.config.engine.canary
        checks = 1 + (math.ceil(self._rounds(self._realized) / every) if every else 0)
        live = total(self.inputs.traffic[tensor.name] for tensor in live_tensors(self.inputs))
        taken = {"one core": live.made / (self.cluster.core_merge * GB)}
        if not self.keeps:
            taken |= self._reading(live.distinct, 1)
        seconds, bound = _slowest(taken)
        times = checks * max(self.placement.engines, 1)
        moved = 0 if self.keeps else self._moved(times * live.distinct)
        return Stage(
            "compare live models with transformers (canary)",
            times,
            times * live.distinct,
            0,
            moved,
            checks * seconds,
            bound,
        )

    def realize_seconds(self) -> tuple[float, str]:
        """Of one candidate, while the other engines do the same; and what bounds it."""
        cluster, by_request = self.cluster, reads_by_request(self.inputs, self.placement.gang)
        shares = {}
        if not runs_on_gpu(self.config):
            threads = self.config.engine.threads
            most = max(member.traffic.made for member in self.members)
            shares["cores"] = most / (threads * cluster.core_merge * GB)
        else:
            copied = max(member.traffic.requested for member in self.members)
            gpus = merging_ranks(self.config)
            shares["gpu copy"] = copied / (gpus * cluster.gpu_copy * GB)
            computed = max(member.traffic.computed for member in self.members)
            shares["gpu"] = computed / (gpus * cluster.gpu_bandwidth * GB)
        if not self.keeps:
            traffic = (member.traffic for member in self.members)
            of_worker = max(t.requested if by_request else t.distinct for t in traffic)
            # Workers of one node that hold the same read it once, but for what comes by request.
            apart = (
                self.placement.most if by_request else min(self.placement.most, self.placement.gang)
            )
            shares |= self._reading(of_worker * apart, 1)
        return _slowest(shares)

    def _ending(self, read: int, child: Traffic, size: int, parents: int) -> list[Stage]:
        """The child written, read back, and measured beside its parents."""
        threads = sum(needs.threads for needs in self.config.workers.places) * self.placement.gang
        engines = self.placement.engines
        out = size if self.writes_over_network else 0
        store, rate = ("nic", self.cluster.nic) if out else ("disk", self.cluster.disk)
        writing = {store: size / (self.nodes * rate * GB)}
        core_seconds = child.made / (threads * self.cluster.core_merge * GB)
        merging = _sum(self._reading(read, self.nodes), writing) | {"cores": core_seconds}
        measuring = _sum(self._reading(parents, self.nodes), writing) | {"cores": core_seconds}
        # A file is read back by one worker, of a gang by the first.
        files = self.inputs.plan.layout.weight_files
        rounds = math.ceil(len(files) / engines)
        back = {
            store: size / (self.placement.leading_nodes * rate * GB),
            "cores": rounds * max(file.size for file in files) / (self.cluster.core_hash * GB),
        }
        return [
            Stage("merge and write the child", 1, read, size, self._moved(read) + out, *_slowest(merging)),
            Stage("read it back", 1, size, 0, out, *_slowest(back)),
            Stage(
                "measure it beside its parents", 1, size + parents, 0, self._moved(parents) + out,
                *_slowest(measuring),
            ),
        ]  # fmt: skip


def _sum(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in one | other}


def _slowest(shares: dict[str, float]) -> tuple[float, str]:
    """Seconds of what takes longest, and its name: all of it goes on at the same time."""
    bound = max(shares, key=lambda name: shares[name])
    return shares[bound], bound
