"""What is asked of the machines: groups of places for workers, and what Ray reserves for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

PLACEMENTS = ("none", "pack", "spread", "strict")

GB = 10**9

OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")
"""Names of Ray's own, for which there are keys, or that no worker reserves."""


@dataclass(frozen=True)
class Needs:
    """What Ray reserves for one worker."""

    cpus: float
    gpus: float
    memory: float = 0.0
    """GB (10^9 bytes)."""
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def bundle(self) -> dict[str, float]:
        """By Ray's names; memory in bytes."""
        own = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(round(self.memory * GB))}
        return {name: size for name, size in (own | dict(self.resources)).items() if size}

    @property
    def options(self) -> dict[str, Any]:
        """Options of an actor of Ray that has them."""
        bundle = self.bundle
        options = {"num_cpus": bundle.pop("CPU", 0), "num_gpus": bundle.pop("GPU", 0)}
        if memory := bundle.pop("memory", 0):
            options["memory"] = int(memory)
        return options | {"resources": bundle}

    @property
    def threads(self) -> int:
        """Threads that it merges with."""
        return max(1, int(self.cpus))

    def __str__(self) -> str:
        names = [f"{self.cpus:g} CPUs", f"{self.gpus:g} GPUs"]
        names += [f"{self.memory:g} GB of memory"] * bool(self.memory)
        names += [f"{size:g} {name}" for name, size in self.resources.items() if size]
        return f"{', '.join(names[:-1])} and {names[-1]}"


@dataclass
class PlacesConfig:
    """A further group of places. What is not given is as for the first ones."""

    count: int = 1
    cpus: float | None = None
    gpus: float | None = None
    memory: float | None = None
    resources: dict[str, float] | None = None


@dataclass
class WorkersConfig:
    """How many workers there are at most, and what Ray reserves for each."""

    count: int = 1
    """Places of workers; or of gangs."""
    gang: int = 1
    """Workers that share one model, each with experts of its own; 1: every worker has a whole one."""
    cpus: float = 1
    gpus: float = 0
    memory: float = 0
    """GB (10^9 bytes) that Ray reserves; 0: none."""
    resources: dict[str, float] = field(default_factory=dict)
    """Others, by the names that the nodes give them."""
    placement: str = "none"
    """How they lie on the nodes: as Ray likes (`none`), together on few (`pack`), apart where there is room
    (`spread`), or each on a node of its own (`strict`)."""
    pools: list[PlacesConfig] = field(default_factory=list)
    """Further places, for workers that need something else."""

    @property
    def groups(self) -> list[tuple[int, Needs]]:
        """Places that need the same, and how many: the first ones, then those of `pools`."""
        own = Needs(self.cpus, self.gpus, self.memory, dict(self.resources))
        found = [(self.count, own)]
        for pool in self.pools:
            given = {f.name: getattr(pool, f.name) for f in fields(Needs)}
            given = {name: value for name, value in given.items() if value is not None}
            found.append((pool.count, replace(own, **given)))
        return found

    @property
    def places(self) -> list[Needs]:
        """What a worker needs in each place; in a place of a gang so does each of its workers."""
        return [needs for count, needs in self.groups for _ in range(count)]

    @property
    def total(self) -> int:
        """All places."""
        return self.count + sum(pool.count for pool in self.pools)

    def gang_in(self, needs: Needs) -> WorkersConfig:
        """The workers of the gang in one place."""
        return replace(
            self,
            count=self.gang,
            gang=1,
            cpus=needs.cpus,
            gpus=needs.gpus,
            memory=needs.memory,
            resources=dict(needs.resources),
            pools=[],
        )


def check_workers(workers: WorkersConfig, refuse: Callable[[str, str], None]) -> None:
    """Call `refuse` with the key, and what is wrong, for a value that cannot be."""
    if workers.gang < 1:
        refuse("workers.gang", f"{workers.gang} must be 1 or more")
    if workers.placement not in PLACEMENTS:
        refuse("workers.placement", f"{workers.placement!r} is none of {', '.join(PLACEMENTS)}")
    _check_needs("workers", workers, refuse)
    for number, pool in enumerate(workers.pools):
        _check_needs(f"workers.pools.{number}", pool, refuse)
    if workers.gang > 1 and not all(needs.bundle for needs in workers.places):
        refuse("workers.gang", "workers that need nothing of a node have no places to reserve")


def _check_needs(
    where: str, of: WorkersConfig | PlacesConfig, refuse: Callable[[str, str], None]
) -> None:
    if of.count < 1:
        refuse(f"{where}.count", f"{of.count} must be 1 or more")
    for name, share in _numbers(of):
        if not 0 <= share < math.inf:
            refuse(f"{where}.{name}", f"{share} must be a number from 0 on")
    if of.gpus is not None and of.gpus > 1 and of.gpus % 1:
        refuse(f"{where}.gpus", f"{of.gpus} must be a part of one GPU, or whole ones")
    for name in of.resources or {}:
        if name in OWN_RESOURCES or not name:
            refuse(
                f"{where}.resources",
                f"{name!r} is no name of one's own: cpus, gpus and memory have keys",
            )


def _numbers(of: WorkersConfig | PlacesConfig) -> Iterator[tuple[str, float]]:
    for name in ("cpus", "gpus", "memory"):
        if (value := getattr(of, name)) is not None:
            yield name, value
    for name, value in (of.resources or {}).items():
        yield f"resources.{name}", value
