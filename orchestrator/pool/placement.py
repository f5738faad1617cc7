"""On which nodes workers run: places that are reserved together, in one of Ray's placement groups.

A gang has a group of its own; of other workers all have one. Each worker has a bundle of the group, and is
started again in it. When a node is lost, Ray looks for another one for its bundles; until there is one, the
actors that are to run in them wait, and the others go on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from orchestrator.pool.room import Resources, fit
from orchestrator.workers_config import PLACEMENTS, Needs, WorkersConfig
from workers.errors import BadInputError

STRATEGIES = {"none": "PACK", "pack": "PACK", "spread": "SPREAD", "strict": "STRICT_SPREAD"}
"""Values of `workers.placement`, and what Ray calls them."""


MOST_WORKERS = 1 << 16
"""Of a node, if they need nothing of it."""


class Placement:
    """A reserved place for each worker, on nodes as `workers.placement` asks. Ray is up."""

    def __init__(self, config: WorkersConfig) -> None:
        from ray.util import placement_group

        self._config = config
        self._group = placement_group(
            [needs.bundle for needs in config.places], strategy=STRATEGIES[config.placement]
        )
        self.bundles = [needs.bundle for needs in config.places]
        lacking = what_lacks(config, node_resources())
        if lacking is not None and not self._group.wait(0):
            print(f"darwin: warning: waiting for nodes: {lacking}", file=sys.stderr)

    def options(self, number: int) -> dict[str, Any]:
        """Options of an actor that is to run in this worker's place."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=number
        )
        return {"scheduling_strategy": strategy}

    @property
    def nodes(self) -> list[str] | None:
        """Ids of the nodes that the places lie on; None until there is room for all of them."""
        from ray.util import placement_group_table

        if not self._group.wait(0):
            return None
        found: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        return [found[number] for number in sorted(found)]

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
    if not all(needs.bundle for needs in config.places):
        raise BadInputError("workers.placement: workers that need nothing of a node have no places")
    # Gangs lie apart from one another as there is room.
    apart = config.gang if config.gang > 1 else config.total
    if config.placement == "strict" and apart > 1 and address is None:
        raise BadInputError(
            f"workers.placement: strict puts {apart} workers on as many nodes, and this machine is one: "
            "give the address of a cluster"
        )


def what_lacks(config: WorkersConfig, nodes: Sequence[Resources]) -> str | None:
    """What a cluster of nodes with such resources has too little of, used or not; None if nothing."""
    asked = f"workers.placement: {config.placement} needs"
    if config.pools:
        everything = {str(number): node for number, node in enumerate(nodes)}
        bundles = [needs.bundle for needs in config.places]
        if fit(bundles, everything, apart=config.placement == "strict") is None:
            apart = " on nodes of their own" if config.placement == "strict" else ""
            return f"{asked} room for {_all(config)}{apart}, and the cluster's {len(nodes)} nodes have less"
        return None
    ((_, needs),) = config.groups
    rooms = [room_on(needs, node) for node in nodes]
    if config.placement == "strict":
        found = sum(room > 0 for room in rooms)
        if found < config.count:
            return (
                f"{asked} {config.count} nodes with {needs} each; the cluster has {found} such nodes "
                f"among {len(nodes)}"
            )
    elif sum(rooms) < config.count:
        return (
            f"{asked} room for {config.count} workers with {needs} each; the cluster's "
            f"{len(nodes)} nodes have room for {sum(rooms)}"
        )
    return None


def no_room_at_all(config: WorkersConfig) -> str | None:
    """What the cluster has too little of for any worker, used or not; None if it has enough."""
    there_are = node_resources()
    if config.gang > 1:
        return what_lacks(config.gang_in(config.places[0]), there_are)
    if config.placement != "none":
        return what_lacks(config, there_are)
    groups = [needs for _, needs in config.groups]
    if any(room_on(needs, node) for needs in groups for node in there_are):
        return None
    wanted = ", or with ".join(map(str, groups))
    return f"none of the cluster's {len(there_are)} nodes has room for a worker with {wanted}"


def room_on(needs: Needs, node: Resources) -> int:
    """How many workers a node with such resources has room for. A part of a GPU is all of one GPU."""
    rooms = []
    for name, size in needs.bundle.items():
        there_is = node.get(name, 0.0)
        if name == "GPU" and size < 1:
            rooms.append(int(there_is) * int(1 / size + 1e-9))
        else:
            rooms.append(int(there_is / size + 1e-9))
    return min(rooms, default=MOST_WORKERS)


def _all(config: WorkersConfig) -> str:
    return " and ".join(f"{count} workers with {needs} each" for count, needs in config.groups)


def node_resources() -> list[dict[str, float]]:
    """Resources of the cluster's nodes, used or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
