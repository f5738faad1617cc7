"""JSON documents of a store: what was read is plain data of a stated shape, or is refused by name.

A *shape* is a function that raises `ShapeError` for a value that it does not like. They are put together
like `keys({"recipe": text, "items": table(each(number))})`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import orjson

from workers.errors import BadInputError
from workers.storage.store import Store, check_key

Shape = Callable[[Any], None]


class ShapeError(ValueError):
    """A value is not of its shape; `path` leads to the part that is not."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path: list[str] = []

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.problem}" if self.path else self.problem


def parse_json(data: bytes) -> Any:
    """What a JSON document holds. Raises `ValueError` for what is none, also for `NaN`, lone surrogates and
    documents that are very deep, which Python's own reader would take."""
    return orjson.loads(data)


def read_document(store: Store, key: str, shape: Shape | None = None) -> dict[str, Any]:
    """The object, which must be a JSON object, of that shape.

    Raises `ObjectNotFoundError`, or `BadInputError` naming what is damaged.
    """
    data = store.read(key)
    with damage_named(f"{store.uri}/{key}"):
        value: dict[str, Any] = parse_json(data)
        (shape or keys({}))(value)
    return value


@contextmanager
def damage_named(place: str) -> Iterator[None]:
    """For taking apart what was read from `place`: what does not fit is a `BadInputError` that names it."""
    try:
        yield
    except BadInputError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
            AssertionError) as error:  # fmt: skip
        # A key that is missing says only its name.
        what = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise BadInputError(
            f"{place}: damaged, or not written by this version of Darwin ({what[:200]}): restore it"
        ) from error


def anything(value: Any) -> None:
    """Takes everything."""


def text(value: Any) -> None:
    if type(value) is not str:
        raise ShapeError("is no text")


def plain_key(value: Any) -> None:
    """A key inside the store."""
    text(value)
    try:
        check_key(value)
    except BadInputError as error:
        raise ShapeError(f"{value[:80]!r} is no place inside the store") from error


def flag(value: Any) -> None:
    if type(value) is not bool:
        raise ShapeError("is neither true nor false")


def whole(value: Any) -> None:
    """A whole number from 0 on, of at most 64 bits."""
    if type(value) is not int or not 0 <= value < 2**64:
        raise ShapeError("is no whole number from 0 on")


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    kind = type(value)
    return (kind is float and math.isfinite(value)) or (kind is int and -(2**63) < value < 2**63)


def number(value: Any) -> None:
    if not is_number(value):
        raise ShapeError("is no number")


def one_of(*values: str) -> Shape:
    def check(value: Any) -> None:
        if type(value) is not str or value not in values:
            raise ShapeError(f"is none of {', '.join(values)}")

    return check


def maybe(shape: Shape) -> Shape:
    """That, or null."""

    def check(value: Any) -> None:
        if value is not None:
            shape(value)

    return check


def each(shape: Shape, least: int = 0) -> Shape:
    """A list of `least` or more."""

    def check(value: Any) -> None:
        if type(value) is not list:
            raise ShapeError("is no list")
        if len(value) < least:
            raise ShapeError(f"has fewer than {least}")
        for place, one in enumerate(value):
            try:
                shape(one)
            except ShapeError as error:
                error.path.insert(0, str(place))
                raise

    return check


def table(shape: Shape) -> Shape:
    """A JSON object with any keys."""

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise ShapeError("is no table")
        for key, one in value.items():
            try:
                shape(one)
            except ShapeError as error:
                error.path.insert(0, key[:80])
                raise

    return check


def keys(required: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None) -> Shape:
    """A JSON object that has these keys, and may have others."""

    shapes = list((dict(required) | dict(optional or {})).items())

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise ShapeError("is no table")
        for name in required:
            if name not in value:
                raise ShapeError(f"has no {name}")
        for name, shape in shapes:
            if name in value:
                try:
                    shape(value[name])
                except ShapeError as error:
                    error.path.insert(0, name)
                    raise

    return check
