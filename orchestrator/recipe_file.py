"""Recipe files: one merge as a person writes it down, without a search."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
    try:
        data = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(data, dict) or not {"parents", "rules"} <= data.keys():
        raise BadInputError(f"{path}: a recipe needs the keys parents and rules")
    if data.keys() - KEYS:
        raise BadInputError(
            f"{path}: unknown key {sorted(data.keys() - KEYS)[0]!r}; allowed are "
            f"{', '.join(sorted(KEYS))}"
        )
    places = _parents(path, data["parents"])
    seed = data.get("seed", 0)
    if type(seed) is not int:
        raise BadInputError(f"{path}: seed: {seed!r} is not a whole number")
    rules = tuple(_rule(path, number, rule) for number, rule in enumerate(data["rules"]))
    parents = {name: open_checkpoint(place) for name, place in places.items()}
    base = open_checkpoint(data["base"]) if data.get("base") else None
    check_parents(parents | ({"base": base} if base else {}))
    references = tuple(ParentReference(name, p.fingerprint) for name, p in parents.items())
    base_reference = ParentReference("base", base.fingerprint) if base else None
    return RecipeFile(parents, base, Recipe(references, rules, base_reference, seed))


def _parents(path: str, data: Any) -> dict[str, str]:
    places = {}
    for parent in data if isinstance(data, list) else []:
        if not isinstance(parent, dict) or set(parent) != {"name", "path"}:
            raise BadInputError(f"{path}: parents: each needs exactly name and path")
        if parent["name"] in places:
            raise BadInputError(f"{path}: parents: the name {parent['name']!r} is used twice")
        places[str(parent["name"])] = str(parent["path"])
    if not places:
        raise BadInputError(f"{path}: parents must be a list of name and path, the father first")
    return places


def _rule(path: str, number: int, data: Any) -> Rule:
    where = f"{path}: rules.{number}"
    if not isinstance(data, dict) or not {"method"} <= data.keys() <= {"where", "method", "parameters"}:
        raise BadInputError(f"{where}: a rule has a method, and may have where and parameters")
    try:
        get_method(data["method"])
        selector = (
            parse_selector(data["where"])
            if data.get("where")
            else Selector(components=tuple(c for c in COMPONENTS if c not in CARRIED))
        )
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from error
    parameters = {
        key: float(value) if type(value) is int else value
        for key, value in (data.get("parameters") or {}).items()
    }
    return Rule(selector, data["method"], parameters)
