"""CMA-ES (Hansen 2016, arXiv 1604.00772) through pycma."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

from orchestrator.search.optimizer import register
from workers.errors import BadInputError


@register("cma_es")
class CovarianceMatrixAdaptation:
    """pycma with its own random generator and its own handling of the bounds.

    `step` is the first standard deviation in the unit cube. NumPy's global generator is neither read
    nor seeded. Two genes are the fewest that CMA-ES works on; a single one gets a companion that
    decides nothing.
    """

    def __init__(
        self, start: Sequence[float], step: float, population: int | None, seed: int
    ) -> None:
        import cma

        if population is not None and population < 2:
            raise BadInputError(f"search.population: CMA-ES needs 2 or more, not {population}")
        self._genes = len(start)
        generator = numpy.random.default_rng(seed)
        options = {
            "bounds": [0.0, 1.0],
            "seed": math.nan,  # do not touch NumPy's global generator ...
            "randn": lambda *shape: generator.standard_normal(shape),  # ... but draw from this one
            "verbose": -10,  # quiet, and without reading options from a file of the current folder
            "verb_log": 0,
            # Scores of few items have few values: equal ones do not mean that nothing is left to find.
            "tolfun": 0.0,
            "tolfunhist": 0.0,
            "tolflatfitness": 20,
        }
        if population is not None:
            options["popsize"] = population
        padded = [*start, 0.5] if self._genes == 1 else list(start)
        self._strategy = cma.CMAEvolutionStrategy(padded, step, options)
        self._asked: list[numpy.ndarray] = []

    @property
    def selected(self) -> int:
        """How many of a generation the next one's mean is made of (mu). The order of the rest counts for the
        covariance alone, with negative weights (active CMA)."""
        return int(self._strategy.sp.weights.mu)

    def ask(self) -> list[list[float]]:
        self._asked = self._strategy.ask()
        return [[float(value) for value in point[: self._genes]] for point in self._asked]

    def tell(self, points: Sequence[Sequence[float]], fitness: Sequence[float]) -> None:
        # pycma knows its own points, unrounded, and minimizes.
        self._strategy.tell(self._asked, [-value for value in fitness])

    def stopped(self) -> str | None:
        reasons = self._strategy.stop()
        return ", ".join(f"{key} {value}" for key, value in reasons.items()) or None
