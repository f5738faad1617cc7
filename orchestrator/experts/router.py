"""The key `router` of a recipe file: what becomes of the routers of merged mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.mri.probe import load_calibration_sets
from workers.checkpoints import ArchitectureMap, Checkpoint
from workers.devices import is_device
from workers.diagnostics.calibration import CalibrationSet
from workers.errors import BadInputError
from workers.merging import Recipe, Rule, Selector

KEEP, AS_EXPERTS, HARC = "keep", "as_experts", "harc"
ROUTERS = Selector(components=("router",))

HELD_OUT_EVERY = 5
"""Each fifth prompt of a set is kept from the calibration, and compared on. Of a smaller set every prompt
does both."""

NUMBERS = {"shrink": (0.0, 1.0), "tolerance": (0.0, 1.0), "iterations": (1, 10**6)}


@dataclass(frozen=True)
class Harc:
    """A calibration of routers, as a recipe file asks for it."""

    sets: dict[str, tuple[CalibrationSet, ...]]
    """Donor -> the sets that its routing is kept on."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `workers.experts.calibration.CalibrationOrder`."""

    @property
    def texts(self) -> dict[str, tuple[str, ...]]:
        """Donor -> the prompts to calibrate on: those that ask for a capability."""
        return {
            name: tuple(text for one in sets for text in split_prompts(one)[0])
            for name, sets in self.sets.items()
        }

    @property
    def held_out(self) -> dict[str, tuple[str, ...]]:
        """Donor -> the prompts to compare on."""
        return {
            name: tuple(text for one in sets for text in split_prompts(one)[1])
            for name, sets in self.sets.items()
        }

    @property
    def summary(self) -> dict[str, Any]:
        """Donor -> set -> its prompts and SHA-256."""
        return {name: {s.name: s.summary for s in sets} for name, sets in self.sets.items()}

    @property
    def holds_out(self) -> bool:
        """Whether no prompt that is compared on was calibrated on."""
        used = {text for own in self.texts.values() for text in own}
        return not any(text in used for own in self.held_out.values() for text in own)


def split_prompts(calibration: CalibrationSet) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(to calibrate on, to compare on): the conditioned prompts of a set."""
    prompts = tuple(pair.conditioned for pair in calibration.pairs)
    if len(prompts) < HELD_OUT_EVERY:
        return prompts, prompts
    held_out = prompts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    rest = tuple(t for n, t in enumerate(prompts) if n % HELD_OUT_EVERY != HELD_OUT_EVERY - 1)
    return rest, held_out


def treat_routers(
    path: str,
    wanted: Any,
    recipe: Recipe,
    parents: dict[str, Checkpoint],
    base: Checkpoint | None,
) -> tuple[Recipe, Harc | None]:
    """The recipe with a first rule for routers, as the key `router` says, and the calibration it asks for.

    The rule of a calibration keeps the father's routers: from there it starts. Raises `BadInputError` naming
    the key.
    """
    where = f"{path}: router"
    father = recipe.father.name
    if not any(t.component == "router" for t in ArchitectureMap.of(parents[father]).tensors):
        raise BadInputError(
            f"{where}: {father} ({parents[father].location}) has no routers: leave the key out"
        )
    if wanted in (KEEP, AS_EXPERTS):
        return with_routers(recipe, wanted), None
    if not isinstance(wanted, dict) or wanted.keys() != {HARC}:
        raise BadInputError(
            f"{where}: {wanted!r} is none of keep, as_experts, {{harc: {{sets: [...]}}}}"
        )
    return with_routers(recipe, KEEP), _parse(f"{where}.harc", wanted[HARC], recipe, parents, base)


def with_routers(recipe: Recipe, way: str) -> Recipe:
    """The recipe with routers kept from the father, or merged as their experts, whatever its rules say."""
    rule = Rule(ROUTERS, "passthrough", {"source": recipe.father.name})
    if way == AS_EXPERTS:
        rule = Rule(ROUTERS, AS_EXPERTS)
    return replace(recipe, rules=(rule, *recipe.rules))


def _parse(
    where: str,
    data: Any,
    recipe: Recipe,
    parents: dict[str, Checkpoint],
    base: Checkpoint | None,
) -> Harc:
    if not isinstance(data, dict):
        raise BadInputError(f"{where}: needs the key sets, the prompts to calibrate on")
    known = {"sets", "donors", "dtype", "device", *NUMBERS}
    if data.keys() - known:
        raise BadInputError(
            f"{where}: unknown key {sorted(data.keys() - known, key=str)[0]!r}; allowed are "
            f"{', '.join(sorted(known))}"
        )
    if recipe.layers or recipe.vocabulary:
        raise BadInputError(f"{where}: is not for recipes with `layers` or `vocabulary`")
    sets = _sets(where, data, parents, base)
    options = {}
    for key, (least, most) in NUMBERS.items():
        if key in data:
            value, kind = data[key], type(least)
            good = type(value) is int or (kind is float and type(value) is float)
            if not good or not least <= value <= most:
                raise BadInputError(f"{where}.{key}: {value!r} is not from {least} to {most}")
            options[key] = kind(value)
    for key in ("dtype", "device"):
        if key in data:
            if not isinstance(data[key], str):
                raise BadInputError(f"{where}.{key}: {data[key]!r} is not a text")
            options[key] = data[key]
    if options.get("dtype", "auto") not in ("auto", "float32", "bfloat16", "float16"):
        raise BadInputError(f"{where}.dtype: {options['dtype']!r} is no dtype of a model")
    if not is_device(str(options.get("device", "cpu"))):
        raise BadInputError(f"{where}.device: {options['device']!r} is neither cpu nor cuda")
    return Harc(sets, options)


def _sets(
    where: str,
    data: dict[str, Any],
    parents: dict[str, Checkpoint],
    base: Checkpoint | None,
) -> dict[str, tuple[CalibrationSet, ...]]:
    """Donor -> its sets; in the recipe's order of parents, as files keep none."""
    given, donors = data.get("sets"), data.get("donors")
    if isinstance(given, dict):
        if donors is not None:
            raise BadInputError(f"{where}.donors: those that `sets` names are the donors")
        named = {name: _loaded(f"{where}.sets.{name}", own) for name, own in given.items()}
    else:
        shared = _loaded(f"{where}.sets", given)
        if donors is None:
            ancestor = base.fingerprint if base else None
            donors = [name for name, p in parents.items() if p.fingerprint != ancestor]
        if not isinstance(donors, list) or not all(isinstance(name, str) for name in donors):
            raise BadInputError(f"{where}.donors: {donors!r} is no list of parents")
        named = dict.fromkeys(donors, shared)
    for name in named:
        if name not in parents:
            raise BadInputError(f"{where}: {name!r} is none of the parents {list(parents)}")
    if not named:
        raise BadInputError(f"{where}: there are no donors, whose routing could be kept")
    return {name: named[name] for name in parents if name in named}


def _loaded(where: str, names: Any) -> tuple[CalibrationSet, ...]:
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise BadInputError(f"{where}: must be a list of calibration sets: names, or .jsonl files")
    chosen: Sequence[str] = names
    try:
        return load_calibration_sets(chosen)
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from error
