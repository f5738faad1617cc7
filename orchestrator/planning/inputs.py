"""What a plan is about: the parents by their headers, and the recipe that the search begins with."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from orchestrator.config import SHIPPED, CampaignConfig, find_shipped, read_yaml
from orchestrator.experts.match_stage import check_can_match
from orchestrator.genomes.build import build_space
from orchestrator.inputs import check_parents, too_few_task_vectors
from orchestrator.places import open_parent
from orchestrator.planning.traffic import Traffic, traffic_of
from orchestrator.weight_meaning import meaning_warnings
from workers.checkpoints import ArchitectureMap, Checkpoint
from workers.checkpoints.description import Description, parse_description
from workers.errors import BadInputError
from workers.merging import METHODS, ParentReference
from workers.merging.parts import Part, cut_parts
from workers.merging.plan import BASE, Assignment, Plan
from workers.storage import StorageError
from workers.storage.hub import HUB_SCHEME, is_hub_id

Kind = Literal["hub", "bucket", "path"]
"""Where a parent lies: hub models are downloaded to each node, buckets are read over the network, and a path
means a shared file system as soon as there is more than one node."""


@dataclass(frozen=True)
class PlannedParent:
    """A parent, or the base."""

    place: str
    kind: Kind
    headers: Checkpoint | Description

    @property
    def like(self) -> str | None:
        """The name of the description that stands for it; None if it was opened."""
        return self.headers.name if isinstance(self.headers, Description) else None

    @property
    def stored_bytes(self) -> int:
        return sum(file.size for file in self.headers.weight_files)

    @cached_property
    def fingerprint(self) -> str:
        """Its own, or one that its place stands for."""
        if isinstance(self.headers, Checkpoint):
            return self.headers.fingerprint
        return hashlib.sha256(self.place.encode()).hexdigest()


@dataclass(frozen=True)
class PlannedInputs:
    """The campaign's parents and base, and how the first candidate of its search merges them."""

    parents: dict[str, PlannedParent]
    base: PlannedParent | None
    plan: Plan
    assigned: dict[str, Assignment]
    scans: bool
    """Whether the genome space has the parents scanned before the search."""

    @cached_property
    def traffic(self) -> dict[str, Traffic]:
        """What merging each tensor of the child takes, by name."""
        return {tensor.name: traffic_of(self, tensor) for tensor in self.plan.child.tensors}

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts in which the child will be written."""
        return cut_parts(self.plan, self.assigned)

    @cached_property
    def all(self) -> dict[str, PlannedParent]:
        """Parents and base, by the names that a recipe has for them."""
        return self.parents | ({BASE: self.base} if self.base is not None else {})

    @cached_property
    def warnings(self) -> list[str]:
        """What the campaign would tell its user of the configurations."""
        return meaning_warnings({name: parent.headers for name, parent in self.all.items()})

    @cached_property
    def maps(self) -> list[ArchitectureMap]:
        """The architecture map of every parent, and of the base, as each worker has them."""
        return [*self.plan.maps.values(), *([self.plan.base] if self.plan.base else [])]

    @cached_property
    def places(self) -> dict[str, PlannedParent]:
        """Each checkpoint once, by its place."""
        return {parent.place: parent for parent in self.all.values()}


def open_planned(config: CampaignConfig, likes: list[str]) -> PlannedInputs:
    """Open or describe everything, and lay the search's first candidate out on it.

    `likes`: `DESCRIPTION` for all parents that are not files here, or `NAME=DESCRIPTION` for one. A model of
    the hub whose description ships needs none. Raises `BadInputError` for what does not fit together.
    """
    headers = _Headers(likes, {parent.name for parent in config.parents} | {BASE})
    parents = {parent.name: headers.find(parent.name, parent.path) for parent in config.parents}
    base = headers.find(BASE, config.base) if config.base else None
    opened = {
        name: parent.headers
        for name, parent in (parents | ({BASE: base} if base else {})).items()
        if isinstance(parent.headers, Checkpoint)
    }
    if len(opened) > 1:
        check_parents(opened)
    genome = config.genome
    method = METHODS.get(genome.method)
    if method is not None and not genome.allow_degenerate:
        problem = too_few_task_vectors(method, parents, base)
        if problem is not None:
            raise BadInputError(f"genome.method: {problem}, or set genome.allow_degenerate: true")
    maps = {name: headers.map_of(parent) for name, parent in parents.items()}
    check_can_match(config, next(iter(maps.values())))
    space = build_space(
        genome,
        next(iter(maps.values())),
        tuple(ParentReference(name, parent.fingerprint) for name, parent in parents.items()),
        ParentReference(BASE, base.fingerprint) if base else None,
        config.seed,
        config.scan.scans,
        probes=config.scan.probe,
    )
    plan = Plan(maps, headers.map_of(base) if base else None)
    recipe = space.decode(space.point(space.start))
    scans = config.scan.scans and bool(space.to_prescribe)
    return PlannedInputs(parents, base, plan, plan.assign(recipe), scans)


class _Headers:
    """Finds the headers of each place once."""

    def __init__(self, likes: list[str], names: set[str]) -> None:
        self._likes: dict[str | None, str] = {}
        for like in likes:
            name, equals, description = like.partition("=")
            if equals and name not in names:
                raise BadInputError(f"--like {like}: there is no parent {name!r}")
            self._likes[name if equals else None] = description if equals else like
        self._known: dict[tuple[str, str | None], Checkpoint | Description] = {}
        self._maps: dict[int, ArchitectureMap] = {}

    def find(self, name: str, place: str) -> PlannedParent:
        kind = _kind_of(place)
        like = self._likes.get(name)
        if like is None and kind == "hub":
            like = _shipped_like(place)
        if like is None and kind != "path":
            like = self._likes.get(None)
        if like is None and kind == "hub":
            raise BadInputError(
                f"{name}: {place}: a model of the hub would be downloaded whole for its headers: name a "
                f"description of such a model with --like {name}=DESCRIPTION, or --like DESCRIPTION for all "
                f"(there is: {', '.join(_shipped_names())})"
            )
        return PlannedParent(place, kind, self._open(place, like))

    def map_of(self, parent: PlannedParent) -> ArchitectureMap:
        key = id(parent.headers)
        if key not in self._maps:
            self._maps[key] = ArchitectureMap(parent.headers)
        return self._maps[key]

    def _open(self, place: str, like: str | None) -> Checkpoint | Description:
        key = ("", like) if like is not None else (place, None)
        if key not in self._known:
            self._known[key] = self._describe(like) if like is not None else self._read(place)
        return self._known[key]

    def _read(self, place: str) -> Checkpoint | Description:
        try:
            return open_parent(place)
        except (BadInputError, StorageError):
            if None in self._likes:
                return self._open(place, self._likes[None])
            raise

    def _describe(self, like: str) -> Description:
        file = find_shipped("checkpoint", like)
        return parse_description(file.stem, read_yaml(file))


def _kind_of(place: str) -> Kind:
    if place.startswith(HUB_SCHEME) or (
        is_hub_id(place) and not os.path.lexists(place.split("/")[0])
    ):
        return "hub"
    return "bucket" if place.startswith("s3://") else "path"


def _shipped_names() -> list[str]:
    return sorted(path.stem for path in (SHIPPED / "checkpoint").glob("*.yaml"))


def _shipped_like(place: str) -> str | None:
    """The description that ships of this very model of the hub."""
    model = place.removeprefix(HUB_SCHEME).partition("@")[0]
    for name in _shipped_names():
        if read_yaml(SHIPPED / "checkpoint" / f"{name}.yaml")["hub"] == model:
            return name
    return None
