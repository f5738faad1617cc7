"""A search without generations: whenever a worker is free it is asked for one more candidate, and each is
told as it lands.

The ledger is the whole truth of its order: an `asked` record is an ask of the optimizer, and the record that
ends an evaluation is a tell. A resumed driver reads the records one by one and does to the optimizer what
the earlier one did; then it goes on where that one stopped, first with what was asked and not scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.breeding import limit_of
from orchestrator.errors import all_failed, not_repeated
from orchestrator.flat_fitness import FlatFitness, flat_among
from orchestrator.genomes.space import Space
from orchestrator.pareto import Scores, rank_fitness
from orchestrator.pool import Job
from orchestrator.search import SteadyOptimizer
from orchestrator.state import CampaignState
from workers.merging import Recipe

if TYPE_CHECKING:
    from orchestrator.campaign import Campaign

STAGNANT_ASKS = 100
"""After so many asks in a row without a recipe that is new, the search has nothing left to ask."""

HOPELESS_FAILURES = 6
"""If the first so many candidates all fail, there is something wrong with more than those candidates."""


@dataclass(frozen=True)
class Asked:
    """A candidate that the optimizer is not told of yet."""

    point: list[float]
    recipe_id: str


class SteadySearch:
    """One round of such a search."""

    def __init__(
        self, campaign: Campaign, space: Space, optimizer: SteadyOptimizer, number: int
    ) -> None:
        self.campaign = campaign
        self.space = space
        self.optimizer = optimizer
        self.round = number
        self.flat: FlatFitness | None = None
        self._untold: list[Asked] = []
        """In the order in which they were asked for."""
        self._told: dict[str, float] = {}
        """Recipe -> fitness, of those that were scored."""
        self._told_scores: list[Scores] = []
        """Of the same, one score for each task."""
        self._known: set[str] = set()
        """Recipes that were asked for in this round and those before it."""
        self._stagnant = 0
        self._given: set[str] = set()
        """Recipes that the pool has got from this driver."""

    def run(self) -> str:
        """Search until the budget is spent or there is nothing left to ask; which."""
        self._replay()
        for _ in self.campaign.evaluate_as_asked(self._next_job):
            self._tell(self.campaign.state)
        if self._untold:
            reason = self.campaign.state.evaluation(self._untold[0].recipe_id, "search").failed
            raise all_failed("so far has", reason)
        reason_to_end = self._reason_to_end()
        assert reason_to_end is not None
        return reason_to_end

    # -- what the ledger knows -----------------------------------------------------------------

    def _replay(self) -> None:
        """Ask and tell the optimizer what is recorded, each time knowing only what was known then."""
        campaign = self.campaign
        past = CampaignState(campaign.config.objective, (), campaign.weights)
        for record in campaign.ledger.records:
            past.apply(record)
            if record["kind"] == "asked":
                number = record.get("round", 1)
                if number < self.round:
                    self._known.add(record["candidates"][0]["recipe"])
                elif number == self.round:
                    self._ask_again(record)
            self._tell(past)

    def _ask_again(self, record: dict[str, Any]) -> None:
        point, _, recipe = self._ask()
        if record["candidates"][0]["recipe"] != recipe.id:
            raise not_repeated(self.campaign.store.uri, f"ask {record['number']}")
        self._note(point, recipe)

    # -- asking --------------------------------------------------------------------------------

    def _next_job(self) -> Job | None:
        """What to evaluate next: of what is asked for already, else of the optimizer. None for now if
        there is nothing."""
        campaign, state = self.campaign, self.campaign.state
        while True:
            for asked in self._untold:
                evaluation = state.evaluation(asked.recipe_id, "search")
                if asked.recipe_id not in self._given and not evaluation.complete:
                    self._given.add(asked.recipe_id)
                    recipe = campaign.recipes[asked.recipe_id]
                    return Job(recipe.id, recipe, "search", finished=evaluation.finished_items)
            if self._reason_to_end() is not None or self._is_hopeless():
                return None
            point, genome, recipe = self._ask()
            campaign.record(
                "asked",
                number=len(state.generations),
                **({"round": self.round} if campaign.config.breeding.rounds > 1 else {}),
                candidates=[{"genome": genome, "recipe": recipe.id}],
            )
            self._note(point, recipe)
            self._tell(state)  # of a recipe that is known nothing need be evaluated

    def _ask(self) -> tuple[list[float], dict[str, float], Recipe]:
        point = self.optimizer.ask_one()
        genome = self.space.point(point)
        return point, genome, self.campaign.know(self.campaign.decode(genome))

    def _note(self, point: list[float], recipe: Recipe) -> None:
        self._stagnant = self._stagnant + 1 if recipe.id in self._known else 0
        self._known.add(recipe.id)
        self._untold.append(Asked(point, recipe.id))

    def _reason_to_end(self) -> str | None:
        """Why nothing more is asked for, as things stand; what still runs may change it."""
        config, tasks = self.campaign.config, self.campaign.inputs.tasks
        told = list(self._told.values())
        self.flat = flat_among(told, self._told_scores, tasks, config.objective)
        if self.flat is not None:
            return self.flat.reason
        stopped = self.optimizer.stopped()
        if stopped is not None:
            return f"the optimizer stopped: {stopped}"
        if len(self._known) >= limit_of(self.campaign.config, self.round):
            return "the budget is spent"
        if self._stagnant >= STAGNANT_ASKS:
            return f"{STAGNANT_ASKS} asks in a row brought no new recipe"
        return None

    def _is_hopeless(self) -> bool:
        failed = [
            asked
            for asked in self._untold
            if self.campaign.state.evaluation(asked.recipe_id, "search").failed is not None
        ]
        return not self._told and len(failed) >= HOPELESS_FAILURES

    # -- telling -------------------------------------------------------------------------------

    def _tell(self, state: CampaignState) -> None:
        """Tell of every candidate whose evaluation has ended, in the order in which they were asked for.

        A failed one counts as the worst until then, so it waits until another one is told.
        """
        for asked in list(self._untold):
            fitness = state.fitness(asked.recipe_id)
            if fitness is not None:
                self._tell_scored(asked, fitness, state)
        for asked in list(self._untold):
            failed = state.evaluation(asked.recipe_id, "search").failed
            if failed is not None and self._told:
                worst = 0.0 if state.objective == "pareto" else min(self._told.values())
                self.optimizer.tell_one(asked.point, worst, None)
                self._untold.remove(asked)

    def _tell_scored(self, asked: Asked, fitness: float, state: CampaignState) -> None:
        scores = state.task_scores(asked.recipe_id)
        assert scores is not None
        told = fitness
        if state.objective == "pareto":
            told = rank_fitness([scores], self._told_scores)[0]
        results = state.evaluation(asked.recipe_id, "search").results
        items = [
            float(results[task.name][item.id]["score"])
            for task in self.campaign.inputs.tasks
            for item in task.items["search"]
        ]
        self.optimizer.tell_one(asked.point, told, items)
        self._told[asked.recipe_id] = fitness
        self._told_scores.append(scores)
        self._untold.remove(asked)
