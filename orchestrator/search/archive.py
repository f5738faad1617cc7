"""An archive of natural niches: M2N2 (Abrantes, Lange, Tang 2025, "Competition and Attraction Improve Model
Fusion", arXiv 2508.16204) on genomes.

Of the paper: competition for items that few answer, attraction of a complementary partner, a split point that
is drawn anew for each child, replacement of the archive's worst. Ours: genomes stand for weights, which are
mixed linearly, not spherically; an even spread of points begins the archive where the paper has trained
models; and every child is mutated, since genomes in a box would else only draw together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from orchestrator.search.optimizer import register_steady
from workers.errors import BadInputError

ARCHIVE_SIZE = 16
ALPHA = 1.0
"""How much an item that many answer is worth less; 0 is plain fitness. The paper's code has 1."""

FINEST_MUTATION = 0.01
"""The smallest standard deviation of a mutation, as a share of `search.step`."""

Matrix = numpy.ndarray
"""Scores as [member, item]."""


def shared_scores(scores: Matrix, capacities: Matrix, alpha: float = ALPHA) -> Matrix:
    """`c_j S_ij / (sum_i S_ij)^alpha`, [member, item]: what of item j's capacity falls to member i.

    Nothing of an item that nobody answers.
    """
    total = scores.sum(axis=0)
    divisor = numpy.where(total > 0, total, 1.0) ** alpha
    return numpy.asarray(capacities * scores / divisor)


def attraction(shared: Matrix, first: int) -> Matrix:
    """`sum_j max(0, f_ij - f_first,j)`, [member]: what each would add to the first parent."""
    return numpy.asarray(numpy.maximum(0.0, shared - shared[first]).sum(axis=1))


@register_steady("archive")
class Archive:
    """Breeds one child at a time from two members that complement each other.

    `population` is the size of the archive, `step` the standard deviation of the widest mutation in the unit
    cube.
    """

    def __init__(
        self,
        start: Sequence[float],
        step: float,
        population: int | None,
        seed: int,
        item_weights: Sequence[float],
    ) -> None:
        if population is not None and population < 2:
            raise BadInputError(
                f"search.population: an archive needs 2 members or more, not {population}"
            )
        self._size = population or ARCHIVE_SIZE
        self._genes = len(start)
        self._step = step
        self._capacities = numpy.array(item_weights, dtype=float)
        self._generator = numpy.random.default_rng(seed)
        spread = _latin_hypercube(self._size - 1, len(start), self._generator)
        self._first = [numpy.array(start, dtype=float), *spread]
        """Points to ask for before any is bred, the next one at the front."""
        self._points: list[Matrix] = []
        self._room = numpy.zeros((self._size + 1, len(item_weights)))
        """The members' scores, and room for those of one more."""

    def ask_one(self) -> list[float]:
        if self._first:
            point = self._first.pop(0)
        elif len(self._points) < 2:  # the first ones are still evaluated, or have failed
            point = self._generator.random(self._genes)
        else:
            point = self._breed()
        return [float(value) for value in point]

    def tell_one(
        self, point: Sequence[float], fitness: float, scores: Sequence[float] | None
    ) -> None:
        if scores is None:
            return
        self._room[len(self._points)] = scores
        self._points.append(numpy.array(point, dtype=float))
        if len(self._points) > self._size:
            competing = shared_scores(self._scores, self._capacities).sum(axis=1)
            worst = int(competing.argmin())  # of equals the oldest, so that the archive drifts
            del self._points[worst]
            self._room[worst:-1] = self._room[worst + 1 :]

    @property
    def _scores(self) -> Matrix:
        return self._room[: len(self._points)]

    def stopped(self) -> str | None:
        return None

    def _breed(self) -> Matrix:
        draw = self._generator
        shared = shared_scores(self._scores, self._capacities)
        first = self._choose(shared.sum(axis=1))
        second = self._choose(attraction(shared, first), besides=first)
        one, other = self._points[first], self._points[second]
        weight, genes = draw.random(), len(one)
        split = int(draw.integers(genes + 1))
        shares = numpy.where(numpy.arange(genes) < split, weight, 1.0 - weight)
        child = shares * one + (1.0 - shares) * other
        # Coarse and fine mutations alike: no one step suits both the beginning and the end of a search.
        deviation = self._step * FINEST_MUTATION ** draw.random()
        return _reflected(child + deviation * draw.standard_normal(genes))

    def _choose(self, worth: Matrix, besides: int | None = None) -> int:
        """A member, drawn in proportion to its worth; evenly where none is worth anything."""
        if not worth.sum() > 0.0:
            worth = numpy.ones(len(worth))
            if besides is not None:
                worth[besides] = 0.0
        reached = worth.cumsum()
        # Not `Generator.choice`, whose tolerance for sums that are not quite 1 may change.
        return min(
            int(reached.searchsorted(self._generator.random() * reached[-1], side="right")),
            int(worth.nonzero()[0][-1]),
        )


def _latin_hypercube(count: int, genes: int, generator: numpy.random.Generator) -> list[Matrix]:
    """Points of which each gene has one in every `count`-th part of its range (McKay et al. 1979)."""
    parts = numpy.stack([generator.permutation(count) for _ in range(genes)], axis=1)
    return list((parts + generator.random((count, genes))) / count)


def _reflected(point: Matrix) -> Matrix:
    """The point, folded back into the unit cube: clipping would heap points on its faces."""
    folded = numpy.mod(point, 2.0)
    return numpy.asarray(numpy.where(folded > 1.0, 2.0 - folded, folded))
