"""Values of mergekit's parameters: scalars, gradients and filters, made into ours.

mergekit looks a parameter up in the model's own entry, then the slice's, then the file's; in each, the
first entry counts whose filter is part of the tensor's name, and where none is, the search goes on one
level down. That is one list of cases. A gradient runs over the layers of a slice; tensors outside all
layers, the head included, take its first value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from orchestrator.mergekit.methods import PeerParameter
from workers.checkpoints import ArchitectureMap, LogicalTensor
from workers.errors import BadInputError

TRUE, FALSE = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")
EXPERT_NUMBER = re.compile(r"\bexperts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Entry:
    """A value, and the part of a tensor's name that it is for; None is for every tensor."""

    filter: str | None
    value: Any
    """A scalar, or a list: a gradient."""


@dataclass(frozen=True, slots=True)
class Span:
    """Layers of the child, first and last included; None are the tensors outside all layers."""

    layers: tuple[int, int] | None
    shifted: bool = False
    """Whether the model's own layers have other numbers than the child's."""

    def is_shifted(self, first: int) -> bool:
        return self.layers is not None and self.layers[0] != first


def parse_setting(setting: Any, parameter: PeerParameter, where: str) -> list[Entry]:
    """One parameter of one level. Raises `BadInputError` that begins with `where`."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list) or not any(isinstance(part, dict) for part in setting):
        return [Entry(None, _gradient(setting, parameter, where))]
    entries = []
    for number, part in enumerate(setting):
        if not isinstance(part, dict) or not {"value"} <= part.keys() <= {"value", "filter"}:
            raise BadInputError(
                f"{where}.{number}: {part!r} is not an entry with a value and perhaps a filter"
            )
        text = part.get("filter")
        if text is not None and not isinstance(text, str):
            raise BadInputError(f"{where}.{number}.filter: {text!r} is not a text")
        value = _gradient(part["value"], parameter, f"{where}.{number}.value")
        entries.append(Entry(None if text in ("", "*") else text, value))
    return entries


def is_gradient(entries: Iterable[Entry]) -> bool:
    return any(isinstance(entry.value, list) for entry in entries)


def first_that_count(levels: Iterable[list[Entry] | None]) -> list[Entry]:
    """The entries of all levels in the order in which they are asked, up to one for every tensor."""
    found: list[Entry] = []
    for level in levels:
        for entry in level or []:
            found.append(entry)
            if entry.filter is None:
                return found
    return found


def own_value(
    entries: list[Entry], parameter: PeerParameter, span: Span, father: ArchitectureMap | None
) -> Any:
    """The entries as a parameter of one of our rules, which is for `span`.

    `father` names the tensors that filters are for; it may be None where there are no filters.
    """
    cases: list[dict[str, Any]] = []
    for entry in entries:
        where: dict[str, Any] = {}
        if entry.filter is not None:
            if span.shifted and re.search(r"\d", entry.filter):
                raise BadInputError(
                    f"parameter {parameter.name!r}: the filter {entry.filter!r} holds a number, but "
                    "the model's layers have other numbers in the child: give the slice its own "
                    "parameters instead"
                )
            assert father is not None
            where = {"names": name_patterns(entry.filter, father)}
            if not where["names"]:
                continue
        cases.extend(_cases(where, _in_span(entry.value, span), parameter, span))
    if len(cases) == 1 and "where" not in cases[0]:
        return cases[0]["value"]
    return cases


def name_patterns(text: str, father: ArchitectureMap) -> list[str]:
    """Patterns that select the tensors whose names in mergekit hold `text`; empty if none does.

    mergekit knows the experts of a layer as one fused tensor, whatever their layout is.
    """
    pattern = f"*{escape(text)}*"
    wanted = {tensor.name for tensor in father.tensors if text in _peer_name(tensor, father)}
    selected = {
        tensor.name
        for tensor in father.tensors
        if fnmatchcase(tensor.name, pattern) or fnmatchcase(tensor.stored, pattern)
    }
    if wanted and wanted == selected:
        return [pattern]
    return sorted({re.sub(r"(?<=experts\.)\d+(?=\.)", "*", name) for name in wanted})


def _peer_name(tensor: LogicalTensor, father: ArchitectureMap) -> str:
    stored = tensor.stored
    if father.model_type == "mixtral":
        stored = stored.replace(".block_sparse_moe.", ".mlp.")  # as transformers has it in memory
    number = EXPERT_NUMBER.search(stored)
    if number is None:
        return stored  # that of all experts, too, where they are one tensor
    *_, role, _ = tensor.name.split(".")
    gated = tensor.name.replace("up_proj", "gate_proj") in father.by_name
    part = "gate_up_proj" if role in ("gate_proj", "up_proj") and gated else role
    return f"{stored[: number.start()]}experts.{part}"


def _in_span(value: Any, span: Span) -> Any:
    """A gradient over one layer is its last value; outside all layers it is its first."""
    if not isinstance(value, list):
        return value
    if span.layers is None:
        return value[0]
    return value[-1] if span.layers[0] == span.layers[1] else value


def _cases(
    where: dict[str, Any], value: Any, parameter: PeerParameter, span: Span
) -> list[dict[str, Any]]:
    if not isinstance(value, list) or parameter.kind != "flag":
        named = _named(value, parameter)
        return [{"where": where, "value": named} if where else {"value": named}]
    assert span.layers is not None  # Flags do not blend: each layer takes one of them.
    first, last = span.layers
    steps = [int((n / (last - first)) * (len(value) - 1)) for n in range(last - first + 1)]
    return [
        {
            "where": where | {"layers": [first + n, first + n]},
            "value": _named(value[step], parameter),
        }
        for n, step in enumerate(steps)
    ]


def _named(value: Any, parameter: PeerParameter) -> Any:
    if parameter.choices is None:
        return value
    return parameter.choices[1] if value else parameter.choices[0]


def default_value(parameter: PeerParameter) -> Any:
    """What mergekit takes when nothing is given, as ours."""
    return _named(parameter.default, parameter)


def _gradient(value: Any, parameter: PeerParameter, where: str) -> Any:
    if not isinstance(value, list):
        return _scalar(value, parameter, where)
    if not value:
        raise BadInputError(f"{where}: is an empty list: leave it out or give it a value")
    if parameter.kind == "whole":
        raise BadInputError(f"{where}: {value!r}: a gradient of whole numbers is not supported")
    return [_scalar(part, parameter, f"{where}.{n}") for n, part in enumerate(value)]


def _scalar(value: Any, parameter: PeerParameter, where: str) -> Any:
    """A number or flag as mergekit takes it: texts of numbers and flags count too."""
    if parameter.kind == "flag":
        text = str(value).strip().lower() if isinstance(value, bool | int | str) else ""
        if value in (0, 1) or text in TRUE + FALSE:
            return value == 1 or text in TRUE
        raise BadInputError(f"{where}: {value!r} is neither true nor false")
    try:
        number = float(value) if isinstance(value, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadInputError(f"{where}: {value!r} is not a number")
    if parameter.kind == "whole" and not number.is_integer():
        raise BadInputError(f"{where}: {value!r} is not a whole number")
    return number


def same_for_all(table: dict[str, Any], parents: Sequence[str]) -> Any:
    """A table per parent, or the value that all of them have."""
    values = [table[name] for name in parents]
    return values[0] if all(value == values[0] for value in values) else table
