"""Recipe files: one merge as a person writes it down, without a search.

A file is Darwin's own (`parents`, `rules`) or mergekit's (`merge_method`), which is translated first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.config import find_shipped, read_yaml
from orchestrator.experts.match_wish import MatchWish, match_wish
from orchestrator.experts.router import Harc, treat_routers
from orchestrator.inputs import check_parents, too_few_task_vectors
from orchestrator.mergekit.file import from_mergekit, is_mergekit
from orchestrator.mother_centric import PRESET, expand
from orchestrator.places import open_parent
from workers.checkpoints import COMPONENTS, ArchitectureMap, Checkpoint
from workers.errors import BadInputError
from workers.merging import (
    CARRIED,
    ParentReference,
    PostStep,
    Recipe,
    Rule,
    Selector,
    get_method,
    parse_selector,
)
from workers.merging.expert_order import check_lengths, parse_orders
from workers.merging.parameters import parse_parameters, varies
from workers.merging.recipe import parse_form, parse_rule_parents, parse_slice

KEYS = {
    "parents", "base", "rules", "seed", "layers", "dtype", "shard_bytes", "vocabulary",
    "experts", "match_experts", "sets", "router", "allow_degenerate",
}  # fmt: skip
RULE_KEYS = {"where", "method", "parameters", "post", "parents"}
RESERVED_NAMES = ("base", "union")
"""Words that stand for something else where a parent can be named."""

BYTES_OF_UNIT = {
    "": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class RecipeFile:
    """A recipe with its parents opened."""

    parents: dict[str, Checkpoint]
    base: Checkpoint | None
    recipe: Recipe
    files: dict[str, bytes] = field(default_factory=dict)
    """Small files of the child that are not the father's."""
    warnings: tuple[str, ...] = ()
    """What the user should know, though it is no mistake."""
    match: MatchWish | None = None
    """The experts that still have to be matched; until then the recipe takes them by their numbers."""
    harc: Harc | None = None
    """The calibration that routers still have to go through; until then the recipe keeps the father's."""


def load_recipe_file(
    path: str, places: dict[str, str] | None = None, base: str | None = None
) -> RecipeFile:
    """Read a recipe's YAML, or one that ships, and open its parents.

    `places` of parents by name, and that of the base, count instead of those in the file. A rule without
    `where` is for every tensor but those that are carried from the father (vision, mtp, unknown). Raises
    `BadInputError` naming file and key.
    """
    data = read_recipe_data(path)
    opened = cache(open_parent)
    if not is_mergekit(data):
        return load_recipe_data(path, _placed(path, data, places or {}, base), opened)
    if places or base:
        raise BadInputError(
            f"{path}: --parent and --base are not for mergekit's files: change the file, or convert it first "
            "(darwin recipe)"
        )
    translated = from_mergekit(path, data, opened)
    try:
        loaded = load_recipe_data(path, translated.data, opened)
    except BadInputError as error:
        raise BadInputError(_without_rule(str(error))) from error
    # What mergekit merges is merged.
    problems = dict.fromkeys(map(_without_rule, _degenerate(loaded)))
    return RecipeFile(
        loaded.parents,
        loaded.base,
        loaded.recipe,
        translated.files,
        tuple(f"{path}: {problem}" for problem in (*translated.warnings, *problems)),
    )


def _without_rule(problem: str) -> str:
    """A problem of a translated recipe; the numbers of our rules would mean nothing to the user."""
    return re.sub(r"\brules\.\d+: ", "", problem, count=1)


def read_recipe_data(path: str) -> dict[Any, Any]:
    """The keys of a recipe's YAML, or of one that ships. Raises `BadInputError` naming the file."""
    file = Path(path)
    if not file.is_file():
        if "." in path or "/" in path:
            raise BadInputError(f"there is no file {path}")
        file = find_shipped("recipe", path)
    data = read_yaml(file)
    if not isinstance(data, dict):
        raise BadInputError(f"{path}: a recipe needs the keys parents and rules")
    return data


def named_places(given: list[str]) -> dict[str, str]:
    """Name -> place of parents given as NAME=PLACE, in order. Raises `BadInputError` for what is none."""
    places: dict[str, str] = {}
    for text in given:
        name, found, place = text.partition("=")
        if not (name and found and place):
            raise BadInputError(f"--parent: {text!r} is not NAME=PLACE, such as father=org/model")
        _check_name("--parent", name, places)
        places[name] = place
    return places


def _check_name(where: str, name: str, places: dict[str, str]) -> None:
    if name in places or name in RESERVED_NAMES:
        raise BadInputError(
            f"{where}: the name {name!r} is used twice, or is one of "
            f"{', '.join(RESERVED_NAMES)}, which mean something else"
        )


def load_recipe_data(
    path: str, data: dict[Any, Any], opened: Callable[[str], Checkpoint]
) -> RecipeFile:
    """A recipe file's data in our own spelling, checked, with its parents `opened`."""
    if PRESET in data:
        father = opened(next(iter(_parents(path, data.get("parents")).values())))
        data = expand(path, data, ArchitectureMap.of(father))
    if data.keys() - KEYS:
        raise BadInputError(
            f"{path}: unknown key {sorted(data.keys() - KEYS, key=str)[0]!r}; allowed are "
            f"{', '.join(sorted(KEYS))}"
        )
    for key in ("parents", "rules"):
        if key not in data:
            raise BadInputError(
                f"{path}: the key {key!r} is missing: a recipe needs parents and rules"
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
    names = list(places)
    rules = tuple(_rule(path, number, rule, names) for number, rule in enumerate(data["rules"]))
    for number, rule in enumerate(rules):
        _check_rule(f"{path}: rules.{number}", rule, tuple(names), base_place is not None)
    layers, form = _form(path, data, names)
    allowed = data.get("allow_degenerate", False)
    if type(allowed) is not bool:
        raise BadInputError(f"{path}: allow_degenerate: {allowed!r} is neither true nor false")
    parents = {name: opened(place) for name, place in places.items()}
    base = opened(base_place) if base_place is not None else None
    check_parents(parents | ({"base": base} if base else {}), form["vocabulary"])
    if data.get("experts") and not layers:
        try:
            check_lengths(data["experts"], ArchitectureMap.of(parents[names[0]]))
        except BadInputError as error:
            raise BadInputError(f"{path}: {error}") from error
    references = tuple(ParentReference(name, p.fingerprint) for name, p in parents.items())
    base_reference = ParentReference("base", base.fingerprint) if base else None
    recipe = Recipe(references, rules, base_reference, seed, layers, **form)
    harc = None
    if "router" in data:
        recipe, harc = treat_routers(path, data["router"], recipe, parents, base)
    loaded = RecipeFile(parents, base, recipe, match=match_wish(path, data), harc=harc)
    for problem in [] if allowed else _degenerate(loaded):
        raise BadInputError(f"{path}: {problem}, or set allow_degenerate: true")
    return loaded


def _placed(
    path: str, data: dict[Any, Any], places: dict[str, str], base: str | None
) -> dict[Any, Any]:
    """The file's data with these places of parents and base in it."""
    parents = data.get("parents")
    listed = [p for p in parents if isinstance(p, dict)] if isinstance(parents, list) else []
    names = [parent.get("name") for parent in listed]
    for name in places:
        if name not in names:
            raise BadInputError(f"--parent: {name!r} is none of the parents {names} of {path}")
    if places:
        given = [
            parent | ({"path": places[name]} if name in places else {})
            for parent, name in zip(listed, names, strict=True)
        ]
        data = data | {"parents": given}
    return data if base is None else data | {"base": base}


def _parents(path: str, data: Any) -> dict[str, str]:
    places: dict[str, str] = {}
    for parent in data if isinstance(data, list) else []:
        if isinstance(parent, dict) and parent.keys() == {"name"}:
            raise BadInputError(
                f"{path}: parents: {parent['name']!r} has no path; give --parent {parent['name']}=PLACE"
            )
        if not isinstance(parent, dict) or set(parent) != {"name", "path"}:
            raise BadInputError(f"{path}: parents: each needs exactly name and path")
        name, place = parent["name"], parent["path"]
        if not isinstance(name, str) or not isinstance(place, str):
            raise BadInputError(f"{path}: parents: {name!r} and {place!r} must be texts")
        _check_name(f"{path}: parents", name, places)
        places[name] = place
    if not places:
        raise BadInputError(f"{path}: parents must be a list of name and path, the father first")
    return places


def _rule(path: str, number: int, data: Any, names: list[str]) -> Rule:
    where = f"{path}: rules.{number}"
    if not isinstance(data, dict) or not {"method"} <= data.keys() <= RULE_KEYS:
        raise BadInputError(
            f"{where}: a rule has a method, and may have where, parameters, post and parents"
        )
    try:
        selector = (
            Selector(components=tuple(c for c in COMPONENTS if c not in CARRIED))
            if data.get("where") in (None, {})
            else parse_selector(data["where"])
        )
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from error
    method, parameters = _step(where, data)
    post = None
    if data.get("post") is not None:
        step = data["post"]
        if not isinstance(step, dict) or not {"method"} <= step.keys() <= {"method", "parameters"}:
            raise BadInputError(f"{where}.post: has a method, and may have parameters")
        post = PostStep(*_step(f"{where}.post", step))
    try:
        seen = parse_rule_parents(data.get("parents") or [], names)
    except BadInputError as error:
        raise BadInputError(f"{where}.{error}") from error
    return Rule(selector, method, parameters, post, seen)


def _step(where: str, data: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method of a rule or a post-step, and its parameters."""
    if not isinstance(data["method"], str):
        raise BadInputError(f"{where}.method: {data['method']!r} is not a text")
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadInputError(f"{where}.parameters: must be names with a value each")
    try:
        get_method(data["method"])
        found: dict[str, Any] = _value(parameters)
        parse_parameters(found, "parameters")
        return data["method"], found
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from error


def _check_rule(where: str, rule: Rule, parents: tuple[str, ...], has_base: bool) -> None:
    """Raise `BadInputError` if a method refuses a number that its parameters hold for some tensor."""
    steps: list[tuple[str, Rule | PostStep]] = [(where, rule)]
    if rule.post is not None:
        steps.append((f"{where}.post", rule.post))
    for place, step in steps:
        method = get_method(step.method)
        if method.post != isinstance(step, PostStep):
            kind = "a post-step, which refines what another method merged" if method.post else (
                "no post-step"
            )  # fmt: skip
            raise BadInputError(f"{place}.method: {step.method} is {kind}")
        if any(map(varies, parse_parameters(step.parameters, place).values())):
            # The examples are no combinations that occur, so what must fit together is left to the plan.
            method = replace(method, check=None)
        for given in _examples(step.parameters):
            try:
                method.resolve(given, rule.parents or parents, has_base)
            except BadInputError as error:
                raise BadInputError(f"{place}: {error}") from error


def _examples(value: Any) -> Iterator[Any]:
    """Values without gradients and cases, such that each number of `value` is in one of them."""
    if isinstance(value, dict):
        firsts = {key: next(_examples(part)) for key, part in value.items()}
        yield firsts
        for key, part in value.items():
            for example in _examples(part):
                yield firsts | {key: example}
    elif isinstance(value, list):
        for part in value:
            yield from _examples(part["value"] if isinstance(part, dict) else part)
    else:
        yield value


def _form(path: str, data: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    """The keys that change the child's form: its layers, and the others; and the experts' orders."""
    slices = data.get("layers") or []
    if not isinstance(slices, list):
        raise BadInputError(f"{path}: layers: must be a list of slices, the lowest first")
    size = _bytes(path, data.get("shard_bytes"))
    try:
        layers = tuple(parse_slice(part, names) for part in slices)
        form = parse_form(data | {"shard_bytes": size}, names)
        orders = parse_orders(data.get("experts") or {}, names, data.get("base") is not None)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error
    if form["vocabulary"] == "base" and data.get("base") is None:
        raise BadInputError(f"{path}: vocabulary: is that of the base, but there is no `base`")
    return layers, form | {"experts": orders}


def _bytes(path: str, size: Any) -> Any:
    """A size as a number of bytes; of a text such as 5GB or 512 MiB what it says."""
    if not isinstance(size, str):
        return size
    text = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", size.strip().upper())
    if text is None or text[2] not in BYTES_OF_UNIT:
        raise BadInputError(f"{path}: shard_bytes: {size!r} is no size such as 5GB or 512MiB")
    return round(float(text[1]) * BYTES_OF_UNIT[text[2]])


def _degenerate(loaded: RecipeFile) -> Iterator[str]:
    """What is wrong with rules whose method means nothing for their parents."""
    for number, rule in enumerate(loaded.recipe.rules):
        seen = {name: loaded.parents[name] for name in rule.parents or loaded.parents}
        problem = too_few_task_vectors(get_method(rule.method), seen, loaded.base)
        if problem is not None:
            yield f"rules.{number}: {problem}"


def _value(value: Any) -> Any:
    """A parameter's value; numbers as floats, so that 1 and 1.0, 0.0 and -0.0 make one recipe."""
    if isinstance(value, dict):
        if "where" in value:  # a case: layers and experts are whole numbers
            return {key: part if key == "where" else _value(part) for key, part in value.items()}
        return {parent: _value(given) for parent, given in value.items()}
    if isinstance(value, list):
        return [_value(part) for part in value]
    if type(value) not in (int, float):
        return value
    try:
        return float(value) + 0.0
    except OverflowError:
        return value  # The method refuses it.
