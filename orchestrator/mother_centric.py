"""Mother-centric Ratio Interpolation (Darwin V7): a ratio per tensor from two tables, without a search.

The values that ship are those of the card of FINAL-Bench/Darwin-Mistral-G1; how its two tables meet in one
tensor is not public, so that is a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import groupby
from typing import Any

from orchestrator.config import find_shipped, read_yaml
from workers.checkpoints import COMPONENTS, ArchitectureMap, LogicalTensor
from workers.errors import BadInputError
from workers.merging import CARRIED

PRESET = "mother_centric"
"""The recipe that ships, and the key of a recipe file that holds the tables."""

COMBINATIONS = ("category", "band", "mean", "product")


@dataclass(frozen=True)
class RatioTables:
    """Where the mother's share of a tensor comes from."""

    categories: dict[str, float]
    """Component -> ratio."""
    bands: tuple[tuple[Fraction, float], ...]
    """(share of the depth at which it ends, ratio), the lowest first; the last one ends at 1."""
    combination: str
    """`category`: the category's ratio, or the band's for components that have none; `band`: the band's, or
    the category's outside all layers; `mean` and `product` of the two, where there are two."""

    def ratio(self, tensor: LogicalTensor, layers: int) -> float:
        """The mother's share of a tensor of a model with so many layers, from 0 to 1.

        0 for what is carried from the father (vision, mtp, unknown), unless it has a category.
        """
        category = self.categories.get(tensor.component)
        if category is None and tensor.component in CARRIED:
            return 0.0
        band = None if tensor.layer is None else self._band(tensor.layer, layers)
        found = [ratio for ratio in (category, band) if ratio is not None]
        if not found:
            return 0.0
        if self.combination == "mean":
            return sum(found) / len(found)
        if self.combination == "product":
            return math.prod(found)
        return found[0 if self.combination == "category" else -1]

    def _band(self, layer: int, layers: int) -> float:
        return next(ratio for until, ratio in self.bands if layer < until * layers)


def ratio(tensor: LogicalTensor, layers: int) -> float:
    """The mother's share of a tensor by the preset that ships; a starting point for a search."""
    return _shipped().ratio(tensor, layers)


@cache
def _shipped() -> RatioTables:
    file = find_shipped("recipe", PRESET)
    return parse_tables(str(file), read_yaml(file)[PRESET])


def parse_tables(path: str, data: Any) -> RatioTables:
    """The tables of a recipe file's key `mother_centric`. Raises `BadInputError` naming file and key."""
    where = f"{path}: {PRESET}"
    keys = {"categories", "bands", "combination"}
    if not isinstance(data, dict) or data.keys() != keys:
        raise BadInputError(f"{where}: needs exactly the keys {', '.join(sorted(keys))}")
    categories, bands = data["categories"], data["bands"]
    if not isinstance(categories, dict) or not isinstance(bands, list) or not bands:
        raise BadInputError(f"{where}: categories must be a table, and bands a list")
    for component, value in categories.items():
        if component not in COMPONENTS:
            raise BadInputError(
                f"{where}.categories: {component!r} is none of {', '.join(COMPONENTS)}"
            )
        _check_ratio(f"{where}.categories.{component}", value)
    found = []
    for number, band in enumerate(bands):
        if not isinstance(band, dict) or band.keys() != {"until", "ratio"}:
            raise BadInputError(f"{where}.bands.{number}: needs exactly the keys until and ratio")
        _check_ratio(f"{where}.bands.{number}.ratio", band["ratio"])
        found.append((_share(f"{where}.bands.{number}.until", band["until"]), float(band["ratio"])))
    ends = [until for until, _ in found]
    if ends != sorted(set(ends)) or ends[-1] != 1:
        raise BadInputError(f"{where}.bands: each must end above the one before, the last one at 1")
    if data["combination"] not in COMBINATIONS:
        raise BadInputError(
            f"{where}.combination: {data['combination']!r} is none of {', '.join(COMBINATIONS)}"
        )
    ratios = {component: float(value) for component, value in categories.items()}
    return RatioTables(ratios, tuple(found), data["combination"])


def _check_ratio(where: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise BadInputError(f"{where}: {value!r} is not a number from 0 to 1")


def _share(where: str, value: Any) -> Fraction:
    """A share of the depth: a number, or a text such as 30/88, so that no rounding moves a layer."""
    try:
        if type(value) in (int, float, str) and 0 < Fraction(value) <= 1:
            return Fraction(value)
    except (ValueError, ZeroDivisionError, OverflowError):
        pass
    raise BadInputError(f"{where}: {value!r} is no share of the depth such as 0.5 or 30/88")


def expand(path: str, data: dict[Any, Any], father: ArchitectureMap) -> dict[Any, Any]:
    """A recipe file's data with rules in the place of the tables, for the father's components and layers."""
    if "rules" in data:
        raise BadInputError(f"{path}: has both rules and {PRESET}; leave one of them out")
    tables = parse_tables(path, data[PRESET])
    parents = data.get("parents")
    if not isinstance(parents, list) or len(parents) != 2:
        raise BadInputError(f"{path}: parents: {PRESET} is for two, the father and the mother")
    names = [parent.get("name") if isinstance(parent, dict) else None for parent in parents]
    rest = {key: value for key, value in data.items() if key != PRESET}
    return rest | {"rules": list(_rules(tables, father, names))}


def _rules(tables: RatioTables, father: ArchitectureMap, names: list[Any]) -> Iterator[Any]:
    """A rule for each component, or for each of its bands, and for what it has outside all layers."""
    for component in COMPONENTS:
        ratios = {
            tensor.layer: tables.ratio(tensor, father.layers)
            for tensor in father.tensors
            if tensor.component == component
        }
        if not any(ratios.values()):
            continue  # carried from the father
        layered = sorted(layer for layer in ratios if layer is not None)
        if len(set(ratios.values())) > 1:
            for value, group in groupby(layered, key=lambda layer: ratios[layer]):
                span = list(group)
                where = {"components": [component], "layers": [span[0], span[-1]]}
                yield _rule(where, value, names)
        if None in ratios or len(set(ratios.values())) == 1:
            value = ratios[None] if None in ratios else ratios[layered[0]]
            yield _rule({"components": [component]}, value, names)


def _rule(where: dict[str, Any], value: float, names: list[Any]) -> dict[str, Any]:
    """(1 - value) father + value mother; bit by bit a parent's at either end."""
    if value in (0.0, 1.0):
        source = names[int(value)]
        return {"where": where, "method": "passthrough", "parameters": {"source": source}}
    weight = {names[0]: 1.0 - value, names[1]: value}
    return {"where": where, "method": "linear", "parameters": {"weight": weight}}
