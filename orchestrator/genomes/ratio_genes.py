"""Which genes a ratio space has for certain parents, which it loses because they cannot matter, and why."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from orchestrator.config import GenomeConfig
from orchestrator.genomes.blending import check_takes_shares, density_genes
from orchestrator.genomes.parameter_file import DECIMALS
from orchestrator.genomes.ratio_file import (
    DENSITIES,
    NUMBER,
    TRUST,
    RatioFile,
    RatioGene,
    load_ratio_file,
)
from orchestrator.genomes.ratio_space import BlendedTensor, RatioSpace, Terms
from orchestrator.genomes.space import Gene, RemovedGene
from orchestrator.mother_centric import PRESET, ratio
from orchestrator.mri.prescription import LEAST_DISPERSION, Prescription
from workers.checkpoints import ArchitectureMap, LogicalTensor
from workers.errors import BadInputError
from workers.merging import ParentReference, get_method

NO_RULE = {
    "lambda": "a penalty that a candidate sets for itself: searching it would only drive it to 0",
    "merge_method_weight": "what it does in the published engine is not public, so here it does nothing",
}
"""Genes that are declared but never searched."""


@dataclass(frozen=True)
class _Member:
    """One gene of a family, for one mother."""

    gene: Gene
    family: RatioGene
    number: int | None
    mother: str


def build_ratio_space(
    config: GenomeConfig,
    father: ArchitectureMap,
    parents: tuple[ParentReference, ...],
    base: ParentReference | None,
    seed: int,
    scans: bool,
    prescription: Prescription | None,
) -> RatioSpace:
    """Make the configured space for these parents; as `genome.build_space`.

    Raises `BadInputError` for a method that takes no shares, and for a space that trusts the scan alone
    if there is none or it says nothing.
    """
    method = get_method(config.method)
    file = load_ratio_file(config, method)
    if config.start == PRESET:
        file = replace(file, genes=tuple(_start_at_preset(file, father)))
    base = base if method.uses_base != "never" else None
    method.check_inputs(tuple(parent.name for parent in parents), base is not None)
    families = {gene.name: gene for gene in file.genes}
    check_takes_shares(file.path, method, has_densities=all(_has(file, d) for d in DENSITIES))
    distrust = _why_no_trust(file, scans, prescription)
    advised = prescription.shares if prescription and distrust is None else {}
    equal = prescription.equal if prescription else frozenset()
    mothers = [parent.name for parent in parents[1:]]
    members = list(_members(file, father, mothers))
    blended = [tensor for tensor in father.tensors if tensor.component in file.components]
    terms = {
        tensor.name: tuple(_terms(tensor, mother, members, file, father) for mother in mothers)
        for tensor in blended
    }
    tensors = tuple(
        BlendedTensor(
            tensor.name,
            terms[tensor.name],
            tuple(advised[tensor.name][mother] for mother in mothers)
            if tensor.name in advised
            else None,
            _exceptions(file, tensor),
        )
        for tensor in blended
        if tensor.name not in equal and (any(terms[tensor.name]) or tensor.name in advised)
    )
    genes, removed = _searched(members, terms, tensors, file, father)
    values = dict(file.fixed)
    if distrust is not None:
        values[TRUST] = 0.0
        if _has(file, TRUST):
            removed.append(RemovedGene(TRUST, distrust))
    densities = density_genes(families, file.fixed, method, parents, base)
    genes += densities.genes
    removed += densities.removed
    values |= densities.values
    for gene in file.genes:
        if gene.name == TRUST and distrust is None:
            genes.append(Gene(TRUST, gene.low, gene.high, gene.start[0]))
        elif gene.name in NO_RULE:
            removed.append(RemovedGene(gene.name, NO_RULE[gene.name]))
    content = repr((method.name, len(parents), replace(file, path=""))).encode()
    return RatioSpace(
        method,
        parents,
        base,
        seed,
        tuple(genes),
        tuple(removed),
        to_prescribe=tuple(tensor.name for tensor in blended)
        if distrust is None and prescription is None
        else (),
        identity={"method": method.name, "content": hashlib.sha256(content).hexdigest()},
        tensors=tensors,
        transplant=file.transplant,
        values=values,
        densities=densities.of,
    )


def _has(file: RatioFile, name: str) -> bool:
    return name in file.fixed or any(gene.name == name for gene in file.genes)


def _why_no_trust(file: RatioFile, scans: bool, prescription: Prescription | None) -> str | None:
    """Why the scan cannot count; None if it can, or may yet."""
    if not _has(file, TRUST):
        return "the space does not use a scan"
    reason = None
    if not scans:
        reason = "the campaign does not scan the parents"
    elif prescription is not None and not prescription.is_telling:
        reason = (
            f"the scan does not tell tensors apart: the shares that it advises spread by "
            f"{prescription.dispersion:g}, less than {LEAST_DISPERSION:g}"
        )
    if reason is not None and file.fixed.get(TRUST) == 1.0:
        raise BadInputError(
            f"{file.path}: the space trusts the scan alone, but {reason}: choose another space"
        )
    return reason


def _members(file: RatioFile, father: ArchitectureMap, mothers: list[str]) -> Iterator[_Member]:
    """The ratio genes that the file stands for, with their starts shared by the mothers."""
    for family in file.genes:
        if not family.weight:
            continue
        numbers = _numbers(family, file, father)
        if len(family.start) not in (1, len(numbers)):
            raise BadInputError(
                f"{file.path}: {family.name}: {len(family.start)} starting values for {len(numbers)} genes"
            )
        starts = family.start if len(family.start) > 1 else family.start * len(numbers)
        for number, start in zip(numbers, starts, strict=True):
            parts = family.name.split("_")
            name = "_".join(str(number) if part == NUMBER else part for part in parts)
            for mother in mothers:
                own = name if len(mothers) == 1 else f"{name}.{mother}"
                share = round(max(family.low, start / len(mothers)), DECIMALS)
                yield _Member(Gene(own, family.low, family.high, share), family, number, mother)


def _numbers(family: RatioGene, file: RatioFile, father: ArchitectureMap) -> list[int | None]:
    """What tells the genes of a family apart: blocks, or layers."""
    if family.per is None:
        return [None]
    return [*range(file.blocks if family.per == "block" else father.layers)]


def _start_at_preset(file: RatioFile, father: ArchitectureMap) -> Iterator[RatioGene]:
    """The genes of a file, those that are ratios starting where the mother-centric preset is.

    A gene about several tensors starts at the mean of theirs, weighted by their elements.
    """
    for family in file.genes:
        starts = []
        for number in _numbers(family, file, father) if family.weight else ():
            about = [
                tensor
                for tensor in father.tensors
                if tensor.component in file.components
                and _is_about(family, number, tensor, file, father)
            ]
            elements = sum(tensor.elements for tensor in about)
            total = math.fsum(ratio(tensor, father.layers) * tensor.elements for tensor in about)
            start = total / elements if elements else family.start[0]
            starts.append(min(max(start, family.low), family.high))
        yield replace(family, start=tuple(starts) or family.start)


def _is_about(
    family: RatioGene,
    number: int | None,
    tensor: LogicalTensor,
    file: RatioFile,
    father: ArchitectureMap,
) -> bool:
    """Whether this gene of a family counts in the ratio of a tensor."""
    places = {None: None, "layer": tensor.layer, "block": None}
    if tensor.layer is not None:
        places["block"] = _block_of(tensor.layer, file.blocks, father.layers)
    return (
        (not family.components or tensor.component in family.components)
        and (family.per is None or number is not None)
        and number == places[family.per]
    )


def _terms(
    tensor: LogicalTensor,
    mother: str,
    members: list[_Member],
    file: RatioFile,
    father: ArchitectureMap,
) -> Terms:
    """The genes of one mother that are about a tensor, with their weights."""
    return tuple(
        (member.family.weight, member.gene.name)
        for member in members
        if member.mother == mother and _is_about(member.family, member.number, tensor, file, father)
    )


def _block_of(layer: int, blocks: int, layers: int) -> int:
    """The block that a layer lies in; blocks are as even as can be, and never more than layers."""
    count = min(blocks, layers)
    return next(b for b in range(count) if layer < (b + 1) * layers // count)


def _searched(
    members: list[_Member],
    terms: dict[str, tuple[Terms, ...]],
    tensors: tuple[BlendedTensor, ...],
    file: RatioFile,
    father: ArchitectureMap,
) -> tuple[list[Gene], list[RemovedGene]]:
    """The ratio genes that some tensor depends on, and the others with why none does."""
    placed = {gene for of in terms.values() for own in of for _, gene in own}
    used = {gene for tensor in tensors for own in tensor.terms for _, gene in own}
    genes, removed = [], []
    for member in members:
        name = member.gene.name
        if name in used:
            genes.append(member.gene)
        elif name in placed:
            removed.append(RemovedGene(name, "the parents do not differ where it counts"))
        elif member.family.per == "block" and (member.number or 0) >= father.layers:
            removed.append(RemovedGene(name, f"the model has only {father.layers} layers"))
        else:
            about = ", ".join(member.family.components) or "the space's components"
            removed.append(RemovedGene(name, f"the model has no such tensor ({about})"))
    return genes, removed


def _exceptions(file: RatioFile, tensor: LogicalTensor) -> tuple[tuple[str, float], ...]:
    """The parameters that the file fixes for a tensor, by the first exception that names it."""
    for patterns, values in file.exceptions:
        if any(fnmatchcase(name, p) for p in patterns for name in (tensor.name, tensor.stored)):
            return tuple(values.items())
    return ()
