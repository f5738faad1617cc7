"""Flat fitness: a search whose candidates all score alike has nothing to follow, and is stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.ledger.state import CampaignState
from orchestrator.statistics import POWER, items_needed, smallest_difference
from workers.evaluation.task import Task

LEAST_GENERATIONS = 3
LEAST_CANDIDATES = 12
"""So many generations, and so many different candidates, are scored before a search is called flat."""

STATED_DIFFERENCE = 0.02
"""The difference in fitness for which the report says how many items would show it."""


@dataclass(frozen=True)
class FlatFitness:
    """What a flat search was like, and what its items could have shown."""

    fitness: float
    candidates: int
    generations: int | None
    """None of a search without them."""
    items: int
    """Search items that the fitness rests on; with the objective `worst` those of the smallest task."""
    smallest_difference: float | None
    """Between two candidates, that so many items would likely show at all; None: they can show none."""
    items_needed: int
    """For a difference of `STATED_DIFFERENCE`."""

    @property
    def reason(self) -> str:
        """Why the search was stopped, for people."""
        visible = (
            f"differences below {self.smallest_difference:.3f} are not seen by so few"
            if self.smallest_difference is not None
            else "so few can show no difference at all"
        )
        generations = f" of {self.generations} generations" if self.generations else ""
        return (
            f"the fitness is flat: all {self.candidates} candidates{generations} "
            f"score {self.fitness:.3f} on {self.items} items; {visible} (paired test, 5 % level, "
            f"{POWER:.0%} power), and one of {STATED_DIFFERENCE:g} needs {self.items_needed} items"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "fitness": self.fitness,
            "candidates": self.candidates,
            "generations": self.generations,
            "items": self.items,
            "smallest_difference": self.smallest_difference,
            "items_needed": {f"{STATED_DIFFERENCE:g}": self.items_needed},
        }


class FlatWatch:
    """Looks after each generation whether a search is flat. Of one whose candidates differ it is known for
    good: what was told does not change."""

    def __init__(self, tasks: Sequence[Task], objective: str, budget: int) -> None:
        self._tasks = tasks
        self._objective = objective
        self._budget = budget
        self._differ = False

    def after(self, state: CampaignState, told: int) -> FlatFitness | None:
        """What is known if it is flat; None if candidates differ, or too few were scored.

        Of the first `told` generations alone: a replay must not know of one that was only asked for.
        """
        if self._differ:
            return None
        generations = state.within_budget(self._budget)[:told]
        known = {
            candidate.recipe_id: fitness
            for generation in generations
            for candidate in generation
            if (fitness := state.fitness(candidate.recipe_id)) is not None
        }
        scores = [state.task_scores(recipe_id) for recipe_id in known]
        # Of generations that raced only leaders have a fitness; what was told of others must be alike too.
        self._differ = not all(map(state.races.flat, range(len(generations)))) or (
            _differ(list(known.values()), scores, self._objective)
        )
        if self._differ or len(generations) < LEAST_GENERATIONS:
            return None
        return flat_among(
            list(known.values()), scores, self._tasks, self._objective, len(generations)
        )


def flat_among(
    fitness: Sequence[float],
    scores: Sequence[tuple[float, ...] | None],
    tasks: Sequence[Task],
    objective: str,
    generations: int | None = None,
) -> FlatFitness | None:
    """The same of different candidates with this `fitness`, and with these `scores` on the tasks: on a Pareto
    front all means may be equal."""
    if len(fitness) < LEAST_CANDIDATES:
        return None
    if _differ(fitness, scores, objective):
        return None
    counts = [len(task.items["search"]) for task in tasks]
    items = min(counts) if objective == "worst" else sum(counts)
    return FlatFitness(
        fitness[0],
        len(fitness),
        generations,
        items,
        smallest_difference(items),
        items_needed(STATED_DIFFERENCE),
    )


def _differ(
    fitness: Sequence[float], scores: Sequence[tuple[float, ...] | None], objective: str
) -> bool:
    return len(set(scores if objective == "pareto" else fitness)) > 1
