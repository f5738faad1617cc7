"""What a merge method gets where a space decides on shares of the parents: weights or t, and densities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.genomes.parameter_file import DECIMALS
from orchestrator.genomes.ratio_file import DENSITIES, RatioGene
from orchestrator.genomes.space import Gene, RemovedGene
from workers.errors import BadInputError
from workers.merging import MergeMethod, ParentReference


@dataclass
class Densities:
    """The densities of a method's parents, as far as a space decides on them."""

    genes: list[Gene] = field(default_factory=list)
    removed: list[RemovedGene] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    """Of the genes that are not searched but count."""
    of: dict[str, str] = field(default_factory=dict)
    """Parent -> the gene of its density; empty if the method has none."""


def check_takes_shares(path: str, method: MergeMethod, has_densities: bool) -> None:
    """Raise `BadInputError` unless a share for each parent, and a density, are all that it needs."""
    if method.name != "slerp" and method.parameter("weight") is None:
        raise BadInputError(
            f"{path}: method {method.name} takes no share for each parent: choose one with weights "
            "(linear, dare_ties, ...) or slerp"
        )
    given = {"t", "weight", *(["density"] if has_densities else [])}
    for parameter in method.parameters:
        if parameter.default is None and parameter.name not in given:
            raise BadInputError(
                f"{path}: method {method.name} needs a value of {parameter.name!r}, for which the "
                "space has no gene"
            )


def blend_parameters(
    method: MergeMethod,
    parents: tuple[ParentReference, ...],
    shares: tuple[float, ...],
    density: Mapping[str, float],
) -> dict[str, Any]:
    """The method's parameters for a tensor of which the mothers have these shares, the father the rest."""
    if method.parameter("weight") is None:
        parameters: dict[str, Any] = {"t": shares[0]}
    else:
        # Shares are rounded one by one, so that their sum may be a trace above 1.
        all_shares = (max(round(1.0 - math.fsum(shares), DECIMALS), 0.0), *shares)
        names = (parent.name for parent in parents)
        parameters = {"weight": dict(zip(names, all_shares, strict=True))}
    if density:
        parameters["density"] = dict(density)
    return parameters


def density_genes(
    families: Mapping[str, RatioGene],
    fixed: Mapping[str, float],
    method: MergeMethod,
    parents: tuple[ParentReference, ...],
    base: ParentReference | None,
) -> Densities:
    """The gene, or the value that is fixed, of each parent's density."""
    found = Densities()
    for number, parent in enumerate(parents):
        declared = DENSITIES[min(number, 1)]
        family = families.get(declared)
        name = declared if len(parents) == 2 or number == 0 else f"{declared}.{parent.name}"
        if method.parameter("density") is None:
            if family is not None:
                reason = f"the method {method.name} has no densities"
                found.removed.append(RemovedGene(name, reason))
            continue
        found.of[parent.name] = name
        if family is None:
            found.values[name] = fixed[declared]
        elif base is not None and parent.fingerprint == base.fingerprint:
            found.values[name] = 1.0
            reason = f"{parent.name} is the base: it has no changes to drop"
            found.removed.append(RemovedGene(name, reason))
        else:
            found.genes.append(Gene(name, family.low, family.high, family.start[0]))
    return found
