"""Breeding in rounds: the best children of one search are the parents of the next.

A *round* is a whole search, with a genome space over its own parents and an optimizer with a seed of its
own. (A *generation* is one batch of an optimizer.) Children that are bred from are never written: they are
kept as recipes over the campaign's parents, and so is each recipe over them, by composition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.composition import Composer, check_composes
from orchestrator.config import CampaignConfig
from orchestrator.descent.ancestry import Ancestor, Descent
from orchestrator.descent.family_tree import describe_child
from orchestrator.descent.shares import recorded_parameters
from orchestrator.genomes.build import build_space
from orchestrator.genomes.space import Gene, RemovedGene, Space
from orchestrator.inputs import Inputs
from orchestrator.ledger.state import CampaignState, Candidate
from orchestrator.objectives import item_weights, task_weights
from orchestrator.search import Optimizer, SteadyOptimizer, build_optimizer
from workers.errors import BadInputError
from workers.merging import MergeMethod, ParentReference, Recipe, get_method
from workers.merging.plan import Plan

LEAST_SURVIVORS = 2


@dataclass(frozen=True)
class BredSpace:
    """A genome space over children that are not written: it decodes to recipes over their parents."""

    over: Space
    composer: Composer

    @property
    def method(self) -> MergeMethod:
        return self.over.method

    @property
    def genes(self) -> tuple[Gene, ...]:
        return self.over.genes

    @property
    def removed(self) -> tuple[RemovedGene, ...]:
        return self.over.removed

    @property
    def to_prescribe(self) -> tuple[str, ...]:
        return ()  # what was not written cannot be scanned

    @property
    def identity(self) -> dict[str, Any]:
        return self.over.identity

    @property
    def start(self) -> list[float]:
        return self.over.start

    def point(self, unit: Sequence[float]) -> dict[str, float]:
        return self.over.point(unit)

    def decode(self, genome: dict[str, float]) -> Recipe:
        """The recipe of a genome, over the campaign's parents."""
        return self.composer.compose(self.over.decode(genome))

    def shares(self, genome: dict[str, float]) -> dict[str, dict[str, float]]:
        """Component -> child that it was bred from -> its share."""
        return self.composer.shares(self.over.decode(genome))


@dataclass(frozen=True)
class Round:
    """One round after the first."""

    number: int
    limit: int
    """Candidates that are scored in this round and all before it."""
    space: BredSpace
    optimizer: Optimizer | SteadyOptimizer
    parents: Mapping[str, Candidate] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """What the ledger holds of it when it begins."""
        return round_record(self.number, self.limit, self.parents)


def round_record(number: int, limit: int, parents: Mapping[str, Candidate]) -> dict[str, Any]:
    """The content of a `round` record; the first round's parents are the campaign's own."""
    return {
        "round": number,
        "limit": limit,
        "parents": [
            {"name": name, "recipe": candidate.recipe_id} for name, candidate in parents.items()
        ],
    }


def limit_of(config: CampaignConfig, number: int) -> int:
    """How many candidates may have been scored when a round ends: even shares of the whole budget.

    What a round leaves, because its search ended early, the next one may spend.
    """
    return config.search.evaluations * number // config.breeding.rounds


def seed_of(config: CampaignConfig, number: int) -> int:
    """The seed of a round's optimizer; the first one's is the campaign's."""
    if number == 1:
        return config.seed
    digest = hashlib.sha256(f"round {number} of seed {config.seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def begin_round(
    config: CampaignConfig,
    inputs: Inputs,
    plan: Plan,
    number: int,
    survivors: Sequence[tuple[Candidate, Recipe]],
) -> Round:
    """The round whose parents are the `survivors` of the one before."""
    named = {f"round{number - 1}-{place}": one for place, one in enumerate(survivors, 1)}
    over = build_space(
        replace(
            config.genome, start=None
        ),  # a start for the father and the mother says nothing here
        inputs.father_map,
        tuple(ParentReference(name, recipe.id) for name, (_, recipe) in named.items()),
        inputs.base_reference,
        config.seed,
    )
    children = {name: recipe for name, (_, recipe) in named.items()}
    space = BredSpace(over, Composer(children, plan))
    optimizer = build_optimizer(
        config.search.optimizer,
        space.start,
        config.search.step,
        config.search.population,
        seed_of(config, number),
        item_weights(task_weights(config), inputs.tasks),
    )
    parents = {name: candidate for name, (candidate, _) in named.items()}
    return Round(number, limit_of(config, number), space, optimizer, parents)


def check_breeding(config: CampaignConfig, inputs: Inputs, plan: Plan, example: Recipe) -> None:
    """Raise `BadInputError` now if what later rounds ask could not be merged: `example` is a recipe that
    the first round may ask."""
    if config.breeding.rounds == 1:
        return
    check_composes(get_method(config.genome.method), "breeding.rounds: genome.method")
    try:
        one = Candidate({}, example.id)
        second = begin_round(config, inputs, plan, 2, [(one, example)] * config.breeding.survivors)
        plan.assign(second.space.decode(second.space.point(second.space.start)))
    except BadInputError as error:
        raise BadInputError(f"breeding.rounds: a second round cannot be: {error}") from error


def bred_ancestors(
    lineage: dict[str, Any],
    rounds: Mapping[int, Round],
    number: int,
    genome: dict[str, float],
    plan: Plan,
    recipes: Mapping[str, Recipe],
) -> tuple[tuple[Descent, ...], dict[str, Ancestor]]:
    """What the child of a `genome` of round `number` came through, and all that were bred from, by key."""
    bred: dict[str, Ancestor] = {}

    def descend(number: int, genome: dict[str, float]) -> tuple[Descent, ...]:
        own = rounds.get(number)
        if own is None:
            return ()  # the first round's are the campaign's parents
        shares = own.space.shares(genome)
        descents = []
        for name, candidate in own.parents.items():
            key = f"recipe:{candidate.recipe_id}"
            given = {component: part[name] for component, part in shares.items()}
            descents.append(Descent(key, name, "bred", given))
            if key not in bred:
                through = descend(number - 1, candidate.genome)
                bred[key] = _never_written(
                    lineage, name, recipes[candidate.recipe_id], plan, through
                )
        return tuple(descents)

    return descend(number, genome), bred


def rounds_for_lineage(state: CampaignState, config: CampaignConfig, own: int) -> dict[str, Any]:
    """What a lineage says of the rounds: the best fitness of each, and which one the child is `own` to."""
    budget = config.search.evaluations
    best = {number: state.best_of_round(number, 1, budget) for number in sorted(state.rounds)}
    return {
        "survivors": config.breeding.survivors,
        "best": [state.fitness(found[0].recipe_id) if found else None for found in best.values()],
        "child_is_of": own,
    }


def _never_written(
    lineage: dict[str, Any], name: str, recipe: Recipe, plan: Plan, through: tuple[Descent, ...]
) -> Ancestor:
    tensors = [
        {
            "component": plan.child.by_name[tensor].component,
            "elements": plan.child.by_name[tensor].elements,
            "method": way.method.name,
            "parameters": recorded_parameters(way),
        }
        for tensor, way in plan.assign(recipe).items()
    ]
    known = {"parents": lineage["parents"], "base": lineage["base"], "tensors": tensors}
    child = describe_child(known | {"recipe_id": recipe.id, "campaign": lineage["campaign"]})
    return replace(child, name=name, through=through)
