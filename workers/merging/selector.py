"""Selectors: which tensors a rule, or a case of a parameter, is for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from workers.checkpoints import COMPONENTS, LogicalTensor
from workers.errors import BadInputError

KEYS = ("components", "layers", "experts", "places", "names")

Spans = tuple[tuple[int, int], ...]
"""Numbers as runs of neighbours: first and last of each, both included."""

WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Selector:
    """Which tensors a rule is for. What is left out does not restrict."""

    components: tuple[str, ...] = ()
    layers: tuple[int, int] | None = None
    """First and last layer, both included. Tensors outside all layers never match a layer range."""
    experts: tuple[int, int] | None = None
    """First and last routed expert, both included; other tensors never match."""
    names: tuple[str, ...] = ()
    """Shell-style patterns (`*`, `?`, `[...]`); one must match the canonical or the stored name."""
    places: tuple[tuple[int, Spans], ...] = ()
    """Layer -> its routed experts, the layers ascending. A search decides expert by expert, and a model has
    ten thousands of them: their tensors' names would be megabytes for each candidate."""

    @property
    def is_by_name(self) -> bool:
        """Whether it names its tensors one by one, without a pattern: they can be looked up."""
        return bool(self.names) and not any(map(WILDCARD.search, self.names))

    def matches(self, tensor: LogicalTensor) -> bool:
        names = (tensor.name, tensor.stored)
        return self.matches_place(tensor) and (
            not self.names
            or any(fnmatchcase(name, pattern) for pattern in self.names for name in names)
        )

    def matches_place(self, tensor: LogicalTensor) -> bool:
        """Whether it selects the tensor, whatever its name."""
        if self.components and tensor.component not in self.components:
            return False
        if not _is_within(tensor.layer, self.layers) or not _is_within(tensor.expert, self.experts):
            return False
        return not self.places or any(
            layer == tensor.layer and any(_is_within(tensor.expert, span) for span in spans)
            for layer, spans in self.places
        )

    @property
    def is_by_place(self) -> bool:
        """Whether it selects experts alone: their tensors can be looked up by layer and expert."""
        return bool(self.places) or self.experts is not None

    def each_place(self, layers: int, experts: int) -> Iterator[tuple[int, int]]:
        """(layer, expert) where it may select something of a model of so many layers and experts."""
        places = self.places or _in_all(layers, self.experts)
        for layer, spans in places:
            for first, last in spans if _is_within(layer, self.layers) else ():
                for expert in range(max(first, 0), min(last + 1, experts)):
                    yield layer, expert

    def check_experts(self, layers: int, experts: int, location: str) -> None:
        """Raise `BadInputError` for a routed expert that a model of so many layers and experts has not.

        What was meant by it is not known, so it is not left out silently.
        """
        spans = [("experts", self.experts)] if self.experts is not None else []
        for layer, of_layer in self.places:
            if layer >= layers:
                raise BadInputError(
                    f"recipe: where.places.{layer}: {location} has {layers} layers, from 0 to {layers - 1}"
                )
            spans += [(f"places.{layer}", span) for span in of_layer]
        for key, (first, last) in spans:
            if not 0 <= first <= last < experts:
                there = f"experts 0 to {experts - 1}" if experts else "no routed experts"
                raise BadInputError(
                    f"recipe: where.{key}: [{first}, {last}] are not experts of {location}: its layers "
                    f"have {there}"
                )

    def __str__(self) -> str:
        return str(self.to_dict()).replace("'", "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of `parse_selector`."""
        data: dict[str, Any] = {}
        if self.components:
            data["components"] = list(self.components)
        if self.layers is not None:
            data["layers"] = list(self.layers)
        if self.experts is not None:
            data["experts"] = list(self.experts)
        if self.places:
            data["places"] = {str(layer): list(map(list, spans)) for layer, spans in self.places}
        if self.names:
            data["names"] = list(self.names)
        return data


def parse_selector(data: Any) -> Selector:
    """A selector from plain data: `{components: [...], layers: [first, last], experts: [first, last],
    places: {layer: [[first, last], ...]}, names: [...]}`, each of them optional.

    Raises `BadInputError` naming the key for anything else, an empty list included: it selects nothing, and
    what is left out does not restrict.
    """
    typed(data, dict, "where")
    unknown = set(data) - set(KEYS)
    if unknown:
        raise BadInputError(
            f"where: unknown key {sorted(unknown, key=str)[0]!r}; allowed are {', '.join(KEYS)}"
        )
    components = _list_or_none(data, "components")
    for component in components:
        if component not in COMPONENTS:
            raise BadInputError(
                f"where.components: {component!r} is none of {', '.join(COMPONENTS)}"
            )
    names = _list_or_none(data, "names")
    for name in names:
        typed(name, str, "where.names")
    return Selector(
        tuple(components),
        _span(data, "layers"),
        _span(data, "experts"),
        tuple(names),
        _places(data.get("places")),
    )


def _places(data: Any) -> tuple[tuple[int, Spans], ...]:
    """Layers in ascending order, each with its spans as they are given."""
    if data is None:
        return ()
    places: dict[int, Spans] = {}
    for key, spans in typed(data, dict, "where.places").items():
        where = f"where.places.{key}"
        # JSON knows no numbers as keys, YAML does.
        layer = int(key) if isinstance(key, str) and re.fullmatch("[0-9]{1,6}", key) else key
        if type(layer) is not int or layer < 0 or layer in places:
            raise BadInputError(f"{where}: {key!r} is not a layer's number, or stands there twice")
        places[layer] = tuple(_as_span(span, where) for span in typed(spans, list, where))
        if not places[layer]:
            raise BadInputError(f"{where}: names no expert")
    if not places:
        raise BadInputError("where.places: names no layer")
    return tuple(sorted(places.items()))


def _list_or_none(data: dict[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    if value is None:
        return []
    found: list[Any] = typed(value, list, f"where.{key}")
    if not found:
        raise BadInputError(f"where.{key}: is an empty list: leave it out, or name what is meant")
    return found


def _span(data: dict[str, Any], key: str) -> tuple[int, int] | None:
    span = data.get(key)
    if span is None:
        return None
    return _as_span(span, f"where.{key}")


def _as_span(span: Any, where: str) -> tuple[int, int]:
    typed(span, list, where)
    if len(span) != 2 or not all(type(end) is int for end in span):
        raise BadInputError(f"{where}: {span!r} is not [first, last]")
    return span[0], span[1]


def _in_all(layers: int, span: tuple[int, int] | None) -> tuple[tuple[int, Spans], ...]:
    return tuple((layer, (span,)) for layer in range(layers)) if span else ()


def _is_within(number: int | None, span: tuple[int, int] | None) -> bool:
    return span is None or (number is not None and span[0] <= number <= span[1])


def typed(value: Any, kind: type, where: str) -> Any:
    """`value`, which must be of this very type: True is no number, a text no list."""
    if type(value) is not kind:
        raise BadInputError(f"{where}: {value!r} is not a {kind.__name__}")
    return value
