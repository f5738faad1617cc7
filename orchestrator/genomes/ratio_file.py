"""Files of ratio spaces: genome spaces whose genes are the mother's share of tensors, as plain data.

A tensor's ratio is the weighted mean of the *ratio genes* that are about it: one for all tensors, one for its
component, one for its block of layers or its layer. The other genes have names of fixed meaning.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.config import GenomeConfig, find_shipped, read_yaml
from orchestrator.genomes.parameter_file import parse_exceptions, parse_number
from orchestrator.mother_centric import PRESET
from workers.checkpoints.names import COMPONENTS
from workers.errors import BadInputError
from workers.merging import MergeMethod

TRUST, DENSITIES = "mri_trust", ("density_a", "density_b")
OTHER_GENES = (TRUST, *DENSITIES, "lambda", "merge_method_weight")
"""How much the scan's ratio counts, the densities of father and mother, and two that are declared because
the published genomes have them."""

NUMBER = "N"
"""What stands for the number of a block or a layer, between underscores, in the name of a gene for each."""

KEYS = ("kind", "components", "blocks", "transplant", "genes", "fixed", "starts", "exceptions")


@dataclass(frozen=True)
class RatioGene:
    """A gene of the file, or the family of genes that it stands for."""

    name: str
    low: float
    high: float
    start: tuple[float, ...]
    """One value, or one for each of the family."""
    weight: float = 0.0
    """In the weighted mean of a ratio; 0 for genes that are no ratio."""
    components: tuple[str, ...] = ()
    """Those that it is about; none named: all."""
    per: str | None = None
    """"block" or "layer": there is one for each."""


@dataclass(frozen=True)
class RatioFile:
    """What a file says."""

    path: str
    components: tuple[str, ...]
    """Those that are blended; others stay the father's."""
    blocks: int
    transplant: tuple[float, float]
    """A ratio below the first leaves a tensor the father's, one above the second makes it the mother's."""
    genes: tuple[RatioGene, ...]
    fixed: dict[str, float]
    exceptions: tuple[tuple[tuple[str, ...], dict[str, float]], ...]


def is_ratio_file(config: GenomeConfig) -> bool:
    """Whether the configured space is one of ratios."""
    data = read_yaml(find_shipped("genome", config.space))
    return isinstance(data, dict) and data.get("kind") == "ratio"


def load_ratio_file(config: GenomeConfig, method: MergeMethod) -> RatioFile:
    """The configured space's file, with the campaign's own bounds, blocks and start in it.

    Raises `BadInputError` naming file and key.
    """
    file = find_shipped("genome", config.space)
    data, path = read_yaml(file), str(file)
    unknown = data.keys() - set(KEYS)
    if unknown:
        raise BadInputError(f"{path}: unknown key {sorted(unknown, key=str)[0]!r}")
    components = _components(f"{path}: components", data.get("components"))
    fixed = {
        name: parse_share(f"{path}: fixed.{name}", value)
        for name, value in parse_table(f"{path}: fixed", data.get("fixed")).items()
    }
    for name in fixed:
        if name not in (TRUST, *DENSITIES):
            raise BadInputError(f"{path}: fixed.{name}: only {TRUST} and densities can be fixed")
    genes = _genes(path, data, components, config)
    for gene in genes:
        if gene.name in fixed:
            raise BadInputError(f"{path}: fixed.{gene.name}: it is a gene of this space")
    blocks = data.get("blocks", 1)
    if config.blocks is not None:
        if not any(gene.per == "block" for gene in genes):
            raise BadInputError(f"genome.blocks: the space {path} has no genes per block")
        blocks = config.blocks
    if type(blocks) is not int or blocks < 1:
        raise BadInputError(f"{path}: blocks: {blocks!r} is not a number from 1 on")
    return RatioFile(
        path,
        components,
        blocks,
        parse_thresholds(path, data.get("transplant")),
        genes,
        fixed,
        tuple(parse_exceptions(path, data.get("exceptions") or [], method)),
    )


def _genes(
    path: str, data: dict[str, Any], components: tuple[str, ...], config: GenomeConfig
) -> tuple[RatioGene, ...]:
    """The genes with the campaign's own bounds, and with the values of the start that it names."""
    given = parse_table(f"{path}: genes", data.get("genes"))
    start = _named_start(path, data, config.start, given)
    for name in config.genes:
        if name not in given:
            raise BadInputError(
                f"genome.genes: {name!r} is no gene of the space {path}; its genes are "
                f"{', '.join(given) or 'none'}"
            )
    found = []
    for name, table in given.items():
        where, own = f"{path}: genes.{name}", config.genes.get(name)
        if own is not None:
            where = f"genome.genes.{name}"
            table = parse_table(where, table) | {
                "low": own.low,
                "high": own.high,
                "start": own.start,
            }
        gene = _gene(where, name, table, components)
        values = start.get(name, gene.start)
        if any(not gene.low <= value <= gene.high for value in values):
            raise BadInputError(
                f"{path}: starts.{config.start}.{name}: {list(values)} is not within the gene's bounds "
                f"[{gene.low}, {gene.high}]"
            )
        found.append(replace(gene, start=values))
    return tuple(found)


def _gene(where: str, name: Any, given: Any, components: tuple[str, ...]) -> RatioGene:
    if not isinstance(name, str) or "." in name:
        raise BadInputError(f"{where}: a gene's name is a text without dots")
    given = parse_table(where, given)
    needed = {"low", "high", "start"}
    allowed = needed if name in OTHER_GENES else needed | {"weight", "components", "per"}
    wrong = (needed - given.keys()) | (given.keys() - allowed)
    if wrong:
        raise BadInputError(
            f"{where}: needs low, high and start"
            + ("" if name in OTHER_GENES else ", weight, and may have components and per")
            + f"; {min(wrong, key=str)!r} is missing or unknown"
        )
    low, high, start = (
        parse_number(f"{where}.{key}", given[key]) for key in ("low", "high", "start")
    )
    if not 0.0 <= low < high <= 1.0 or not low <= start <= high:
        raise BadInputError(
            f"{where}: start {start} must lie between low {low} and high {high}, these between 0 and 1"
        )
    if name in OTHER_GENES:
        return RatioGene(name, low, high, (start,))
    weight = parse_number(f"{where}.weight", given.get("weight"))
    if weight <= 0.0:
        raise BadInputError(f"{where}.weight: {weight} is not above 0")
    per = given.get("per")
    if per not in (None, "block", "layer") or (per is not None) != (NUMBER in name.split("_")):
        raise BadInputError(
            f"{where}: per is block or layer, and such a gene has {NUMBER} in its name for "
            "the number, as in block_N_ratio"
        )
    about = _components(f"{where}.components", given["components"]) if "components" in given else ()
    for component in about:
        if component not in components:
            raise BadInputError(
                f"{where}.components: {component} is none of the space's components"
            )
    return RatioGene(name, low, high, (start,), weight, about, per)


def _named_start(
    path: str, data: dict[str, Any], name: str | None, genes: Collection[str]
) -> dict[str, tuple[float, ...]]:
    """Gene -> its starting values, of the start that the campaign names."""
    starts = parse_table(f"{path}: starts", data.get("starts"))
    if name is None or (name == PRESET and any(gene not in OTHER_GENES for gene in genes)):
        return {}  # the preset's depend on the model
    if name not in starts:
        raise BadInputError(
            f"genome.start: {name!r} is no start of the space {path}; it has "
            f"{', '.join([*starts, *([PRESET] if genes else [])]) or 'none'}"
        )
    found = {}
    for gene, values in parse_table(f"{path}: starts.{name}", starts[name]).items():
        where = f"{path}: starts.{name}.{gene}"
        if gene not in genes:
            raise BadInputError(f"{where}: there is no such gene")
        listed = values if isinstance(values, list) else [values]
        found[gene] = tuple(parse_share(where, value) for value in listed)
    return found


def parse_thresholds(path: str, data: Any) -> tuple[float, float]:
    table = parse_table(f"{path}: transplant", data)
    if table.keys() != {"below", "above"}:
        raise BadInputError(f"{path}: transplant: needs exactly below and above")
    below, above = (
        parse_share(f"{path}: transplant.{key}", table[key]) for key in ("below", "above")
    )
    if below > above:
        raise BadInputError(f"{path}: transplant: below {below} is more than above {above}")
    return below, above


def _components(where: str, data: Any) -> tuple[str, ...]:
    if not isinstance(data, list) or not data:
        raise BadInputError(f"{where}: needs a list of components")
    for component in data:
        if component not in COMPONENTS:
            raise BadInputError(f"{where}: {component!r} is none of {', '.join(COMPONENTS)}")
    return tuple(data)


def parse_table(where: str, data: Any) -> dict[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise BadInputError(f"{where}: {data!r} is not a table")
    return data


def parse_share(where: str, value: Any) -> float:
    number = parse_number(where, value)
    if not 0.0 <= number <= 1.0:
        raise BadInputError(f"{where}: {number} is not between 0 and 1")
    return number
