"""Genome spaces: named, bounded genes, and how they decode to a recipe.

A space is data (`conf/genome/*.yaml`). Ratio spaces are in `ratio_space`; here are those whose genes are
the parameters of a merge method: groups of components, optionally cut into blocks of layers, and per
merge method the parameters that are genes. A gene exists per group, block and parent as its
parameter's `per` says, and is named after them: `weight.reverse.attention.0`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from orchestrator.config import GenomeConfig
from orchestrator.genomes.parameter_file import GeneFamily, SpaceFile, load_space_file
from orchestrator.genomes.space import Gene, RemovedGene, point_of, start_of
from workers.checkpoints import ArchitectureMap
from workers.errors import BadInputError
from workers.merging import MergeMethod, ParentReference, Recipe, Rule, Selector, get_method


@dataclass(frozen=True)
class Region:
    """Tensors that share their genes: a group, or one block of layers of it."""

    group: str
    block: int | None
    where: Selector
    fixed: tuple[tuple[Selector, dict[str, float]], ...] = ()
    """Tensors in it whose parameters are not searched but have these values."""


@dataclass(frozen=True)
class GenomeSpace:
    """A space made for certain parents: its genes, and the decoding to recipes."""

    method: MergeMethod
    regions: tuple[Region, ...]
    families: tuple[GeneFamily, ...]
    parents: tuple[ParentReference, ...]
    base: ParentReference | None
    seed: int
    genes: tuple[Gene, ...]
    removed: tuple[RemovedGene, ...] = ()
    fixed: dict[str, float] = field(default_factory=dict)
    """Values of the genes that are removed."""
    to_prescribe: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What a search in this space depends on, wherever its file lies."""
        text = repr((self.method.name, self.regions, self.families, self.genes))
        # Campaigns are recorded that are older than this key of selectors.
        content = text.replace(", places=()", "").encode()
        return {
            "method": self.method.name,
            "genes": len(self.genes),
            "content": hashlib.sha256(content).hexdigest(),
        }

    def point(self, unit: Sequence[float]) -> dict[str, float]:
        """The genome at a point of the unit cube, one coordinate per gene in order."""
        return point_of(self.genes, unit)

    @property
    def start(self) -> list[float]:
        """Where a search begins, in the unit cube."""
        return start_of(self.genes)

    def decode(self, genome: dict[str, float]) -> Recipe:
        """The recipe of a genome. Components outside all groups stay the father's."""
        rules = []
        genome = self.fixed | genome
        for region in self.regions:
            parameters = self._parameters(region, genome)
            for where, values in region.fixed:
                rules.append(Rule(where, self.method.name, parameters | values))
            rules.append(Rule(region.where, self.method.name, parameters))
        return Recipe(self.parents, tuple(rules), self.base, self.seed)

    def _parameters(self, region: Region, genome: dict[str, float]) -> dict[str, Any]:
        parameters: dict[str, Any] = {}
        for family in self.families:
            declared = self.method.parameter(family.parameter)
            assert declared is not None
            if declared.scope == "per_parent":
                parameters[family.parameter] = {
                    parent.name: genome[family.gene_name(parent.name, region.group, region.block)]
                    for parent in self.parents
                }
            else:
                parameters[family.parameter] = genome[
                    family.gene_name("", region.group, region.block)
                ]
        return parameters


def build_parameter_space(
    config: GenomeConfig,
    father: ArchitectureMap,
    parents: tuple[ParentReference, ...],
    base: ParentReference | None,
    seed: int,
) -> GenomeSpace:
    """A space whose genes are parameters of the method, per group of components."""
    method = get_method(config.method)
    file = load_space_file(config, method)
    if config.start is not None:
        raise BadInputError(f"genome.start: the space {file.path} has no named starts")
    base = base if method.uses_base != "never" else None
    method.check_inputs(tuple(parent.name for parent in parents), base is not None)
    regions = tuple(
        replace(region, fixed=_fixed(file, region, father)) for region in _regions(file, father)
    )
    genes: dict[str, Gene] = {}
    removed: dict[str, RemovedGene] = {}
    fixed: dict[str, float] = {}
    for family, region, parent in product(file.families, regions, parents):
        name = family.gene_name(parent.name, region.group, region.block)
        is_base = base is not None and parent.fingerprint == base.fingerprint
        if is_base and method.uses_base == "always" and "parent" in family.per:
            reason = f"{parent.name} is the base: it has no changes"
            removed[name], fixed[name] = RemovedGene(name, reason), family.start
        else:
            genes[name] = Gene(name, family.low, family.high, family.start)
    return GenomeSpace(
        method,
        regions,
        file.families,
        parents,
        base,
        seed,
        tuple(genes.values()),
        tuple(removed.values()),
        fixed,
    )


def _regions(file: SpaceFile, father: ArchitectureMap) -> tuple[Region, ...]:
    """The groups that this model has, cut into blocks where the space says so."""
    regions = []
    for group, components in file.groups.items():
        layers = {t.layer for t in father.tensors if t.component in components}
        count = min(file.blocks.get(group, 1), father.layers)
        if count > 1 and layers - {None}:
            edges = [number * father.layers // count for number in range(count + 1)]
            for block in range(count):
                span = (edges[block], edges[block + 1] - 1)
                if any(layer is not None and span[0] <= layer <= span[1] for layer in layers):
                    regions.append(Region(group, block, Selector(components, span)))
            if None in layers:
                # What lies outside all layers (a final norm) goes with the last block.
                regions.append(Region(group, count - 1, Selector(components)))
        elif layers:
            regions.append(Region(group, None, Selector(components)))
    if not regions:
        raise BadInputError(f"{file.path}: no group has a tensor in {father.checkpoint.location}")
    return tuple(regions)


def _fixed(
    file: SpaceFile, region: Region, father: ArchitectureMap
) -> tuple[tuple[Selector, dict[str, float]], ...]:
    """The exceptions that have tensors in this region."""
    selectors = [(replace(region.where, names=names), values) for names, values in file.exceptions]
    return tuple(
        (where, values)
        for where, values in selectors
        if any(where.matches(tensor) for tensor in father.tensors)
    )
