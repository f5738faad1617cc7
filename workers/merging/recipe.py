"""The recipe: the complete, immutable description of one merge, and its identity.

A recipe names its parents by fingerprint, not by place, and lists rules. Each tensor takes the first
rule whose selector matches it; one that no rule matches is carried over from the father (the first
parent) bit by bit. The same recipe gives the same bytes anywhere, so its id (SHA-256 of its canonical
JSON) names the child.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from workers.checkpoints import COMPONENTS
from workers.errors import BadInputError
from workers.merging.expert_order import ExpertOrders, orders_to_dict, parse_orders
from workers.merging.parameters import parse_parameters
from workers.merging.selector import Selector, parse_selector, typed

FORMAT = 1

ParameterValue = Any
"""Plain data: a number, a text, a gradient, cases (see `parameters`), or a table of these per parent."""


@dataclass(frozen=True, slots=True)
class ParentReference:
    """A parent as a recipe knows it: the name it has in the recipe, and its content."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class PostStep:
    """A method that refines what the rule's method has merged."""

    method: str
    parameters: dict[str, ParameterValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A method and its parameters for the tensors that `where` selects."""

    where: Selector
    method: str
    parameters: dict[str, ParameterValue] = field(default_factory=dict)
    post: PostStep | None = None
    parents: tuple[str, ...] = ()
    """Those that the method sees, in this order; none named: all of them, in the recipe's order."""


LayerSlice = dict[str, tuple[int, int]]
"""Parent -> first and last of its layers that are merged with one another; all spans of one length.

The base's span is called "base"; left out, it is that of the first parent."""

OUTPUT_DTYPES = ("F32", "BF16", "F16")
OTHER_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Recipe:
    """Parents (the father first), an optional base, rules, and the seed of random masks.

    What follows changes the child's form; left out, that is the father's.
    """

    parents: tuple[ParentReference, ...]
    rules: tuple[Rule, ...]
    base: ParentReference | None = None
    seed: int = 0
    layers: tuple[LayerSlice, ...] = ()
    """The child's layers as slices stacked on one another, the lowest first."""
    dtype: str | None = None
    """What the child's weights are stored in, but for those that the father keeps in another dtype than
    most of its own."""
    shard_bytes: int | None = None
    """A new file begins where a file of the child would become larger."""
    vocabulary: str | None = None
    """Whose tokens the child knows: "union", "base" or a parent's name. Needed if they differ."""
    experts: ExpertOrders = field(default_factory=dict)
    """Parent (or "base") -> layer -> for each place e of the child's layer the number of that parent's expert
    that belongs there, with its row of the router. Where nothing is said, expert e."""

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
        data = {
            "format": FORMAT,
            "parents": [_reference_to_dict(parent) for parent in self.parents],
            "base": _reference_to_dict(self.base) if self.base else None,
            "seed": self.seed,
            "rules": [_rule_to_dict(rule) for rule in self.rules],
        }
        form = {
            "layers": [{name: list(span) for name, span in part.items()} for part in self.layers],
            "dtype": self.dtype,
            "shard_bytes": self.shard_bytes,
            "vocabulary": self.vocabulary,
            "experts": orders_to_dict(self.experts),
        }
        return data | {key: value for key, value in form.items() if value}

    @staticmethod
    def from_dict(data: Any) -> Recipe:
        """Read what `to_dict` wrote. Raises `BadInputError` for anything else."""
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise BadInputError(
                f"recipe: format {data.get('format')!r} is not {FORMAT}, the one this version reads"
            )
        form: dict[str, Any] = {
            "layers": [],
            "dtype": None,
            "shard_bytes": None,
            "vocabulary": None,
            "experts": {},
        }
        if isinstance(data, dict):
            data = form | data
        table = _table(data, "recipe", "format", "parents", "base", "seed", "rules", *form)
        parents = tuple(map(_parse_reference, typed(table["parents"], list, "recipe: parents")))
        names = [parent.name for parent in parents]
        if not names or len(set(names)) < len(names):
            raise BadInputError(f"recipe: parents: {names} must be one or more different names")
        if "base" in names or "union" in names:
            raise BadInputError("recipe: parents: no parent may be called base or union")
        return Recipe(
            parents,
            rules=tuple(
                _parse_rule(rule, names) for rule in typed(table["rules"], list, "recipe: rules")
            ),
            base=None if table["base"] is None else _parse_reference(table["base"]),
            seed=typed(table["seed"], int, "recipe: seed"),
            layers=tuple(
                parse_slice(part, names) for part in typed(table["layers"], list, "layers")
            ),
            experts=parse_orders(table["experts"], names, table["base"] is not None),
            **parse_form(table, names),
        )


def parse_slice(data: Any, parents: list[str]) -> LayerSlice:
    """A slice of layers from plain data, `{parent: [first, last], ...}`; `base` may be among them."""
    lengths = set()
    for name, span in typed(data, dict, "layers").items():
        if name not in (*parents, "base"):
            raise BadInputError(f"layers: {name!r} is none of the parents {parents}")
        good = (
            isinstance(span, list | tuple) and len(span) == 2 and all(type(n) is int for n in span)
        )
        if not good or not 0 <= span[0] <= span[1]:
            raise BadInputError(f"layers: {name}: {span!r} is not [first, last]")
        lengths.add(span[1] - span[0])
    if len(lengths) != 1:
        raise BadInputError(f"layers: {data!r}: the spans of a slice must be of one length")
    if set(data) == {"base"}:
        raise BadInputError(f"layers: {data!r}: a slice needs a parent besides the base")
    # In the recipe's order, as the first parent lends its layout, and files keep no order of keys.
    ordered = [name for name in (*parents, "base") if name in data]
    return {name: (data[name][0], data[name][1]) for name in ordered}


def parse_form(data: dict[str, Any], parents: list[str]) -> dict[str, Any]:
    """The keys dtype, shard_bytes and vocabulary, each checked and None if it is not given."""
    dtype, shard_bytes = data.get("dtype"), data.get("shard_bytes")
    dtype = OTHER_DTYPE_NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise BadInputError(f"dtype: {dtype!r} is none of {', '.join(OUTPUT_DTYPES)}")
    if shard_bytes is not None and (type(shard_bytes) is not int or shard_bytes <= 0):
        raise BadInputError(f"shard_bytes: {shard_bytes!r} is not a positive whole number")
    vocabulary = data.get("vocabulary")
    if vocabulary is not None and vocabulary not in ("union", "base", *parents):
        raise BadInputError(
            f"vocabulary: {vocabulary!r} is neither union nor base nor one of the parents {parents}"
        )
    return {"dtype": dtype, "shard_bytes": shard_bytes, "vocabulary": vocabulary}


def passthrough_recipe(parents: tuple[ParentReference, ...], source: str) -> Recipe:
    """The recipe whose child is the parent `source` itself, in the father's layout.

    What only the father has (a vision tower, tensors of no known role) stays the father's.
    """
    everything = Selector(components=tuple(c for c in COMPONENTS if c not in CARRIED))
    return Recipe(parents, (Rule(everything, "passthrough", {"source": source}),))


CARRIED = ("vision", "mtp", "unknown")
"""Components that are the father's unless a recipe says otherwise."""


def _parse_reference(data: Any) -> ParentReference:
    table = _table(data, "recipe: parent", "name", "fingerprint")
    return ParentReference(*(typed(table[key], str, key) for key in ("name", "fingerprint")))


def parse_rule_parents(data: Any, parents: list[str]) -> tuple[str, ...]:
    """The parents that a rule's method sees, from plain data: a list of different names."""
    names = typed(data, list, "parents")
    for name in names:
        if name not in parents or names.count(name) > 1:
            raise BadInputError(f"parents: {names!r} must be different ones of {parents}")
    return tuple(names)


def _parse_rule(data: Any, names: list[str]) -> Rule:
    if isinstance(data, dict):
        data = {"post": None, "parents": []} | data
    table = _table(data, "recipe: rule", "where", "method", "parameters", "post", "parents")
    post = None
    if table["post"] is not None:
        step = _table(table["post"], "recipe: post", "method", "parameters")
        post = PostStep(typed(step["method"], str, "recipe: post: method"), _parameters(step))
    method = typed(table["method"], str, "recipe: method")
    parents = parse_rule_parents(table["parents"], names)
    return Rule(parse_selector(table["where"]), method, _parameters(table), post, parents)


def _parameters(table: dict[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = typed(table["parameters"], dict, "recipe: parameters")
    parse_parameters(parameters, "recipe")
    return parameters


def _table(data: Any, where: str, *keys: str) -> dict[str, Any]:
    """`data`, which must be a table of exactly these keys."""
    table: dict[str, Any] = typed(data, dict, where)
    for key in [key for key in keys if key not in table] + [
        key for key in table if key not in keys
    ]:
        problem = "lacks the key" if key in keys else "has the unknown key"
        raise BadInputError(f"{where}: {problem} {key!r}")
    return table


def _reference_to_dict(reference: ParentReference) -> dict[str, str]:
    return {"name": reference.name, "fingerprint": reference.fingerprint}


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    data = {"where": rule.where.to_dict(), "method": rule.method, "parameters": rule.parameters}
    if rule.post is not None:
        data["post"] = {"method": rule.post.method, "parameters": rule.post.parameters}
    if rule.parents:
        data["parents"] = list(rule.parents)
    return data
