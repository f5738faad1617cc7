"""Recipes in mergekit's spelling, where it can express them.

The writer proposes a file: rules without layers become filter lists, rules for layers become slices.
Whether that merges every tensor as the recipe does is seen by reading it back (`recipe_spelling`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from orchestrator.mergekit.methods import PEER_METHODS, REQUIRED, PeerMethod, PeerParameter
from orchestrator.mergekit.models import DTYPES
from workers.checkpoints import COMPONENTS
from workers.errors import BadInputError
from workers.merging import CARRIED, Recipe, Rule, get_method
from workers.merging.selector import Selector, parse_selector

MERGED = tuple(component for component in COMPONENTS if component not in CARRIED)

Places = dict[str, str]
"""Parent (and "base") -> location."""


def to_mergekit(recipe: Recipe, places: Places) -> dict[str, Any]:
    """A mergekit configuration that should do what `recipe` does.

    Raises `BadInputError` naming the rule that has no counterpart.
    """
    return _Writer(recipe, places).configuration()


class _Writer:
    def __init__(self, recipe: Recipe, places: Places) -> None:
        self.recipe = recipe
        self.places = places
        if not recipe.rules:
            raise BadInputError("rules: there are none: mergekit has no file that merges nothing")
        if recipe.experts:
            raise BadInputError("experts: mergekit pairs experts by their numbers alone")
        self.method = get_method(recipe.rules[0].method)
        self.name, self.peer = self._peer()

    def _peer(self) -> tuple[str, PeerMethod]:
        for number, rule in enumerate(self.recipe.rules):
            if rule.method != self.method.name:
                raise BadInputError(
                    f"rules.{number}: method {rule.method}: mergekit's files have one method for all "
                    f"tensors, and rules.0 is {self.method.name}"
                )
            if rule.post is not None:
                raise BadInputError(f"rules.{number}.post: mergekit has no post-steps")
        for name, peer in PEER_METHODS.items():
            if peer.own == self.method.name:
                return name, peer
        raise BadInputError(f"rules.0: mergekit has no method {self.method.name}")

    def configuration(self) -> dict[str, Any]:
        layered = [(n, r) for n, r in enumerate(self.recipe.rules) if r.where.layers is not None]
        whole = [(n, r) for n, r in enumerate(self.recipe.rules) if r.where.layers is None]
        for number, rule in layered:
            if rule.where != Selector(rule.where.components, rule.where.layers) or not (
                set(MERGED) <= set(rule.where.components or MERGED)
            ):
                raise BadInputError(
                    f"rules.{number}.where: mergekit has no rules for some tensors of some layers"
                )
        data: dict[str, Any] = {"merge_method": self.name}
        if self._base_model() is not None:
            data["base_model"] = self._base_model()
        if not self.recipe.layers and len(layered) <= 1:
            data |= self._models(layered or whole)
        else:
            data["slices"] = self._slices(layered, whole)
        return data | self._form()

    def _base_model(self) -> str | None:
        """The base, or the model that it stands for in mergekit."""
        if self.peer.base == "ignored":
            seen = [set(rule.parents or self._parents) for rule in self.recipe.rules]
            father = self.recipe.father.name
            merged = self.method.name != "passthrough" and all(father in names for names in seen)
            # One that is not among the models would be merged, too; in slices it would not.
            return self.places[father] if merged or self.recipe.layers else None
        if self.method.uses_base != "never":
            return self.places.get("base") if self.recipe.base else None
        return self.places[(self.recipe.rules[0].parents or self._parents)[0]]

    @property
    def _parents(self) -> tuple[str, ...]:
        return tuple(parent.name for parent in self.recipe.parents)

    def _seen(self, number: int, rule: Rule) -> tuple[str, ...]:
        if self.method.name != "passthrough":
            return rule.parents or self._parents
        source = rule.parameters["source"]
        if not isinstance(source, str):
            raise BadInputError(f"rules.{number}: mergekit has no source that differs by tensor")
        return (source,)

    def _models(self, rules: list[tuple[int, Rule]]) -> dict[str, Any]:
        """All layers of all models: what differs between rules is a list of filters."""
        seen = self._seen(*rules[0])
        for number, rule in rules:
            if self._seen(number, rule) != seen:
                raise BadInputError(f"rules.{number}: mergekit merges the same models everywhere")
        shared, own = self._parameters(rules, seen)
        models: list[dict[str, Any]] = [
            {"model": self.places[name]} | ({"parameters": own[name]} if own[name] else {})
            for name in seen
        ]
        return {"models": models} | ({"parameters": shared} if shared else {})

    def _slices(
        self, layered: list[tuple[int, Rule]], whole: list[tuple[int, Rule]]
    ) -> list[dict[str, Any]]:
        spans = [rule.where.layers for _, rule in layered]
        rules = [[(n, r)] for n, r in layered]
        if not layered:
            count = 0
            for part in self.recipe.layers:
                first, last = next(iter(part.values()))
                spans.append((count, count + last - first))
                rules.append(whole)
                count += last - first + 1
        slices = []
        expected = 0
        for index, (span, own_rules) in enumerate(zip(spans, rules, strict=True)):
            number, rule = own_rules[0]
            assert span is not None
            if span[0] != expected:
                raise BadInputError(
                    f"rules.{number}.where.layers: mergekit's slices follow one another: this one "
                    f"would begin at layer {expected}"
                )
            expected = span[1] + 1
            part = self._layers_of(span, index)
            seen = tuple(name for name in self._seen(number, rule) if part is None or name in part)
            shared, own = self._parameters(own_rules, seen)
            sources = []
            for name in [*seen, *self._extra(seen)]:
                if part is None:
                    first, last = span
                else:
                    first, last = part.get(name) or next(iter(part.values()))
                source: dict[str, Any] = {
                    "model": self.places[name],
                    "layer_range": [first, last + 1],
                }
                sources.append(source | ({"parameters": own[name]} if own.get(name) else {}))
            slices.append({"sources": sources} | ({"parameters": shared} if shared else {}))
        return slices

    def _extra(self, seen: tuple[str, ...]) -> list[str]:
        """The base, which a slice must list, unless it is there already."""
        if self.recipe.base is None or self.method.uses_base == "never":
            return []
        return [] if self.places["base"] in [self.places[name] for name in seen] else ["base"]

    def _layers_of(self, span: tuple[int, int], index: int) -> Any:
        """The parents' layers in a slice of the child; None if they are the child's own."""
        if not self.recipe.layers:
            return None
        starts, first = [], 0
        for part in self.recipe.layers:
            low, high = next(iter(part.values()))
            starts.append((first, first + high - low))
            first += high - low + 1
        if span not in starts:
            raise BadInputError(
                f"rules.{index}.where.layers: in mergekit these must be the layers of one slice"
            )
        return self.recipe.layers[starts.index(span)]

    def _parameters(
        self, rules: list[tuple[int, Rule]], seen: tuple[str, ...]
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Parameters that hold for all models, and those of each."""
        shared: dict[str, Any] = {}
        own: dict[str, dict[str, Any]] = {name: {} for name in seen}
        for number, rule in rules:
            for name in rule.parameters:
                known = any(parameter.own == name for parameter in self.peer.parameters)
                if not known and name != "source":
                    raise BadInputError(
                        f"rules.{number}.parameters.{name}: mergekit's {self.name} has no such one"
                    )
        for parameter in self.peer.parameters:
            if parameter.own is None:
                continue
            tables = [rule.parameters.get(parameter.own) for _, rule in rules]
            if parameter.scope == "shared" or not any(isinstance(t, dict) for t in tables):
                value = self._value(rules, parameter, None)
                if value is not None:
                    shared[parameter.name] = value
                continue
            for name in seen:
                value = self._value(rules, parameter, name)
                if value is not None:
                    own[name][parameter.name] = value
        return shared, own

    def _value(
        self, rules: list[tuple[int, Rule]], parameter: PeerParameter, parent: str | None
    ) -> Any:
        """A parameter of all rules as one setting; None where mergekit's default does."""
        declared = self.method.parameter(str(parameter.own))
        default = declared.default if declared else None
        entries: list[dict[str, Any]] = []
        for number, rule in rules:
            where = f"rules.{number}"
            value = rule.parameters.get(str(parameter.own), default)
            if isinstance(value, dict):
                value = value.get(str(parent), default)
            if value is None:
                continue  # It is missing, which was refused, or no case needs it.
            filters = _filters(rule.where, f"{where}.where")
            cases = value if isinstance(value, list) and isinstance(value[0], dict) else None
            if cases is None:
                plain = _plain(value, parameter, where)
                entries += [_entry(text, plain) for text in filters]
                continue
            if filters != [None]:
                raise BadInputError(
                    f"{where}.parameters.{parameter.own}: mergekit has no cases in a rule for some tensors"
                )
            for case in cases:
                selector = parse_selector(case["where"]) if "where" in case else Selector()
                plain = _plain(case["value"], parameter, where)
                texts = _filters(selector, f"{where}.parameters.{parameter.own}")
                entries += [_entry(text, plain) for text in texts]
        if not entries:
            return None
        first = entries[0]["value"]
        if all(entry["value"] == first for entry in entries) and "filter" not in entries[-1]:
            same = parameter.default is not REQUIRED and first == parameter.default
            return None if same else first
        return entries

    def _form(self) -> dict[str, Any]:
        names = {own: name for name, own in DTYPES.items()}
        data: dict[str, Any] = {}
        if self.recipe.dtype is not None:
            # Our arithmetic is fp32.
            data = {"dtype": "float32", "out_dtype": names[self.recipe.dtype]}
        vocabulary = self.recipe.vocabulary
        if vocabulary is not None:
            data["tokenizer_source"] = self.places.get(vocabulary, vocabulary)
        return data


def _entry(text: str | None, value: Any) -> dict[str, Any]:
    return {"value": value} if text is None else {"filter": text, "value": value}


def _filters(where: Selector, place: str) -> list[str | None]:
    """The substring filters that select the same tensors; [None] for all."""
    if where.names and where == Selector(where.components, names=where.names):
        texts = [_literal(pattern) for pattern in where.names]
        if None not in texts and where.components in ((), MERGED):
            return texts
    elif replace(where, layers=None) in (Selector(), Selector(MERGED)):
        return [None]
    raise BadInputError(
        f"{place}: {where.to_dict()} is no filter that mergekit has: only names of the form *TEXT*"
    )


def _literal(pattern: str) -> str | None:
    """TEXT of the pattern *TEXT*; None for patterns of another form."""
    if len(pattern) < 3 or pattern[0] != "*" or pattern[-1] != "*":
        return None
    text = re.sub(r"\[([*?[])\]", lambda found: f"\0{found[1]}", pattern[1:-1])
    if re.search(r"(?<!\0)[*?[]", text):
        return None
    return text.replace("\0", "")


def _plain(value: Any, parameter: PeerParameter, where: str) -> Any:
    """A number, text or gradient of ours as mergekit spells it."""
    if isinstance(value, list):
        return [_plain(part, parameter, where) for part in value]
    if parameter.choices is not None:
        if value not in parameter.choices:
            raise BadInputError(
                f"{where}.parameters.{parameter.own}: {value!r}: mergekit knows "
                f"{' and '.join(parameter.choices)} only"
            )
        return parameter.choices.index(value) == 1
    if parameter.kind == "flag":
        return bool(value)
    return int(value) if parameter.kind == "whole" else value
