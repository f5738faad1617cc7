"""Parameters that differ from tensor to tensor: over the depth of the model, or by cases.

Anywhere that a recipe takes a number it also takes

* a *gradient*: a list of numbers, spread evenly from the first to the last layer of those that the rule
  is for, with straight lines between them;
* *cases*: a list of `{where: SELECTOR, value: ...}`; the first case that matches the tensor counts, and
  one without `where` matches all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from workers.checkpoints import LogicalTensor
from workers.errors import BadInputError
from workers.merging.selector import Selector, parse_selector


@dataclass(frozen=True, slots=True)
class Gradient:
    """Numbers over the depth of the model."""

    points: tuple[float, ...]

    def at(self, depth: float) -> float:
        """Between the points, on straight lines; `depth` is from 0 to 1."""
        position = depth * (len(self.points) - 1)
        before = min(int(position), len(self.points) - 1)
        after = min(before + 1, len(self.points) - 1)
        share = position - before
        return self.points[before] * (1.0 - share) + self.points[after] * share


@dataclass(frozen=True, slots=True)
class Cases:
    """Values by selectors, the first that matches; None selects every tensor."""

    cases: tuple[tuple[Selector | None, Any], ...]


def parse_parameter(value: Any, where: str) -> Any:
    """A parameter from plain data: a number, a text, a `Gradient`, `Cases`, or a table of these.

    Raises `BadInputError` that begins with `where` for anything else.
    """
    if isinstance(value, dict):
        if any(isinstance(part, dict) for part in value.values()):
            raise BadInputError(f"{where}: {value!r}: the values of a table are no tables")
        return {name: parse_parameter(part, f"{where}.{name}") for name, part in value.items()}
    if isinstance(value, str | bool) or _is_number(value):
        return value
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return Gradient(tuple(value))
    if isinstance(value, list) and value and all(isinstance(case, dict) for case in value):
        return Cases(tuple(_parse_case(case, f"{where}.{n}") for n, case in enumerate(value)))
    raise BadInputError(
        f"{where}: {value!r} is neither a number nor a text nor a list of numbers (a gradient) or of "
        "cases, nor one of these per parent"
    )


def parse_parameters(parameters: dict[str, Any], where: str) -> dict[str, Any]:
    """All parameters of a step. Raises `BadInputError` naming the one that is none."""
    return {
        name: parse_parameter(value, f"{where}: parameter {name!r}")
        for name, value in parameters.items()
    }


def _parse_case(case: dict[str, Any], where: str) -> tuple[Selector | None, Any]:
    if not {"value"} <= case.keys() <= {"where", "value"}:
        raise BadInputError(f"{where}: a case has a value, and may have where")
    selector = parse_selector(case["where"]) if "where" in case else None
    return selector, parse_parameter(case["value"], f"{where}.value")


def varies(value: Any) -> bool:
    """Whether a parsed parameter, or any of a table of them, may differ between tensors."""
    if isinstance(value, dict):
        return any(map(varies, value.values()))
    return isinstance(value, Gradient | Cases)


def selectors_of(value: Any) -> Iterator[Selector]:
    """The selectors of all cases in a parsed parameter, or in a table of these."""
    if isinstance(value, dict):
        for part in value.values():
            yield from selectors_of(part)
    elif isinstance(value, Cases):
        for where, found in value.cases:
            if where is not None:
                yield where
            yield from selectors_of(found)


def value_at(value: Any, tensor: LogicalTensor, depth: float) -> Any:
    """The value that a parsed parameter has for one tensor; None if no case matches it."""
    if isinstance(value, dict):
        return {name: value_at(part, tensor, depth) for name, part in value.items()}
    if isinstance(value, Gradient):
        return value.at(depth)
    if isinstance(value, Cases):
        for where, found in value.cases:
            if where is None or where.matches(tensor):
                return value_at(found, tensor, depth)
        return None
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
