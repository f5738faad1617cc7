"""Files of genome spaces (`conf/genome/*.yaml`), read and checked for one merge method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from orchestrator.config import GenomeConfig, find_shipped, read_yaml
from workers.checkpoints.names import COMPONENTS
from workers.errors import BadInputError
from workers.merging import METHODS, MergeMethod

DECIMALS = 6
"""Genes are rounded to this many decimals, so that a genome reads, compares and replays exactly."""

AXES = ("parent", "group", "block")


@dataclass(frozen=True)
class GeneFamily:
    """A method parameter that is searched, and the axes along which it varies."""

    parameter: str
    per: tuple[str, ...]
    low: float
    high: float
    start: float

    def gene_name(self, parent: str, group: str, block: int | None) -> str:
        parts = [self.parameter]
        if "parent" in self.per:
            parts.append(parent)
        if "group" in self.per:
            parts.append(group)
        if "block" in self.per and block is not None:
            parts.append(str(block))
        return ".".join(parts)


@dataclass(frozen=True)
class SpaceFile:
    """What a file says, as far as it concerns one merge method."""

    path: str
    groups: dict[str, tuple[str, ...]]
    """Group -> components."""
    blocks: dict[str, int]
    """Group -> number of blocks of layers, for the groups that are cut."""
    families: tuple[GeneFamily, ...]
    exceptions: tuple[tuple[tuple[str, ...], dict[str, float]], ...]
    """Name patterns, and the parameter values that are fixed for them."""


def load_space_file(config: GenomeConfig, method: MergeMethod) -> SpaceFile:
    """The configured space's file, with the campaign's own bounds and blocks in it.

    Raises `BadInputError` naming file and key.
    """
    file = find_shipped("genome", config.space)
    data = read_yaml(file)
    if not isinstance(data, dict) or not {"groups", "genes"} <= data.keys():
        raise BadInputError(f"{file}: a genome space needs the keys groups and genes")
    unknown = data.keys() - {"groups", "blocks", "genes", "exceptions"}
    if unknown:
        raise BadInputError(f"{file}: unknown key {sorted(unknown, key=str)[0]!r}")
    path = str(file)
    groups = _groups(path, data["groups"])
    return SpaceFile(
        path,
        groups,
        _blocks(path, data.get("blocks") or {}, groups, config),
        _families(path, data["genes"], method, config),
        tuple(parse_exceptions(path, data.get("exceptions") or [], method)),
    )


def _groups(file: str, data: Any) -> dict[str, tuple[str, ...]]:
    """Group -> components. A component in two groups would leave the second without effect."""
    group_of: dict[str, str] = {}
    if not isinstance(data, dict) or not data:
        raise BadInputError(f"{file}: groups: needs names with a list of components each")
    for group, components in data.items():
        where = f"{file}: groups.{group}"
        if not isinstance(group, str) or not isinstance(components, list) or not components:
            raise BadInputError(f"{where}: needs a text as its name and a list of components")
        for component in components:
            if component not in COMPONENTS:
                raise BadInputError(f"{where}: {component!r} is no component")
            if component in group_of:
                raise BadInputError(f"{where}: {component} is in {group_of[component]} already")
            group_of[component] = group
    return {group: tuple(components) for group, components in data.items()}


def _blocks(
    file: str, data: Any, groups: dict[str, tuple[str, ...]], config: GenomeConfig
) -> dict[str, int]:
    """Group -> number of blocks, for the groups that are cut."""
    if not isinstance(data, dict):
        raise BadInputError(f"{file}: blocks: needs groups with a number each")
    for group, count in data.items():
        if group not in groups:
            raise BadInputError(f"{file}: blocks.{group}: there is no such group")
        if type(count) is not int or count < 1:
            raise BadInputError(f"{file}: blocks.{group}: {count!r} is not a number from 1 on")
    if config.blocks is None:
        return data
    if not data:
        raise BadInputError(f"genome.blocks: the space {file} cuts no group into blocks")
    return dict.fromkeys(data, config.blocks)


def parse_exceptions(
    file: str, data: Any, method: MergeMethod
) -> list[tuple[tuple[str, ...], dict[str, float]]]:
    """Name patterns, and the values of this method's parameters that are fixed for them."""
    found = []
    for exception in data if isinstance(data, list) else [data]:
        if not isinstance(exception, dict) or set(exception) != {"names", "parameters"}:
            raise BadInputError(f"{file}: exceptions: each needs exactly names and parameters")
        names, parameters = exception["names"], exception["parameters"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadInputError(f"{file}: exceptions: names must be a list of patterns")
        if not isinstance(parameters, dict):
            raise BadInputError(f"{file}: exceptions: parameters must have a number each")
        values = {}
        for name, value in parameters.items():
            where = f"{file}: exceptions: parameters.{name}"
            if not any(known.parameter(name) for known in METHODS.values()):
                raise BadInputError(f"{where}: no method has such a parameter")
            declared = method.parameter(name)
            if declared is not None:
                values[name] = parse_number(where, value)
                low, high = (0, 1) if declared.scope == "flag" else (declared.low, declared.high)
                if not low <= values[name] <= high:
                    raise BadInputError(f"{where}: {value} is outside [{low}, {high}]")
        if values:
            found.append((tuple(names), values))
    return found


def parse_number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInputError(f"{where}: {value!r} is not a number")
    if round(value, DECIMALS) != value:
        raise BadInputError(f"{where}: {value} has more than {DECIMALS} decimals")
    return float(value)


def _families(
    file: str, genes: Any, method: MergeMethod, config: GenomeConfig
) -> tuple[GeneFamily, ...]:
    if not isinstance(genes, dict) or method.name not in genes:
        raise BadInputError(
            f"{file}: genes has none for the method {method.name!r}; it has them for "
            f"{', '.join(genes) if isinstance(genes, dict) else 'none'}"
        )
    families = {}
    where = f"{file}: genes.{method.name}"
    if not isinstance(genes[method.name], dict) or not genes[method.name]:
        raise BadInputError(f"{where}: needs the parameters that are searched")
    for name, given in genes[method.name].items():
        if not isinstance(given, dict):
            raise BadInputError(f"{where}.{name}: needs exactly per, low, high and start")
        families[name] = dict(given)
    for parameter in method.parameters:
        if parameter.default is None and parameter.name not in families:
            raise BadInputError(f"{where}: the method needs a value of {parameter.name!r}")
    for name, bounds in config.genes.items():
        if name not in families:
            raise BadInputError(
                f"genome.genes: {name!r} is no gene of this space with method {method.name}; its "
                f"genes are {', '.join(families)}"
            )
        families[name] |= {"low": bounds.low, "high": bounds.high, "start": bounds.start}
    return tuple(
        _family(
            f"genome.genes.{name}" if name in config.genes else f"{where}.{name}",
            name,
            given,
            method,
        )
        for name, given in families.items()
    )


def _family(where: str, name: str, given: dict[str, Any], method: MergeMethod) -> GeneFamily:
    """One family; `where` is the place of its bounds: the space's file or the campaign's key."""
    declared = method.parameter(name)
    if declared is None or declared.scope not in ("shared", "per_parent"):
        raise BadInputError(f"{where}: the method ignores it: it has no such number")
    if set(given) != {"per", "low", "high", "start"}:
        raise BadInputError(f"{where}: needs exactly per, low, high and start")
    if not isinstance(given["per"], list) or not all(axis in AXES for axis in given["per"]):
        raise BadInputError(
            f"{where}: per is a list that may hold {', '.join(AXES)}, not {given['per']!r}"
        )
    per = tuple(given["per"])
    if ("parent" in per) and declared.scope == "shared":
        raise BadInputError(f"{where}: the method takes one value for all parents")
    low, high, start = (
        parse_number(f"{where}.{key}", given[key]) for key in ("low", "high", "start")
    )
    if not low < high or not low <= start <= high:
        raise BadInputError(f"{where}: start {start} must lie between low {low} and high {high}")
    if low < declared.low or high > declared.high:
        raise BadInputError(
            f"{where}: bounds [{low}, {high}] leave what the method allows, "
            f"[{declared.low}, {declared.high}]"
        )
    return GeneFamily(name, per, low, high, start)
