"""Which genes an expert space has for certain parents, which it loses because they cannot matter, and why."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.config import GenomeConfig
from orchestrator.genomes.blending import check_takes_shares, density_genes
from orchestrator.genomes.expert_file import (
    COMPONENT_GENES,
    SCHEDULE,
    SHARE,
    SHARED_EXPERT,
    TRUST,
    ExpertFile,
    load_expert_file,
)
from orchestrator.genomes.expert_space import ExpertLayer, ExpertSpace
from orchestrator.genomes.parameter_file import DECIMALS
from orchestrator.genomes.ratio_file import DENSITIES, RatioGene
from orchestrator.genomes.space import Gene, RemovedGene
from orchestrator.mri.prescription import LEAST_DISPERSION, ExpertShares, Prescription
from workers.checkpoints import ArchitectureMap
from workers.errors import BadInputError
from workers.merging import ParentReference, get_method

Shares = Sequence[float | None]
"""Of each expert of a layer; None where nothing is advised."""


def build_expert_space(
    config: GenomeConfig,
    father: ArchitectureMap,
    parents: tuple[ParentReference, ...],
    base: ParentReference | None,
    seed: int,
    probes: bool,
    prescription: Prescription | None,
) -> ExpertSpace:
    """Make the configured space for these parents; as `build.build_space`.

    Raises `BadInputError` for a model without routed experts, or with tensors that cannot be told apart by
    expert; for a method that takes no shares; and for a space that trusts the scan alone if there is none or
    it says nothing.
    """
    method = get_method(config.method)
    file = load_expert_file(config)
    base = base if method.uses_base != "never" else None
    method.check_inputs(tuple(parent.name for parent in parents), base is not None)
    check_takes_shares(file.path, method, has_densities=all(map(file.has, DENSITIES)))
    donors = [parent.name for parent in parents[1:]]
    if file.router != "keep" and method.grain == "matrix":
        raise BadInputError(
            f"{file.path}: router: {file.router}: method {method.name} needs whole matrices and means "
            "nothing for a row: take another method, or a copy of the space with router: keep"
        )
    counts = count_experts(father)
    silence = _why_no_advice(file, probes, prescription)
    waits = silence is None and prescription is None
    layers = _layers(
        file, counts, donors, prescription.experts if prescription and silence is None else None
    )
    built = _Genes(file, donors)
    built.add_shares(layers, waits)
    built.add_trust(silence)
    built.add_schedule(len(layers), silence)
    rest = built.add_components({tensor.component for tensor in father.tensors})
    densities = density_genes(file.genes, file.fixed, method, parents, base)
    content = repr((method.name, len(parents), replace(file, path=""))).encode()
    return ExpertSpace(
        method,
        parents,
        base,
        seed,
        (*built.genes, *densities.genes),
        (*built.removed, *densities.removed),
        to_prescribe=tuple(t.name for t in father.tensors if t.component == "expert")
        if waits
        else (),
        identity={"method": method.name, "content": hashlib.sha256(content).hexdigest()},
        layers=layers,
        transplant=file.transplant,
        values=built.values | densities.values,
        densities=densities.of,
        rest=rest,
        router=file.router,
    )


def count_experts(father: ArchitectureMap) -> dict[int, int]:
    """Layer -> its number of routed experts, ascending. Raises `BadInputError` if they cannot be moved."""
    counts: dict[int, int] = {}
    for tensor in father.tensors:
        if tensor.component != "expert" or tensor.layer is None:
            continue
        if tensor.expert is None:
            raise BadInputError(
                f"{father.location}: tensor {tensor.stored!r} holds something of all experts of its layer "
                "in one, and it is not known how it is divided: an expert cannot be moved without its part "
                "of it. Choose a space of another kind"
            )
        counts[tensor.layer] = max(counts.get(tensor.layer, 0), tensor.expert + 1)
    if not counts:
        raise BadInputError(
            f"genome.space: {father.location} has no routed experts, of which an expert space is: choose a "
            "space of another kind"
        )
    return dict(sorted(counts.items()))


def _why_no_advice(file: ExpertFile, probes: bool, prescription: Prescription | None) -> str | None:
    """Why the scan cannot count; None if it can, or may yet."""
    reason = None
    if not probes:
        reason = (
            "the campaign does not probe the parents (scan.probe), so nothing tells experts apart"
        )
    elif prescription is not None and not prescription.experts:
        reason = "the probe has found no merits of experts that all parents have"
    elif prescription is not None and not prescription.is_telling:
        reason = (
            "the scan does not tell experts apart: the shares that it advises spread by "
            f"{prescription.dispersion:g}, less than {LEAST_DISPERSION:g}"
        )
    if reason is not None and file.fixed.get(TRUST) == 1.0:
        raise BadInputError(
            f"{file.path}: the space trusts the scan alone, but {reason}: choose another space"
        )
    return reason


def _layers(
    file: ExpertFile,
    counts: dict[int, int],
    donors: list[str],
    advice: ExpertShares | None,
) -> tuple[ExpertLayer, ...]:
    """The layers that have experts, in bands as even as can be. Without advice all experts are alike."""
    bands = min(file.bands, len(counts))
    layers = []
    for place, (layer, experts) in enumerate(counts.items()):
        band = next(b for b in range(bands) if place < (b + 1) * len(counts) // bands)
        depth = place / (len(counts) - 1) if len(counts) > 1 else 0.0
        advised: tuple[tuple[float | None, ...], ...] = ()
        if advice is not None:
            none = (None,) * experts
            advised = tuple(advice.get(layer, {}).get(donor, none) for donor in donors)
        quantiles = tuple(_quantiles(own, file.quantiles) for own in advised)
        layers.append(
            ExpertLayer(
                layer,
                band,
                depth,
                advised,
                quantiles or ((0,) * experts,) * len(donors),
                _order(advised) if advised else tuple(range(experts)),
            )
        )
    return tuple(layers)


def _quantiles(shares: Shares, quantiles: int) -> tuple[int, ...]:
    """The quantile of each expert by the share that a donor is advised, 0 the lowest; equals are in one.

    Ranks rather than shares: those of fine-tunes lie close together around an even part.
    """
    known = sorted(share for share in shares if share is not None)
    lower = {share: rank for rank, share in reversed(list(enumerate(known)))}
    return tuple(0 if share is None else lower[share] * quantiles // len(known) for share in shares)


def _order(advised: Sequence[Shares]) -> tuple[int, ...]:
    """The experts that have advice, by the donors' shares together, the largest first, equals by number."""
    together = {
        expert: math.fsum(share or 0.0 for share in shares)
        for expert, shares in enumerate(zip(*advised, strict=True))
        if any(share is not None for share in shares)
    }
    return tuple(sorted(together, key=lambda expert: (-round(together[expert], DECIMALS), expert)))


class _Genes:
    """The genes of a file as they are found to count or not."""

    def __init__(self, file: ExpertFile, donors: list[str]) -> None:
        self.file = file
        self.donors = donors
        self.genes: list[Gene] = []
        self.removed: list[RemovedGene] = []
        self.values: dict[str, float] = {}

    def add_shares(self, layers: tuple[ExpertLayer, ...], waits: bool) -> None:
        """A gene for each donor, band and quantile in which there is an expert."""
        used = {
            (number, place.band, place.quantiles[number][expert])
            for place in layers
            for number in range(len(self.donors))
            for expert in place.order
        }
        is_advised = any(place.advised for place in layers)
        for number, donor in enumerate(self.donors):
            for band in range(self.file.bands):
                for quantile in range(self.file.quantiles):
                    name = f"{SHARE}.{donor}.{band}.{quantile}"
                    if waits or (number, band, quantile) in used:
                        self._search(name, self.file.genes[SHARE])
                        continue
                    reason = "no expert is in this quantile of the band"
                    if band >= len(layers):
                        reason = f"only {len(layers)} layers of the model have experts"
                    elif not is_advised:
                        reason = "without advice there are no quantiles: the first gene is for all"
                    self._drop(name, 0.0, reason)

    def add_trust(self, silence: str | None) -> None:
        for donor in self.donors:
            name, family = f"{TRUST}.{donor}", self.file.genes.get(TRUST)
            if silence is None and family is not None:
                self.genes.append(Gene(name, family.low, family.high, family.start[0]))
            elif silence is None:
                self.values[name] = self.file.fixed[TRUST]
            else:
                self._drop(name, 0.0, silence)

    def add_schedule(self, layers: int, silence: str | None) -> None:
        for name in SCHEDULE:
            family = self.file.genes.get(name)
            if silence is not None:
                self._drop(
                    name, 1.0, "without advice nothing says which experts should leave first"
                )
            elif layers == 1 and name == SCHEDULE[1]:
                self._drop(name, 1.0, "only one layer of the model has experts")
            elif family is not None:
                self.genes.append(Gene(name, family.low, family.high, family.start[0]))
            else:
                self.values[name] = self.file.fixed[name]

    def add_components(
        self, present: set[str]
    ) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
        """The components that are blended besides, with the gene of each donor's share."""
        rest = []
        for gene, components in COMPONENT_GENES.items():
            if gene not in self.file.genes:
                continue
            names = tuple(f"{gene}.{donor}" for donor in self.donors)
            there = tuple(component for component in components if component in present)
            for name in names:
                if there:
                    self._search(name, self.file.genes[gene], divided=gene == SHARED_EXPERT)
                else:
                    self._drop(name, 0.0, f"the model has no such tensor ({', '.join(components)})")
            if there:
                rest.append((there, names))
        for component, share in self.file.others.items():
            if component in present and share:
                names = tuple(f"{component}.{donor}" for donor in self.donors)
                self.values |= dict.fromkeys(names, round(share / len(names), DECIMALS))
                rest.append(((component,), names))
        return tuple(rest)

    def _search(self, name: str, family: RatioGene, divided: bool = False) -> None:
        """Search a gene of one donor; starts are shared by the donors, and bounds if they are `divided`."""
        parts = len(self.donors)
        low, high = family.low, family.high
        if divided:
            low, high = round(low / parts, DECIMALS), round(high / parts, DECIMALS)
        start = round(family.start[0] / parts, DECIMALS)
        self.genes.append(Gene(name, low, high, min(max(low, start), high)))

    def _drop(self, name: str, value: float, reason: str) -> None:
        """Do not search a gene; a value that the file fixes is no gene."""
        self.values[name] = value
        family = name.split(".")[0]
        if family in self.file.genes:
            self.removed.append(RemovedGene(name, reason))
