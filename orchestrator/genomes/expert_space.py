"""Expert spaces: genomes that decide for each routed expert of each layer: keep, blend or transplant.

    share_d(l, e) = trust_d * r_MRI_d(l, e) + (1 - trust_d) * r_genome_d(l, e)

is the share of donor d in expert e of layer l. r_MRI is what the scan advises (`mri.expert_prescription`).
r_genome is one gene for each donor, band of layers and quantile of what it is advised: their number does not
depend on that of the experts. Only so many experts of a layer as its density allows may leave the father,
those first of which the donors are advised most. What is left to 1 is the father's share; shares that sum to
more are divided by their sum.

The first line is the published fusion of trust (cards of engine V6), with an expert in the place of a tensor.
Sources, weights and density schedule of the published transplants (V9) are not public: all else is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from orchestrator.genomes.blending import blend_parameters
from orchestrator.genomes.expert_file import SCHEDULE, SHARE, TRUST
from orchestrator.genomes.parameter_file import DECIMALS
from orchestrator.genomes.space import Gene, RemovedGene, point_of, start_of
from workers.merging import MergeMethod, ParentReference, Recipe, Rule, Selector
from workers.merging.selector import Spans

SHARE_DECIMALS = 2
"""Blends go by percents: their number, and so the number of a recipe's rules, stays bounded whatever the
number of experts, and a hundredth of what a donor has changed in one expert decides nothing."""


class Decision(NamedTuple):
    """What becomes of an expert that leaves the father."""

    source: str | None
    """The donor that it is transplanted from; None: it is blended."""
    shares: tuple[float, ...]
    """Of each donor, in a blend; in percents."""


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """What is known of a layer's experts before there is a genome."""

    layer: int
    band: int
    depth: float
    """0 in the first layer that has experts, 1 in the last."""
    advised: tuple[tuple[float | None, ...], ...]
    """For each donor the share of each expert that the scan advises; empty without advice in this space."""
    quantiles: tuple[tuple[int, ...], ...]
    """For each donor the quantile of each expert by that share; the highest is where it is advised most."""
    order: tuple[int, ...]
    """The experts that may leave the father, those first of which the donors are advised most."""


@dataclass(frozen=True)
class ExpertSpace:
    """An expert space made for certain parents, the father first."""

    method: MergeMethod
    parents: tuple[ParentReference, ...]
    base: ParentReference | None
    seed: int
    genes: tuple[Gene, ...]
    removed: tuple[RemovedGene, ...]
    to_prescribe: tuple[str, ...]
    identity: dict[str, Any]
    layers: tuple[ExpertLayer, ...]
    transplant: tuple[float, float]
    values: dict[str, float]
    """Of the genes that decide something but are not searched."""
    densities: dict[str, str]
    """Parent -> the gene of the density that the method keeps of its changes; empty if it has none."""
    rest: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    """Components beside the routed experts that are blended, and for each donor the gene of its share."""
    router: str
    """`keep` for the father's, or `as_experts`."""

    @property
    def start(self) -> list[float]:
        """Where a search begins, in the unit cube."""
        return start_of(self.genes)

    def point(self, unit: Sequence[float]) -> dict[str, float]:
        """The genome at a point of the unit cube, one coordinate per gene in order."""
        return point_of(self.genes, unit)

    @property
    def donors(self) -> tuple[str, ...]:
        return tuple(parent.name for parent in self.parents[1:])

    @property
    def bands(self) -> list[list[int]]:
        """First and last layer of each band."""
        layers: dict[int, list[int]] = {}
        for place in self.layers:
            layers.setdefault(place.band, []).append(place.layer)
        return [[min(own), max(own)] for own in layers.values()]

    def decisions(self, genome: Mapping[str, float]) -> dict[int, dict[int, Decision]]:
        """Layer -> expert -> what becomes of it, in ascending order; the father keeps all that are not there.

        Genes that the genome lacks have their fixed value.
        """
        values = {**self.values, **genome}
        first, last = (values[name] for name in SCHEDULE)
        return {
            place.layer: self._decide(place, values, first + (last - first) * place.depth)
            for place in self.layers
        }

    def decode(self, genome: dict[str, float]) -> Recipe:
        """The recipe of a genome: a rule for all experts that are treated alike."""
        values = self.values | genome
        density = {parent: values[gene] for parent, gene in self.densities.items()}
        alike: dict[Decision, dict[int, list[int]]] = {}
        for layer, decided in self.decisions(genome).items():
            for expert, decision in decided.items():
                alike.setdefault(decision, {}).setdefault(layer, []).append(expert)
        rules = []
        for decision, places in alike.items():
            where = Selector(places=tuple(_place(layer, own) for layer, own in places.items()))
            if decision.source is not None:
                rules.append(Rule(where, "passthrough", {"source": decision.source}))
            else:
                parameters = blend_parameters(self.method, self.parents, decision.shares, density)
                rules.append(Rule(where, self.method.name, parameters))
        for components, genes in self.rest:
            shares = _shrunk([values[gene] for gene in genes], DECIMALS)
            if any(shares):
                weights = (round(1.0 - math.fsum(shares), DECIMALS), *shares)
                names = [parent.name for parent in self.parents]
                weight = dict(zip(names, weights, strict=True))
                rules.append(Rule(Selector(components=components), "linear", {"weight": weight}))
        if self.router != "keep":
            rules.append(Rule(Selector(components=("router",)), self.router))
        return Recipe(self.parents, tuple(rules), self.base, self.seed)

    def _decide(
        self, place: ExpertLayer, values: Mapping[str, float], density: float
    ) -> dict[int, Decision]:
        # Rounded first: 0.3 of 10 experts are 3, although 0.3 * 10 need not be.
        count = math.floor(round(density * (len(place.quantiles[0])), DECIMALS))
        donors = [
            (
                values[f"{TRUST}.{donor}"],
                [values[f"{SHARE}.{donor}.{place.band}.{q}"] for q in range(1 + max(quantiles))],
                quantiles,
                place.advised[number] if place.advised else None,
            )
            for number, (donor, quantiles) in enumerate(
                zip(self.donors, place.quantiles, strict=True)
            )
        ]
        below, above = self.transplant
        decided = {}
        for expert in sorted(place.order[:count]):
            shares = []
            for trust, own, quantiles, advised in donors:
                share = own[quantiles[expert]]
                if advised is not None:
                    share = trust * (advised[expert] or 0.0) + (1.0 - trust) * share
                shares.append(round(share, DECIMALS))
            most = max(shares)
            if most > above:
                source = self.donors[shares.index(most)]
                decided[expert] = Decision(source, ())
            elif math.fsum(shares) >= below and any(blend := _shrunk(shares, SHARE_DECIMALS)):
                decided[expert] = Decision(None, blend)
        return decided


def _shrunk(shares: Sequence[float], decimals: int) -> tuple[float, ...]:
    """The shares, divided by their sum if that is more than 1, rounded so that they do not exceed it."""
    total = math.fsum(shares)
    if total > 1.0:
        shares = [share / total for share in shares]
    rounded = [round(share, decimals) for share in shares]
    beyond = round(math.fsum(rounded) - 1.0, decimals)
    if beyond > 0.0:
        largest = rounded.index(max(rounded))
        rounded[largest] = round(rounded[largest] - beyond, decimals)
    return tuple(rounded)


def _place(layer: int, experts: list[int]) -> tuple[int, Spans]:
    """The experts of a layer, ascending, as a selector has them."""
    return _alone(layer, experts[0]) if len(experts) == 1 else (layer, tuple(_spans(experts)))


@cache
def _alone(layer: int, expert: int) -> tuple[int, Spans]:
    """One object for all candidates: a driver keeps all recipes, and few experts are treated alike."""
    return layer, ((expert, expert),)


def _spans(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs of neighbours."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
