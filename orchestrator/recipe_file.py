"""Recipe files: one merge as a person writes it down, without a search."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import read_yaml
from orchestrator.inputs import check_parents
from workers.checkpoints import COMPONENTS, Checkpoint, open_checkpoint
from workers.errors import BadInputError
from workers.merging import (
    CARRIED,
    ParentReference,
    Recipe,
    Rule,
    Selector,
    get_method,
    parse_selector,
)

KEYS = {"parents", "base", "rules", "seed"}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe with its parents opened."""

    parents: dict[str, Checkpoint]
    base: Checkpoint | None
    recipe: Recipe


def load_recipe_file(path: str) -> RecipeFile:
    """Read a recipe's YAML and open its parents. Raises `BadInputError` naming file and key.

    A rule without `where` is for every tensor but those that are carried from the father (vision, mtp,
    unknown).
    """
    file = Path(path)
    if not file.is_file():
        raise BadInputError(f"there is no file {path}")
    data = read_yaml(file)
    if not isinstance(data, dict) or not {"parents", "rules"} <= data.keys():
        raise BadInputError(f"{path}: a recipe needs the keys parents and rules")
    if data.keys() - KEYS:
        raise BadInputError(
            f"{path}: unknown key {sorted(data.keys() - KEYS, key=str)[0]!r}; allowed are "
            f"{', '.join(sorted(KEYS))}"
        )
    places = _parents(path, data["parents"])
    seed = data.get("seed", 0)
    if type(seed) is not int:
        raise BadInputError(f"{path}: seed: {seed!r} is not a whole number")
    base_place = data.get("base")
    if base_place is not None and not isinstance(base_place, str):
        raise BadInputError(f"{path}: base: {base_place!r} is not a place")
    if not isinstance(data["rules"], list):
        raise BadInputError(
            f"{path}: rules must be a list; the first rule that matches a tensor counts"
        )
    rules = tuple(_rule(path, number, rule) for number, rule in enumerate(data["rules"]))
    for number, rule in enumerate(rules):
        try:
            get_method(rule.method).resolve(rule.parameters, tuple(places), base_place is not None)
        except BadInputError as error:
            raise BadInputError(f"{path}: rules.{number}: {error}") from error
    parents = {name: open_checkpoint(place) for name, place in places.items()}
    base = open_checkpoint(base_place) if base_place is not None else None
    check_parents(parents | ({"base": base} if base else {}))
    references = tuple(ParentReference(name, p.fingerprint) for name, p in parents.items())
    base_reference = ParentReference("base", base.fingerprint) if base else None
    return RecipeFile(parents, base, Recipe(references, rules, base_reference, seed))


def _parents(path: str, data: Any) -> dict[str, str]:
    places = {}
    for parent in data if isinstance(data, list) else []:
        if not isinstance(parent, dict) or set(parent) != {"name", "path"}:
            raise BadInputError(f"{path}: parents: each needs exactly name and path")
        name, place = parent["name"], parent["path"]
        if not isinstance(name, str) or not isinstance(place, str):
            raise BadInputError(f"{path}: parents: {name!r} and {place!r} must be texts")
        if name in places or name == "base":
            raise BadInputError(
                f"{path}: parents: the name {name!r} is used twice, or is that of the base"
            )
        places[name] = place
    if not places:
        raise BadInputError(f"{path}: parents must be a list of name and path, the father first")
    return places


def _rule(path: str, number: int, data: Any) -> Rule:
    where = f"{path}: rules.{number}"
    if not isinstance(data, dict) or not {"method"} <= data.keys() <= {
        "where",
        "method",
        "parameters",
    }:
        raise BadInputError(f"{where}: a rule has a method, and may have where and parameters")
    if not isinstance(data["method"], str):
        raise BadInputError(f"{where}.method: {data['method']!r} is not a text")
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadInputError(f"{where}.parameters: must be names with a value each")
    try:
        get_method(data["method"])
        selector = (
            parse_selector(data["where"])
            if data.get("where")
            else Selector(components=tuple(c for c in COMPONENTS if c not in CARRIED))
        )
        return Rule(selector, data["method"], _value(parameters))
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from error


def _value(value: Any) -> Any:
    """A parameter's value; numbers as floats, so that 1 and 1.0, 0.0 and -0.0 make one recipe."""
    if isinstance(value, dict):
        return {parent: _value(given) for parent, given in value.items()}
    if type(value) not in (int, float):
        return value
    try:
        return float(value) + 0.0
    except OverflowError:
        return value  # The method refuses it.
