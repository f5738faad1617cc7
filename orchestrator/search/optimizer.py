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


class SteadyOptimizer(Protocol):
    """A search without generations: one point at a time, told whenever its evaluation has ended.

    Deterministic: seed, asks and tells, in the order in which they came, decide everything. `ask_one` may
    be called any number of times before a `tell_one`, and points are told in any order.
    """

    def ask_one(self) -> list[float]:
        """The next point of the unit cube."""

    def tell_one(
        self, point: Sequence[float], fitness: float, scores: Sequence[float] | None
    ) -> None:
        """The fitness of a point that was asked for, and the scores of its items, always the same ones in
        the same order; None if it failed, its fitness is then that of the worst."""

    def stopped(self) -> str | None:
        """Why there is no use in asking on, or None."""


class OptimizerFactory(Protocol):
    """Makes an optimizer. `population` None is the optimizer's own choice."""

    def __call__(
        self, start: Sequence[float], step: float, population: int | None, seed: int
    ) -> Optimizer: ...


class SteadyOptimizerFactory(Protocol):
    """Makes a steady optimizer. `item_weights` says how much of the fitness each item is; the sum is 1."""

    def __call__(
        self,
        start: Sequence[float],
        step: float,
        population: int | None,
        seed: int,
        item_weights: Sequence[float],
    ) -> SteadyOptimizer: ...


OPTIMIZERS: dict[str, OptimizerFactory] = {}
STEADY_OPTIMIZERS: dict[str, SteadyOptimizerFactory] = {}
"""Those without generations. The optimizer of a campaign decides how it searches."""


def register(name: str) -> Callable[[OptimizerFactory], OptimizerFactory]:
    """Make an optimizer known by its name."""

    def add(factory: OptimizerFactory) -> OptimizerFactory:
        assert name not in OPTIMIZERS | STEADY_OPTIMIZERS, name
        OPTIMIZERS[name] = factory
        return factory

    return add


def register_steady(name: str) -> Callable[[SteadyOptimizerFactory], SteadyOptimizerFactory]:
    """The same for one without generations."""

    def add(factory: SteadyOptimizerFactory) -> SteadyOptimizerFactory:
        assert name not in OPTIMIZERS | STEADY_OPTIMIZERS, name
        STEADY_OPTIMIZERS[name] = factory
        return factory

    return add


class OnePoint:
    """Asks once for the point that has no coordinates: a space without genes has one candidate."""

    def __init__(self) -> None:
        self._asked = False
        self._told = False

    def ask(self) -> list[list[float]]:
        return [[]]

    def ask_one(self) -> list[float]:
        self._asked = True
        return []

    def tell(self, points: Sequence[Sequence[float]], fitness: Sequence[float]) -> None:
        self._told = True

    def tell_one(
        self, point: Sequence[float], fitness: float, scores: Sequence[float] | None
    ) -> None:
        self._told = True

    def stopped(self) -> str | None:
        return "there are no genes to search" if self._told or self._asked else None


def check_optimizer(name: str) -> None:
    """Raise `BadInputError` listing the optimizers there are if there is none of this name."""
    if name not in OPTIMIZERS | STEADY_OPTIMIZERS:
        known = ", ".join(sorted(OPTIMIZERS | STEADY_OPTIMIZERS))
        raise BadInputError(f"search.optimizer: {name!r} is none of {known}")


def build_optimizer(
    name: str,
    start: Sequence[float],
    step: float,
    population: int | None,
    seed: int,
    item_weights: Sequence[float] = (),
) -> Optimizer | SteadyOptimizer:
    """The optimizer of that name, at its beginning; without genes, one that asks for a single point.

    Raises `BadInputError` listing those there are.
    """
    check_optimizer(name)
    if not start:
        return OnePoint()
    if name in STEADY_OPTIMIZERS:
        return STEADY_OPTIMIZERS[name](start, step, population, seed, item_weights)
    return OPTIMIZERS[name](start, step, population, seed)
