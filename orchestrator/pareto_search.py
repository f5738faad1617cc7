"""A search for a Pareto front: what optimizers are told in place of a fitness, and the front it found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.config import CampaignConfig
from orchestrator.errors import all_failed
from orchestrator.ledger.state import CampaignState, Candidate
from orchestrator.pareto import Scores, front_of, hypervolume, rank_fitness

FRONT_KEYS = ("hypervolume", "reference", "members", "parents")
"""What a `front` record has."""


def pareto_fitness(state: CampaignState, number: int) -> list[float]:
    """Of each candidate of a generation, in ask order: its rank among all that were scored until then.

    A failed one counts as the worst of them. Raises `CampaignError` if nothing has been scored.
    """
    earlier = [
        scores
        for generation in state.generations[:number]
        for candidate in generation
        if (scores := state.task_scores(candidate.recipe_id)) is not None
    ]
    asked = [state.task_scores(c.recipe_id) for c in state.generations[number]]
    told = [scores for scores in asked if scores is not None]
    if not told and not earlier:
        reason = state.evaluation(state.generations[number][0].recipe_id, "search").failed
        raise all_failed("of a generation", reason)
    fitness = iter(rank_fitness(told, earlier))
    return [0.0 if scores is None else next(fitness) for scores in asked]


def front_record(
    state: CampaignState, config: CampaignConfig, parents: Mapping[str, str]
) -> dict[str, Any]:
    """The front of all candidates within the budget, as data: each member's recipe, genome and scores.

    Of candidates with the same scores the first one stands for all. The member with the best mean comes
    first: it is the child. `parents` (name -> recipe) are not of the front: their scores are there to
    compare. The hypervolume is above the reference point 0.
    """
    budget = config.search.evaluations
    tasks: list[str] = []
    first: dict[Scores, Candidate] = {}
    for generation in state.within_budget(budget):
        for candidate in generation:
            scores = state.task_scores(candidate.recipe_id)
            if scores is not None:
                tasks = sorted(state.evaluation(candidate.recipe_id, "search").results)
                first.setdefault(scores, candidate)
    front = set(front_of(list(first)))
    members = [
        {
            "recipe": candidate.recipe_id,
            "genome": candidate.genome,
            "scores": dict(zip(tasks, scores, strict=True)),
            "mean": state.fitness(candidate.recipe_id),
        }
        for scores, candidate in first.items()
        if scores in front
    ]
    members.sort(key=lambda member: -float(str(member["mean"])))  # stable: as they were asked for
    return {
        "hypervolume": hypervolume(list(front)),
        "reference": 0.0,
        "members": members,
        "parents": {
            name: state.evaluation(recipe, "search").scores()
            for name, recipe in parents.items()
            if state.fitness(recipe) is not None
        },
    }
