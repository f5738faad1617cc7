"""The recipe: the complete, immutable description of one merge, and its identity.

A recipe names its parents by fingerprint, not by place, and lists rules. Each tensor takes the first
rule whose selector matches it; one that no rule matches is carried over from the father (the first
parent) bit by bit. The same recipe gives the same bytes anywhere, so its id (SHA-256 of its canonical
JSON) names the child.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from workers.checkpoints import COMPONENTS, LogicalTensor
from workers.errors import BadInputError

FORMAT = 1

ParameterValue = float | str | dict[str, float]
"""A number for all parents, the name of a parent, or a number per parent."""


@dataclass(frozen=True, slots=True)
class ParentReference:
    """A parent as a recipe knows it: the name it has in the recipe, and its content."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Selector:
    """Which tensors a rule is for. What is left out does not restrict."""

    components: tuple[str, ...] = ()
    layers: tuple[int, int] | None = None
    """First and last layer, both included. Tensors outside all layers never match a layer range."""
    names: tuple[str, ...] = ()
    """Shell-style patterns (`*`, `?`, `[...]`) on the canonical name; one must match."""

    def matches(self, tensor: LogicalTensor) -> bool:
        if self.components and tensor.component not in self.components:
            return False
        if self.layers is not None and (
            tensor.layer is None or not self.layers[0] <= tensor.layer <= self.layers[1]
        ):
            return False
        return not self.names or any(fnmatchcase(tensor.name, pattern) for pattern in self.names)


@dataclass(frozen=True)
class Rule:
    """A method and its parameters for the tensors that `where` selects."""

    where: Selector
    method: str
    parameters: dict[str, ParameterValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Parents (the father first), an optional base, rules, and the seed of random masks."""

    parents: tuple[ParentReference, ...]
    rules: tuple[Rule, ...]
    base: ParentReference | None = None
    seed: int = 0

    @property
    def father(self) -> ParentReference:
        return self.parents[0]

    @cached_property
    def canonical_json(self) -> str:
        return json.dumps(
            self.to_dict(),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=False,
        )

    @cached_property
    def id(self) -> str:
        return hashlib.sha256(self.canonical_json.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of `from_dict`."""
        return {
            "format": FORMAT,
            "parents": [_reference_to_dict(parent) for parent in self.parents],
            "base": _reference_to_dict(self.base) if self.base else None,
            "seed": self.seed,
            "rules": [
                {
                    "where": _selector_to_dict(rule.where),
                    "method": rule.method,
                    "parameters": rule.parameters,
                }
                for rule in self.rules
            ],
        }

    @staticmethod
    def from_dict(data: Any) -> Recipe:
        """Read what `to_dict` wrote. Raises `BadInputError` for anything else."""
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise BadInputError(
                f"recipe: format {data.get('format')!r} is not {FORMAT}, the one this version reads"
            )
        table = _table(data, "recipe", "format", "parents", "base", "seed", "rules")
        parents = tuple(map(_parse_reference, _typed(table["parents"], list, "recipe: parents")))
        names = [parent.name for parent in parents]
        if not names or len(set(names)) < len(names):
            raise BadInputError(f"recipe: parents: {names} must be one or more different names")
        return Recipe(
            parents,
            rules=tuple(map(_parse_rule, _typed(table["rules"], list, "recipe: rules"))),
            base=None if table["base"] is None else _parse_reference(table["base"]),
            seed=_typed(table["seed"], int, "recipe: seed"),
        )


def passthrough_recipe(parents: tuple[ParentReference, ...], source: str) -> Recipe:
    """The recipe whose child is the parent `source` itself, in the father's layout.

    What only the father has (a vision tower, tensors of no known role) stays the father's.
    """
    everything = Selector(components=tuple(c for c in COMPONENTS if c not in CARRIED))
    return Recipe(parents, (Rule(everything, "passthrough", {"source": source}),))


CARRIED = ("vision", "mtp", "unknown")
"""Components that are the father's unless a recipe says otherwise."""


def parse_selector(data: Any) -> Selector:
    """A selector from plain data: `{components: [...], layers: [first, last], names: [...]}`."""
    _typed(data, dict, "where")
    unknown = set(data) - {"components", "layers", "names"}
    if unknown:
        raise BadInputError(
            f"where: unknown key {sorted(unknown)[0]!r}; allowed are components, layers, names"
        )
    components = _list_or_none(data, "components")
    for component in components:
        if component not in COMPONENTS:
            raise BadInputError(
                f"where.components: {component!r} is none of {', '.join(COMPONENTS)}"
            )
    layers = data.get("layers")
    if layers is not None:
        _typed(layers, list, "where.layers")
        if len(layers) != 2 or not all(type(layer) is int for layer in layers):
            raise BadInputError(f"where.layers: {layers!r} is not [first, last]")
        layers = (layers[0], layers[1])
    names = _list_or_none(data, "names")
    for name in names:
        _typed(name, str, "where.names")
    return Selector(tuple(components), layers, tuple(names))


def _list_or_none(data: dict[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    found: list[Any] = _typed([] if value is None else value, list, f"where.{key}")
    return found


def _parse_reference(data: Any) -> ParentReference:
    table = _table(data, "recipe: parent", "name", "fingerprint")
    return ParentReference(*(_typed(table[key], str, key) for key in ("name", "fingerprint")))


def _parse_rule(data: Any) -> Rule:
    table = _table(data, "recipe: rule", "where", "method", "parameters")
    parameters = _typed(table["parameters"], dict, "recipe: parameters")
    for name, value in parameters.items():
        numbers = value.values() if isinstance(value, dict) else [value]
        if not isinstance(value, str) and not all(map(_is_number, numbers)):
            raise BadInputError(
                f"recipe: parameter {name!r}: {value!r} is neither a number nor a parent's name nor "
                "a number per parent"
            )
    return Rule(
        parse_selector(table["where"]), _typed(table["method"], str, "recipe: method"), parameters
    )


def _table(data: Any, where: str, *keys: str) -> dict[str, Any]:
    """`data`, which must be a table of exactly these keys."""
    table: dict[str, Any] = _typed(data, dict, where)
    for key in [key for key in keys if key not in table] + [
        key for key in table if key not in keys
    ]:
        problem = "lacks the key" if key in keys else "has the unknown key"
        raise BadInputError(f"{where}: {problem} {key!r}")
    return table


def _typed(value: Any, kind: type, where: str) -> Any:
    """`value`, which must be of this very type: True is no number, a text no list."""
    if type(value) is not kind:
        raise BadInputError(f"{where}: {value!r} is not a {kind.__name__}")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _reference_to_dict(reference: ParentReference) -> dict[str, str]:
    return {"name": reference.name, "fingerprint": reference.fingerprint}


def _selector_to_dict(selector: Selector) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if selector.components:
        data["components"] = list(selector.components)
    if selector.layers is not None:
        data["layers"] = list(selector.layers)
    if selector.names:
        data["names"] = list(selector.names)
    return data
