"""The search of a campaign: ask, evaluate, tell, until the budget is spent; in one round or in several."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from orchestrator.breeding import LEAST_SURVIVORS, Round, begin_round, limit_of, round_record
from orchestrator.errors import CampaignError, all_failed, not_repeated
from orchestrator.flat_fitness import FlatFitness, FlatWatch
from orchestrator.genomes.space import Space
from orchestrator.ledger.state import Candidate
from orchestrator.pareto_search import front_record, pareto_fitness
from orchestrator.racing.generation import Racing, places_of
from orchestrator.search import STEADY_OPTIMIZERS, Optimizer, SteadyOptimizer
from orchestrator.steady_search import SteadySearch

if TYPE_CHECKING:
    from orchestrator.campaign import Campaign

STAGNANT_GENERATIONS = 3
"""After so many generations without a recipe that is new, the search has nothing left to ask."""


class Search:
    """A campaign's search. What was asked and scored before is found in the ledger, not asked again."""

    def __init__(
        self, campaign: Campaign, space: Space, optimizer: Optimizer | SteadyOptimizer
    ) -> None:
        self.campaign = campaign
        self.space = self._first_space = space
        self.optimizer = optimizer
        self.round = 1
        self.rounds: dict[int, Round] = {}
        """Those after the first, which have spaces and optimizers of their own."""
        self.survivors: set[str] = set()
        """Recipes of all candidates that are bred from."""
        self.flat: FlatFitness | None = None
        self.ended = ""
        """Why it came to its end."""

    def run(self) -> None:
        """Search, and record why it ended and what it took."""
        campaign = self.campaign
        campaign.watcher.stage("search")
        started, idle = time.monotonic(), campaign.pool.idle_seconds
        self.ended = reason = self._run_rounds()
        if self.flat is not None:
            campaign.watcher.stage(f"stopped: {reason}")
        seconds = time.monotonic() - started
        evaluations = campaign.state.evaluated(campaign.config.search.evaluations)
        if not any(record["kind"] == "searched" for record in campaign.ledger.since_begun()):
            campaign.record(
                "searched",
                evaluations=evaluations,
                reason=reason,
                seconds=round(seconds, 3),
                driver_seconds=round(seconds - (campaign.pool.idle_seconds - idle), 3),
                **({"flat": self.flat.to_dict()} if self.flat else {}),
            )

    def _run_rounds(self) -> str:
        """One round, or several of which each begins with the best children of the one before; why the
        last one ended."""
        campaign, state = self.campaign, self.campaign.state
        rounds = campaign.config.breeding.rounds
        if rounds > 1:
            self._record_round(round_record(1, limit_of(campaign.config, 1), {}))
        reason = self._run_round()
        for number in range(2, rounds + 1):
            best = state.best_of_round(
                self.round,
                campaign.config.breeding.survivors,
                campaign.config.search.evaluations,
            )
            if self.flat is not None:
                return reason
            if len(best) < LEAST_SURVIVORS:
                return f"round {self.round} had fewer than {LEAST_SURVIVORS} children to breed from"
            self.survivors.update(candidate.recipe_id for candidate in best)
            survivors = [(candidate, campaign.recipe_of(candidate)) for candidate in best]
            found = begin_round(campaign.config, campaign.inputs, campaign.plan, number, survivors)
            self._record_round(found.to_record())
            campaign.watcher.stage(f"search, round {number} of {rounds}: {len(best)} parents")
            self.round, self.rounds[number] = number, found
            self.space, self.optimizer = found.space, found.optimizer
            reason = self._run_round()
        return reason

    def _run_round(self) -> str:
        """One round, with generations or without as its optimizer is; why it ended."""
        optimizer: Any = self.optimizer
        if self.campaign.config.search.optimizer not in STEADY_OPTIMIZERS:
            return self._run_generations(optimizer)
        steady = SteadySearch(self.campaign, self.space, optimizer, self.round)
        reason = steady.run()
        self.flat = steady.flat
        return reason

    def _record_round(self, content: dict[str, Any]) -> None:
        """Record that a round begins, or make sure that it began so before."""
        known = self.campaign.state.rounds.get(content["round"])
        if known is None:
            self.campaign.record("round", **content)
        elif any(known[key] != value for key, value in content.items()):
            raise CampaignError(
                f"{self.campaign.store.uri}: round {content['round']} does not begin as recorded: "
                "another version of Darwin ran before. Restore it, or start a campaign of another name"
            )

    def _run_generations(self, optimizer: Optimizer) -> str:
        """Generations until the budget is spent or the optimizer has nothing left to ask; which."""
        campaign, state = self.campaign, self.campaign.state
        budget = campaign.config.search.evaluations
        limit = limit_of(campaign.config, self.round)
        generation, stagnant = state.generations_through(self.round - 1), 0
        earlier = state.within_budget(budget)[:generation]
        known = {candidate.recipe_id for asked in earlier for candidate in asked}
        watch = FlatWatch(campaign.inputs.tasks, campaign.config.objective, budget)
        while stagnant < STAGNANT_GENERATIONS:
            stopped = optimizer.stopped()
            if stopped is not None:
                return f"the optimizer stopped: {stopped}"
            asked_before = state.generations_through(self.round)
            if len(known) >= limit and generation == asked_before:
                return "the budget is spent"
            points = optimizer.ask()
            asked = self._asked(generation, points)
            candidates = state.paid_of(generation, budget)
            self._evaluate(generation, candidates)
            if len(candidates) < len(asked):
                return "the budget is spent"
            optimizer.tell(points, self._fitness_for_tell(generation))
            campaign.forget(candidate.recipe_id for candidate in asked)
            self.flat = watch.after(state, generation + 1)
            if self.flat is not None:
                return self.flat.reason
            new = {c.recipe_id for c in asked} - known
            stagnant = 0 if new else stagnant + 1
            known |= new
            generation += 1
        return f"{STAGNANT_GENERATIONS} generations brought no new recipe"

    def _evaluate(self, number: int, candidates: list[Candidate]) -> None:
        """Score the candidates of a generation, or have them raced."""
        campaign = self.campaign
        if campaign.config.racing.use == "none":
            # Of those that are scored no recipe is wanted any more.
            left = [c for c in candidates if not campaign.state.is_settled(c.recipe_id)]
            campaign.evaluate(map(campaign.recipe_of, left), "search")
        else:
            Racing(campaign).evaluate(number, candidates, places_of(self.optimizer, candidates))

    def _asked(self, generation: int, points: list[list[float]]) -> list[Candidate]:
        """The generation's candidates: as recorded, or recorded now."""
        campaign = self.campaign
        genomes = [self.space.point(point) for point in points]
        if generation == len(campaign.state.generations):
            recipes = [campaign.know(campaign.decode(genome)) for genome in genomes]
            campaign.record(
                "asked",
                generation=generation,
                **({"round": self.round} if campaign.config.breeding.rounds > 1 else {}),
                candidates=[
                    {"genome": genome, "recipe": recipe.id}
                    for genome, recipe in zip(genomes, recipes, strict=True)
                ],
            )
        asked = campaign.state.generations[generation]
        self.check_repeated(asked, genomes, f"generation {generation}")
        return asked

    def check_repeated(
        self, asked: list[Candidate], genomes: list[dict[str, float]], what: str
    ) -> None:
        """Raise `CampaignError` if these candidates are not of these genomes, or the first one's recipe is
        not what its genome decodes to. The others' recipes are checked when they are wanted."""
        repeated = [candidate.genome for candidate in asked] == genomes
        if not repeated or self.campaign.decode(genomes[0]).id != asked[0].recipe_id:
            raise not_repeated(self.campaign.store.uri, what)

    def space_of(self, candidate: Candidate) -> Space:
        """The space of the round that asked for the candidate first."""
        if not self.rounds:
            return self.space
        number = self.campaign.state.round_of_recipe(candidate.recipe_id)
        return self._first_space if number == 1 else self.rounds[number].space

    def _fitness_for_tell(self, number: int) -> list[float]:
        """Fitness in ask order; a failed candidate counts as the worst of its generation, or of all
        until then: a replay must not know of those that came later."""
        state = self.campaign.state
        asked = state.generations[number]
        if state.objective == "pareto":
            return pareto_fitness(state, number)
        fitness = [state.told_fitness(number, candidate.recipe_id) for candidate in asked]
        known = [value for value in fitness if value is not None]
        if not known:
            known = [
                value
                for earlier, generation in enumerate(state.generations[:number])
                for candidate in generation
                if (value := state.told_fitness(earlier, candidate.recipe_id)) is not None
            ]
        if not known:
            reason = state.evaluation(asked[0].recipe_id, "search").failed
            raise all_failed("of a generation", reason)
        return [min(known) if value is None else value for value in fitness]

    def select(self) -> Candidate:
        """The fittest candidate, recorded."""
        best = self.campaign.state.best(self.campaign.config.search.evaluations)
        if best is None:
            raise CampaignError("no candidate could be evaluated")
        candidate, fitness = best
        if self.campaign.config.objective == "pareto":
            parents = {name: one.id for name, one in self.campaign.parent_recipes.items()}
            front = front_record(self.campaign.state, self.campaign.config, parents)
            self.campaign.record_once("front", **front)
        self.campaign.record_once(
            "selected", recipe=candidate.recipe_id, genome=candidate.genome, fitness=fitness
        )
        return candidate
