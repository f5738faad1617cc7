"""A search without generations: whenever a worker is free it is asked for one more candidate, and each is
told as it lands.

The ledger is the whole truth of its order: an `asked` record is an ask of the optimizer, and the record that
ends an evaluation is a tell. A resumed driver reads the records one by one and does to the optimizer what
the earlier one did; then it goes on where that one stopped, first with what was asked and not scored.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.breeding import limit_of
from orchestrator.errors import all_failed, not_repeated
from orchestrator.flat_fitness import FlatFitness, flat_among
from orchestrator.genomes.space import Space
from orchestrator.ledger.item_scores import scores_of
from orchestrator.ledger.state import CampaignState, Candidate
from orchestrator.pareto import Scores, rank_fitness
from orchestrator.pool.pool import Job
from orchestrator.search import SteadyOptimizer

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
    candidate: Candidate

    @property
    def recipe_id(self) -> str:
        return self.candidate.recipe_id


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
        self._search_items = {
            task.name: [item.id for item in task.items["search"]] for task in campaign.inputs.tasks
        }
        self._untold: dict[int, Asked] = {}
        """By the number of the ask, in their order."""
        self._asks_for: dict[str, list[int]] = {}
        """Recipe -> the untold asks for it."""
        self._asks = 0
        self._ended: set[int] = set()
        """Untold asks whose evaluation came to an end."""
        self._endings = 0
        """So many of the state's are taken in."""
        self._waiting: deque[Asked] = deque()
        """Those that the pool may not have got yet, in their order."""
        self._told: dict[str, float] = {}
        """Recipe -> fitness, of those that were scored."""
        self._told_scores: list[Scores] = []
        """Of the same, one score for each task."""
        self._worst = math.inf
        """The lowest fitness of them."""
        self._distinct: set[Any] = set()
        """What of them tells one from another: their fitness, or their scores."""
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
            first = next(iter(self._untold.values()))
            reason = self.campaign.state.evaluation(first.recipe_id, "search").failed
            raise all_failed("so far has", reason)
        reason_to_end = self._reason_to_end()
        assert reason_to_end is not None
        return reason_to_end

    # -- what the ledger knows -----------------------------------------------------------------

    def _replay(self) -> None:
        """Ask and tell the optimizer what is recorded, each time knowing only what was known then.

        The records have no items, but a score that is complete stays as it is: when it was is what matters.
        """
        campaign = self.campaign
        past = CampaignState(campaign.config.objective, (), campaign.weights)
        asked = iter(campaign.state.generations)
        for record in campaign.ledger.records:
            if record["kind"] == "asked":
                number, candidates = record.get("round", 1), next(asked)
                past.take_asked(candidates, number)
                if number < self.round:
                    self._known.add(candidates[0].recipe_id)
                elif number == self.round:
                    self._ask_again(candidates[0], f"ask {record['number']}", past)
            else:
                past.apply(record)
            self._tell(past)

    def _ask_again(self, candidate: Candidate, what: str, past: CampaignState) -> None:
        point = self.optimizer.ask_one()
        genome = self.space.point(point)
        if genome != candidate.genome or (
            # The other recipes are checked when they are wanted.
            self._asks == 0 and self.campaign.decode(genome).id != candidate.recipe_id
        ):
            raise not_repeated(self.campaign.store.uri, what)
        self._note(point, candidate, past)

    # -- asking --------------------------------------------------------------------------------

    def _next_job(self) -> Job | None:
        """What to evaluate next: of what is asked for already, else of the optimizer. None for now if
        there is nothing."""
        campaign, state = self.campaign, self.campaign.state
        while True:
            while self._waiting:
                asked = self._waiting.popleft()
                evaluation = state.evaluation(asked.recipe_id, "search")
                if asked.recipe_id not in self._given and not evaluation.complete:
                    self._given.add(asked.recipe_id)
                    recipe = campaign.recipe_of(asked.candidate)
                    return Job(recipe.id, recipe, "search", finished=evaluation.finished_items)
            if self._reason_to_end() is not None or self._is_hopeless():
                return None
            point = self.optimizer.ask_one()
            genome = self.space.point(point)
            recipe = campaign.know(campaign.decode(genome))
            campaign.record(
                "asked",
                number=len(state.generations),
                **({"round": self.round} if campaign.config.breeding.rounds > 1 else {}),
                candidates=[{"genome": genome, "recipe": recipe.id}],
            )
            self._note(point, state.generations[-1][0], state)
            self._tell(state)  # of a recipe that is known nothing need be evaluated

    def _note(self, point: list[float], candidate: Candidate, state: CampaignState) -> None:
        recipe_id = candidate.recipe_id
        self._stagnant = self._stagnant + 1 if recipe_id in self._known else 0
        self._known.add(recipe_id)
        number, asked = self._asks, Asked(point, candidate)
        self._asks += 1
        self._untold[number] = asked
        self._asks_for.setdefault(recipe_id, []).append(number)
        self._waiting.append(asked)
        if state.is_settled(recipe_id):
            self._ended.add(number)

    def _reason_to_end(self) -> str | None:
        """Why nothing more is asked for, as things stand; what still runs may change it."""
        config, tasks = self.campaign.config, self.campaign.inputs.tasks
        self.flat = None
        if len(self._distinct) <= 1:
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
        state = self.campaign.state
        failed = [
            number
            for number in self._ended
            if state.evaluation(self._untold[number].recipe_id, "search").failed is not None
        ]
        return not self._told and len(failed) >= HOPELESS_FAILURES

    # -- telling -------------------------------------------------------------------------------

    def _tell(self, state: CampaignState) -> None:
        """Tell of every candidate whose evaluation has ended, in the order in which they were asked for.

        A failed one counts as the worst until then, so it waits until another one is told.
        """
        for place in range(self._endings, len(state.endings)):
            self._ended.update(self._asks_for.get(state.endings[place], ()))
        self._endings = len(state.endings)
        if not self._ended:
            return
        failed = []
        for number in sorted(self._ended):
            evaluation = state.evaluation(self._untold[number].recipe_id, "search")
            if not evaluation.complete:
                self._ended.remove(number)  # it failed, and is tried again
            elif evaluation.failed is not None:
                failed.append(number)
            else:
                self._tell_scored(number)
        for number in failed if self._told else ():
            worst = 0.0 if state.objective == "pareto" else self._worst
            self.optimizer.tell_one(self._untold[number].point, worst, None)
            self._forget(number)

    def _tell_scored(self, number: int) -> None:
        state, asked = self.campaign.state, self._untold[number]
        fitness, scores = state.fitness(asked.recipe_id), state.task_scores(asked.recipe_id)
        assert fitness is not None
        assert scores is not None
        told = fitness
        if state.objective == "pareto":
            told = rank_fitness([scores], self._told_scores)[0]
        results = state.evaluation(asked.recipe_id, "search").results
        items = [
            score
            for task, ids in self._search_items.items()
            for score in scores_of(results[task], ids)
        ]
        self.optimizer.tell_one(asked.point, told, items)
        self._told[asked.recipe_id] = fitness
        self._told_scores.append(scores)
        self._worst = min(self._worst, fitness)
        self._distinct.add(scores if state.objective == "pareto" else fitness)
        self._forget(number)

    def _forget(self, number: int) -> None:
        """Keep no more of an ask that is told."""
        asked = self._untold.pop(number)
        self._ended.remove(number)
        self._asks_for[asked.recipe_id].remove(number)
        if not self._asks_for[asked.recipe_id]:
            del self._asks_for[asked.recipe_id]
            self.campaign.forget([asked.recipe_id])
