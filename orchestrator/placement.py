"""On which nodes workers run: places that are reserved together, in one of Ray's placement groups.

Each worker has a bundle of the group, and is started again in it. When a node is lost, Ray looks for
another one for its bundles; until there is one, the actors that are to run in them wait, and the others
go on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.config import PLACEMENTS, WorkersConfig
from workers.errors import BadInputError

STRATEGIES = {"none": "PACK", "pack": "PACK", "spread": "SPREAD", "strict": "STRICT_SPREAD"}
"""Values of `workers.placement`, and what Ray calls them."""


class Placement:
    """A reserved place for each worker, on nodes as `workers.placement` asks. Ray is up."""

    def __init__(self, config: WorkersConfig) -> None:
        from ray.util import placement_group

        self._config = config
        self._group = placement_group(
            [_bundle(config)] * config.count, strategy=STRATEGIES[config.placement]
        )
        lacking = what_lacks(config, _nodes())
        if lacking is not None and not self._group.wait(0):
            print(f"darwin: warning: waiting for nodes: {lacking}", file=sys.stderr)

    def options(self, number: int) -> dict[str, Any]:
        """Options of an actor that is to run in this worker's place."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=number
        )
        return {"scheduling_strategy": strategy}

    def problem(self) -> str:
        """Why workers may have no places."""
        return what_lacks(self._config, _nodes()) or (
            f"workers.placement: {self._config.placement} needs room for {self._config.count} workers with "
            f"{_size(self._config)} each: the cluster is large enough, but others use it"
        )

    def release(self) -> None:
        """Give the places back."""
        from ray.util import remove_placement_group

        remove_placement_group(self._group)


def workers_asked_for(
    count: int, cpus: float = 1.0, placement: str = "none"
) -> WorkersConfig | None:
    """The Ray workers that a command's options ask for; None: no such workers.

    Raises `BadInputError` for options that cannot be.
    """
    if count < 0:
        raise BadInputError(f"--workers: {count} must be 0 or more")
    if not 0 <= cpus < math.inf:
        raise BadInputError(f"--cpus: {cpus} must be a number from 0 on")
    if placement != "none" and not count:
        raise BadInputError("--placement: is for Ray workers: say how many with --workers")
    return WorkersConfig(count=count, cpus=cpus, placement=placement) if count else None


def check_placement(config: WorkersConfig, address: str | None) -> None:
    """Raise `BadInputError` for a placement that cannot be, whatever the cluster."""
    if config.placement == "none":
        return
    if config.placement not in STRATEGIES:
        raise BadInputError(
            f"workers.placement: {config.placement!r} is none of {', '.join(PLACEMENTS)}"
        )
    if config.cpus == 0 and config.gpus == 0:
        raise BadInputError(
            "workers.placement: workers that need neither CPUs nor GPUs have no places"
        )
    # Gangs lie apart from one another as there is room.
    apart = config.gang if config.gang > 1 else config.count
    if config.placement == "strict" and apart > 1 and address is None:
        raise BadInputError(
            f"workers.placement: strict puts {apart} workers on as many nodes, and this machine is one: "
            "give the address of a cluster"
        )


def what_lacks(config: WorkersConfig, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """What a cluster of nodes with such resources has too little of, used or not; None if nothing."""
    rooms = [room_on(config, node) for node in nodes]
    asked = f"workers.placement: {config.placement} needs"
    if config.placement == "strict":
        fit = sum(room > 0 for room in rooms)
        if fit < config.count:
            return (
                f"{asked} {config.count} nodes with {_size(config)} each; the cluster has {fit} such nodes "
                f"among {len(nodes)}"
            )
    elif sum(rooms) < config.count:
        return (
            f"{asked} room for {config.count} workers with {_size(config)} each; the cluster's "
            f"{len(nodes)} nodes have room for {sum(rooms)}"
        )
    return None


def room_on(config: WorkersConfig, node: Mapping[str, float]) -> int:
    """How many workers a node with such resources has room for. A part of a GPU is all of one GPU."""
    rooms = []
    for name, size in _bundle(config).items():
        there_is = node.get(name, 0.0)
        if name == "GPU" and size < 1:
            rooms.append(int(there_is) * int(1 / size + 1e-9))
        else:
            rooms.append(int(there_is / size + 1e-9))
    return min(rooms)


def _bundle(config: WorkersConfig) -> dict[str, float]:
    return {name: size for name, size in (("CPU", config.cpus), ("GPU", config.gpus)) if size}


def _size(config: WorkersConfig) -> str:
    return f"{config.cpus:g} CPUs and {config.gpus:g} GPUs"


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
