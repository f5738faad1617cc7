"""Files of expert spaces: genome spaces that decide for each routed expert of each layer, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.config import GenomeConfig, find_shipped, read_yaml
from orchestrator.genomes.parameter_file import parse_number
from orchestrator.genomes.ratio_file import (
    DENSITIES,
    RatioGene,
    parse_share,
    parse_table,
    parse_thresholds,
)
from workers.errors import BadInputError

TRUST, SHARE = "trust", "share"
SCHEDULE = ("density_first", "density_last")
"""The share of the experts of the first and of the last layer that may leave the father."""

SHARED_EXPERT, ATTENTION, NORM = "shared_expert", "attention", "norm"
COMPONENT_GENES = {
    SHARED_EXPERT: ("shared_expert",),
    ATTENTION: ("attention", "linear_attention"),
}
"""Optional gene -> the components that it is about."""

MOST_OF_OTHERS = 0.25
"""The donors' share of shared experts and norms, all donors together: every token passes through them."""

KEYS = ("kind", "bands", "quantiles", "transplant", "router", "others", "genes", "fixed")
GENES = (TRUST, SHARE, *SCHEDULE, *COMPONENT_GENES, *DENSITIES)
NEEDED = (TRUST, SHARE, *SCHEDULE)
ROUTERS = ("keep", "as_experts")


@dataclass(frozen=True)
class ExpertFile:
    """What a file says."""

    path: str
    bands: int
    """Into how many bands the layers that have experts are cut."""
    quantiles: int
    """Into how many parts the experts of a layer are cut, by the share that a donor is advised."""
    transplant: tuple[float, float]
    """Shares whose sum is below the first leave an expert the father's; one above the second makes it the
    donor's."""
    router: str
    others: dict[str, float]
    """Component -> the donors' share of it, together."""
    genes: dict[str, RatioGene]
    fixed: dict[str, float]

    def has(self, name: str) -> bool:
        """Whether there is a gene or a fixed value of that name."""
        return name in self.genes or name in self.fixed


def is_expert_file(config: GenomeConfig) -> bool:
    """Whether the configured space is one of experts."""
    data = read_yaml(find_shipped("genome", config.space))
    return isinstance(data, dict) and data.get("kind") == "experts"


def load_expert_file(config: GenomeConfig) -> ExpertFile:
    """The configured space's file, with the campaign's own bounds and bands (`genome.blocks`) in it.

    Raises `BadInputError` naming file and key.
    """
    file = find_shipped("genome", config.space)
    data, path = read_yaml(file), str(file)
    unknown = data.keys() - set(KEYS)
    if unknown:
        raise BadInputError(f"{path}: unknown key {sorted(unknown, key=str)[0]!r}")
    if config.start is not None:
        raise BadInputError(f"genome.start: the space {path} has no named starts")
    genes = _genes(path, data.get("genes"), config)
    fixed = {
        name: parse_share(f"{path}: fixed.{name}", value)
        for name, value in parse_table(f"{path}: fixed", data.get("fixed")).items()
    }
    for name in fixed:
        if name not in (TRUST, *SCHEDULE, *DENSITIES):
            raise BadInputError(f"{path}: fixed.{name}: only {TRUST} and densities can be fixed")
        if name in genes:
            raise BadInputError(f"{path}: fixed.{name}: it is a gene of this space")
    for name in NEEDED:
        if name not in genes and name not in fixed:
            fixable = "" if name == SHARE else ", or a value of it in fixed"
            raise BadInputError(f"{path}: genes.{name} is missing{fixable}")
    others = _others(path, data.get("others", "keep"))
    if SHARED_EXPERT in genes and SHARED_EXPERT in others:
        raise BadInputError(f"{path}: others.{SHARED_EXPERT}: it is a gene of this space")
    router = data.get("router", "keep")
    if router not in ROUTERS:
        raise BadInputError(f"{path}: router: {router!r} is none of {', '.join(ROUTERS)}")
    if config.blocks is not None:
        data = data | {"bands": config.blocks}
    return ExpertFile(
        path,
        _count(path, data, "bands"),
        _count(path, data, "quantiles"),
        parse_thresholds(path, data.get("transplant")),
        router,
        others,
        genes,
        fixed,
    )


def _genes(path: str, data: Any, config: GenomeConfig) -> dict[str, RatioGene]:
    given = parse_table(f"{path}: genes", data)
    for name in given:
        if name not in GENES:
            raise BadInputError(f"{path}: genes.{name}: it is none of {', '.join(GENES)}")
    for name in config.genes:
        if name not in given:
            raise BadInputError(
                f"genome.genes: {name!r} is no gene of the space {path}; its genes are "
                f"{', '.join(given)}"
            )
    found = {}
    for name, table in given.items():
        where = f"{path}: genes.{name}"
        bounds = parse_table(where, table)
        if (own := config.genes.get(name)) is not None:
            where = f"genome.genes.{name}"
            bounds = {"low": own.low, "high": own.high, "start": own.start}
        found[name] = _gene(where, name, bounds)
    return found


def _gene(where: str, name: str, bounds: dict[str, Any]) -> RatioGene:
    if bounds.keys() != {"low", "high", "start"}:
        raise BadInputError(f"{where}: needs exactly low, high and start")
    low, high, start = (
        parse_number(f"{where}.{key}", bounds[key]) for key in ("low", "high", "start")
    )
    most = MOST_OF_OTHERS if name == SHARED_EXPERT else 1.0
    if not 0.0 <= low < high <= most or not low <= start <= high:
        raise BadInputError(
            f"{where}: start {start} must lie between low {low} and high {high}, these between 0 and "
            f"{most:g}"
        )
    return RatioGene(name, low, high, (start,))


def _others(path: str, data: Any) -> dict[str, float]:
    if data == "keep":
        return {}
    found = {}
    for name, value in parse_table(f"{path}: others", data).items():
        where = f"{path}: others.{name}"
        if name not in (SHARED_EXPERT, NORM):
            raise BadInputError(
                f"{where}: others is keep, or shares of {SHARED_EXPERT} and of {NORM}; attention may "
                "have a gene, and all else is the father's"
            )
        found[name] = parse_share(where, value)
        if found[name] > MOST_OF_OTHERS:
            raise BadInputError(f"{where}: {value} is more than {MOST_OF_OTHERS}")
    return found


def _count(path: str, data: dict[str, Any], key: str) -> int:
    count = data.get(key)
    if type(count) is not int or count < 1:
        raise BadInputError(f"{path}: {key}: {count!r} is not a number from 1 on")
    return count
