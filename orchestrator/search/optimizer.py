"""What an optimizer is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from workers.errors import BadInputError


class Optimizer(Protocol):
    """A search by generations. Deterministic: seed, asks and tells decide everything.

    It must not read the clock, the global random state, or anything else from outside.
    """

    def ask(self) -> list[list[float]]:
        """The next generation: points of the unit cube. Not called again before its `tell`."""

    def tell(self, points: Sequence[Sequence[float]], fitness: Sequence[float]) -> None:
        """The fitness of each point of the last `ask`, in its order."""

    def stopped(self) -> str | None:
        """Why there is no use in asking on, or None."""


class OptimizerFactory(Protocol):
    """Makes an optimizer. `population` None is the optimizer's own choice."""

    def __call__(
        self, start: Sequence[float], step: float, population: int | None, seed: int
    ) -> Optimizer: ...


OPTIMIZERS: dict[str, OptimizerFactory] = {}


def register(name: str) -> Callable[[OptimizerFactory], OptimizerFactory]:
    """Make an optimizer known by its name."""

    def add(factory: OptimizerFactory) -> OptimizerFactory:
        assert name not in OPTIMIZERS, name
        OPTIMIZERS[name] = factory
        return factory

    return add


class OnePoint:
    """Asks once for the point that has no coordinates: a space without genes has one candidate."""

    def __init__(self) -> None:
        self._told = False

    def ask(self) -> list[list[float]]:
        return [[]]

    def tell(self, points: Sequence[Sequence[float]], fitness: Sequence[float]) -> None:
        self._told = True

    def stopped(self) -> str | None:
        return "there are no genes to search" if self._told else None


def build_optimizer(
    name: str, start: Sequence[float], step: float, population: int | None, seed: int
) -> Optimizer:
    """The optimizer of that name, at its beginning; without genes, one that asks for a single point.

    Raises `BadInputError` listing those there are.
    """
    if name not in OPTIMIZERS:
        raise BadInputError(
            f"search.optimizer: {name!r} is none of {', '.join(sorted(OPTIMIZERS))}"
        )
    return OPTIMIZERS[name](start, step, population, seed) if start else OnePoint()
