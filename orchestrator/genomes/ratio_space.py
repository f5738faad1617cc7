"""Ratio spaces: genomes that decode to one ratio, the mother's share, for each tensor.

    r_genome(T) = weighted mean of the ratio genes that are about T
    final(T) = trust * r_MRI(T) + (1 - trust) * r_genome(T)

A tensor whose final ratio is below 0.15 stays the father's and one above 0.85 becomes the mother's, bit by
bit; all others are blended by the campaign's method. The second line and the transplants are published (model
cards of engine V6); the weighted mean of the first is ours, its weights are in the space's file.

With several mothers each has ratio genes of her own, and what is left is the father's share; ratios that sum
to more than 1 are divided by their sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.genomes.blending import blend_parameters
from orchestrator.genomes.parameter_file import DECIMALS
from orchestrator.genomes.ratio_file import TRUST
from orchestrator.genomes.space import Gene, RemovedGene, point_of, start_of
from workers.merging import MergeMethod, ParentReference, Recipe, Rule, Selector

Terms = tuple[tuple[float, str], ...]
"""(weight, gene) of each ratio gene that is about a tensor."""

_Treatment = tuple[str | None, tuple[float, ...], tuple[tuple[str, float], ...]]
"""The parent that a tensor is copied from, or the mothers' shares and the parameters that are fixed."""


@dataclass(frozen=True, slots=True)
class BlendedTensor:
    """What is known of a tensor before there is a genome."""

    name: str
    terms: tuple[Terms, ...]
    """For each mother."""
    advised: tuple[float, ...] | None
    """The mothers' shares that the scan advises."""
    parameters: tuple[tuple[str, float], ...]
    """Parameters of the method that are not searched for this tensor."""


@dataclass(frozen=True)
class RatioSpace:
    """A ratio space made for certain parents, the father first."""

    method: MergeMethod
    parents: tuple[ParentReference, ...]
    base: ParentReference | None
    seed: int
    genes: tuple[Gene, ...]
    removed: tuple[RemovedGene, ...]
    to_prescribe: tuple[str, ...]
    identity: dict[str, Any]
    tensors: tuple[BlendedTensor, ...]
    transplant: tuple[float, float]
    values: dict[str, float]
    """Of the genes that decide something but are not searched."""
    densities: dict[str, str]
    """Parent -> the gene of its density; empty if the method has none."""

    @property
    def start(self) -> list[float]:
        """Where a search begins, in the unit cube."""
        return start_of(self.genes)

    def point(self, unit: Sequence[float]) -> dict[str, float]:
        """The genome at a point of the unit cube, one coordinate per gene in order."""
        return point_of(self.genes, unit)

    def ratios(self, genome: dict[str, float]) -> dict[str, tuple[float, ...]]:
        """Tensor -> the final share of each mother. Genes that the genome lacks have their fixed value."""
        values = self.values | genome
        own: dict[tuple[Terms, ...], tuple[float, ...]] = {}
        found = {}
        for tensor in self.tensors:
            if tensor.terms not in own:
                own[tensor.terms] = _genome_shares(tensor.terms, values)
            shares, trust = own[tensor.terms], values[TRUST]
            if tensor.advised is not None:
                shares = tuple(
                    trust * advised + (1.0 - trust) * share
                    for advised, share in zip(tensor.advised, shares, strict=True)
                )
            found[tensor.name] = tuple(round(share, DECIMALS) for share in shares)
        return found

    def decode(self, genome: dict[str, float]) -> Recipe:
        """The recipe of a genome: a rule for all tensors that are treated alike."""
        values = self.values | genome
        density = {parent: values[gene] for parent, gene in self.densities.items()}
        ratios = self.ratios(genome)
        treatments: dict[_Treatment, list[str]] = {}
        for tensor in self.tensors:
            shares = ratios[tensor.name]
            source = self._transplanted(shares)
            key = (source, (), ()) if source else (None, shares, tensor.parameters)
            treatments.setdefault(key, []).append(tensor.name)
        rules = []
        for (source, shares, exceptions), names in treatments.items():
            where = Selector(names=tuple(names))
            if source is not None:
                rules.append(Rule(where, "passthrough", {"source": source}))
            else:
                parameters = blend_parameters(self.method, self.parents, shares, density)
                rules.append(Rule(where, self.method.name, parameters | dict(exceptions)))
        return Recipe(self.parents, tuple(rules), self.base, self.seed)

    def _transplanted(self, shares: tuple[float, ...]) -> str | None:
        """The parent that has a tensor whole."""
        below, above = self.transplant
        if sum(shares) < below:
            return self.parents[0].name
        for parent, share in zip(self.parents[1:], shares, strict=True):
            if share > above:
                return parent.name
        return None


def _genome_shares(terms: tuple[Terms, ...], values: dict[str, float]) -> tuple[float, ...]:
    """The mothers' shares by the genome alone. Without genes about a tensor they are even."""
    means = [
        math.fsum(weight * values[gene] for weight, gene in own) / math.fsum(w for w, _ in own)
        if own
        else 1.0 / (len(terms) + 1)
        for own in terms
    ]
    total = math.fsum(means)
    return tuple(mean / total if total > 1.0 else mean for mean in means)
