"""`darwin recipe`: a recipe file in the other spelling, ours or mergekit's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import yaml

from orchestrator.mergekit.file import from_mergekit, is_mergekit
from orchestrator.mergekit.writer import MERGED, Places, to_mergekit
from orchestrator.places import open_parent
from orchestrator.recipe_file import load_recipe_data, read_recipe_data
from workers.checkpoints import ArchitectureMap, Checkpoint
from workers.errors import BadInputError
from workers.merging import Recipe
from workers.merging.plan import Plan, form_of

SPELLINGS = ("darwin", "mergekit")


def respell(path: str, to: str | None = None) -> str:
    """The YAML text of the recipe file `path` in the spelling `to`; None is the one that it has not.

    What the text cannot say of the file is said in comments. Raises `BadInputError` naming the rule, or
    the key, that the spelling cannot express.
    """
    data = read_recipe_data(path)
    given = is_mergekit(data)
    to = to or ("darwin" if given else "mergekit")
    if to not in SPELLINGS:
        raise BadInputError(f"--to: {to!r} is none of {', '.join(SPELLINGS)}")
    opened = cache(open_parent)
    notes: list[str] = []
    if given:
        translated = from_mergekit(path, data, opened)
        notes += translated.warnings
        data = translated.data
        if translated.files:
            notes.append(
                "chat_template: is not part of a recipe; merge the mergekit file to have it"
            )
    loaded = load_recipe_data(path, data, opened)
    if to == "darwin":
        return _text(data, notes)
    if loaded.match is not None:
        raise BadInputError(f"{path}: match_experts: mergekit pairs experts by their numbers alone")
    if loaded.harc is not None:
        raise BadInputError(f"{path}: router: mergekit calibrates no routers")
    places = _places(data)
    try:
        written = to_mergekit(loaded.recipe, places)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error
    back = from_mergekit("mergekit's spelling of it", written, opened)
    other = load_recipe_data("mergekit's spelling of it", back.data, opened)
    try:
        check_same(loaded.recipe, places, other.recipe, _places(back.data), opened)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error
    father, theirs = loaded.recipe.father, other.recipe.father
    if father.fingerprint != theirs.fingerprint:
        notes.append(
            f"config.json and tokenizer are those of base_model here, those of {father.name} in the recipe"
        )
    if loaded.recipe.seed:
        notes.append(f"seed {loaded.recipe.seed}: mergekit draws other masks (--random-seed)")
    if loaded.recipe.shard_bytes:
        notes.append(f"shard_bytes: mergekit-yaml --out-shard-size {loaded.recipe.shard_bytes}")
    return _text(written, notes)


def _places(data: dict[str, Any]) -> Places:
    places = {parent["name"]: parent["path"] for parent in data["parents"]}
    return places | ({"base": data["base"]} if data.get("base") is not None else {})


def _text(data: dict[str, Any], notes: list[str]) -> str:
    comments = "".join(f"# {' '.join(note.split())}\n" for note in notes)
    return comments + yaml.safe_dump(
        data, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100
    )


def check_same(
    recipe: Recipe,
    places: Places,
    other: Recipe,
    other_places: Places,
    opened: Callable[[str], Checkpoint],
) -> None:
    """Raise `BadInputError`, naming a rule of `recipe`, unless both recipes merge every tensor alike."""
    ours = _assignments(recipe, places, opened)
    rule_of = {
        name: next((n for n, r in enumerate(recipe.rules) if r.where.matches(tensor)), None)
        for name, (tensor, _) in ours.items()
    }
    for name, (tensor, _) in ours.items():
        if rule_of[name] is None and tensor.component in MERGED:
            raise BadInputError(f"rules: none is for {name}, but mergekit merges every tensor")
    theirs = _assignments(other, other_places, opened)
    for name, (_, way) in ours.items():
        if name not in theirs or theirs[name][1] != way:
            raise BadInputError(
                f"rules.{rule_of[name]}: {name} would be merged otherwise: mergekit's spelling cannot "
                "express it (outside all layers it takes the first value of a gradient)"
            )
    if len(theirs) != len(ours):
        raise BadInputError("layers: mergekit's child would have other tensors")


def _assignments(
    recipe: Recipe, places: Places, opened: Callable[[str], Checkpoint]
) -> dict[str, Any]:
    """Tensor -> (tensor, how it is merged), with the parents called by their locations."""
    maps = {
        name: ArchitectureMap(opened(place)) for name, place in places.items() if name != "base"
    }
    base = ArchitectureMap(opened(places["base"])) if recipe.base else None
    plan = Plan(maps, base, form_of(recipe))

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {places[name]: number for name, number in value.items()}
        return places.get(value, value) if isinstance(value, str) else value

    found = {}
    for name, way in plan.assign(recipe).items():
        values = {key: placed(value) for key, value in way.values.items()}
        base_place = places["base"] if way.uses_base(recipe.base is not None) else None
        seen = tuple(places[parent] for parent in way.parents)
        found[name] = (
            plan.child.by_name[name],
            (way.method.name, values, seen, base_place, way.post, way.post_values),
        )
    return found
