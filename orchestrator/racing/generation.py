"""The generations of a campaign, raced: everything that decides is recorded before it is acted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.ledger.state import Candidate
from orchestrator.racing.contest import Known, begin, complete_leaders, prepare, ranked
from orchestrator.racing.race import Chosen
from orchestrator.search import STEADY_OPTIMIZERS
from workers.errors import BadInputError

if TYPE_CHECKING:
    from orchestrator.campaign import Campaign
    from orchestrator.config import CampaignConfig
    from orchestrator.ledger.ledger import Record


class Racing:
    """Evaluates generations as `racing` says. What the ledger knows is not decided, nor asked, again."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self.config = campaign.config.racing
        self._candidates: dict[str, Candidate] = {}
        """Those of the generation, by recipe."""

    def evaluate(self, number: int, candidates: Sequence[Candidate], places: int) -> None:
        """Have the candidates of generation `number` told apart; the end of it is in `state.races.ended`.

        `places`: how many the optimizer wants to know, the best so many.
        """
        campaign, state = self.campaign, self.campaign.state
        recipes = list(dict.fromkeys(candidate.recipe_id for candidate in candidates))
        key = (number, len(recipes))
        if key in state.races.ended or not recipes:
            return
        if key not in state.races.begun:
            campaign.record("race", **self._beginning(number, recipes, places))
        record = state.races.begun[key]
        contest = begin(
            self.config,
            record["items"],
            recipes,
            record["places"],
            campaign.config.objective,
            state.weights,
        )
        self._candidates = {candidate.recipe_id: candidate for candidate in candidates}
        asked = {recipe: _copy(state.races.known_before(key, recipe)) for recipe in recipes}
        blocks = state.races.blocks[key]
        while not contest.ended:
            self._ask(contest.choose(), asked)
            contest.take(self._results(recipes))
            if contest.block < len(blocks):  # as it was decided then
                contest.stopped = dict(blocks[contest.block]["stopped"])
                contest.failed = set(blocks[contest.block]["failed"])
            else:
                campaign.record(
                    "block",
                    generation=number,
                    candidates=len(recipes),
                    block=contest.block,
                    stopped=dict(contest.stopped),
                    failed=sorted(contest.failed),
                    estimates=contest.estimates(),
                )
        estimates = blocks[-1]["estimates"]
        told = ranked(estimates, contest.stopped)
        everything = self._items()
        complete_leaders(
            told,
            state.fitness,
            lambda recipe: self._ask({recipe: everything}, asked),
            record["standing"],
            self._wanted(),
            self.config.leaders,
        )
        # Of leaders that an earlier driver has completed, too.
        asked |= {r: _copy(everything) for r in recipes if state.fitness(r) is not None}
        campaign.record(
            "raced",
            generation=number,
            candidates=len(recipes),
            stopped=contest.stopped,
            estimates=estimates,
            told=told,
            asked=sum(_count(asked[r]) - _count(state.races.known_before(key, r)) for r in recipes),
            of=sum(_count(everything) - _count(state.races.known_before(key, r)) for r in recipes),
        )

    def _beginning(self, number: int, recipes: Sequence[str], places: int) -> Record:
        """The content of a `race` record: what the results so far say of the items."""
        campaign, state = self.campaign, self.campaign.state
        parents = [recipe.id for recipe in campaign.parent_recipes.values()]
        earlier = [[c.recipe_id for c in generation] for generation in state.generations[:number]]
        known = [[self._known(recipe) for recipe in group] for group in (parents, *earlier)]
        return {
            "generation": number,
            "candidates": len(recipes),
            "places": places,
            "standing": self._standing(number),
            "items": prepare(self.config, self._items(), known, f"{campaign.config.seed}:{number}"),
        }

    def _known(self, recipe: str) -> Known:
        return self.campaign.state.evaluation(recipe, "search").results

    def _results(self, recipes: Sequence[str]) -> dict[str, Known]:
        """What those have answered that did not fail."""
        state = self.campaign.state
        evaluations = {recipe: state.evaluation(recipe, "search") for recipe in recipes}
        return {r: e.results for r, e in evaluations.items() if e.failed is None}

    def _ask(self, chosen: Mapping[str, Chosen], asked: dict[str, dict[str, set[str]]]) -> None:
        """Ask each candidate what it was not asked before this block.

        Not what is missing now: the batches of a block must be those of the driver that began it.
        """
        new: dict[str, Chosen] = {}
        for recipe, items in chosen.items():
            known = asked[recipe]
            new[recipe] = {
                task: [item for item in ids if item not in known.get(task, ())]
                for task, ids in items.items()
            }
            for task, ids in new[recipe].items():
                known.setdefault(task, set()).update(ids)
        campaign = self.campaign
        candidates = (self._candidates[recipe] for recipe in new)
        campaign.evaluate(map(campaign.recipe_of, candidates), "search", new)

    def _items(self) -> Chosen:
        """Every search item."""
        tasks = self.campaign.inputs.tasks
        return {task.name: [item.id for item in task.items["search"]] for task in tasks}

    def _wanted(self) -> int:
        """How many of the best must be known by all items: those that the next round is bred from."""
        breeding = self.campaign.config.breeding
        return breeding.survivors if breeding.rounds > 1 else 1

    def _standing(self, number: int) -> dict[str, float]:
        """The best candidates of the round before generation `number`, and their fitness."""
        state = self.campaign.state
        candidates = {
            candidate.recipe_id
            for generation, own in zip(state.generations[:number], state.round_of, strict=False)
            for candidate in generation
            if own == state.round_of[number]
        }
        fitness = {recipe: state.fitness(recipe) for recipe in sorted(candidates)}
        known = {recipe: value for recipe, value in fitness.items() if value is not None}
        return dict(sorted(known.items(), key=lambda one: -one[1])[: self._wanted()])


def check_can_race(config: CampaignConfig) -> None:
    """Raise `BadInputError` if the optimizer has no generations, in which candidates could race."""
    if config.racing.use != "none" and config.search.optimizer in STEADY_OPTIMIZERS:
        raise BadInputError(
            f"racing.use: {config.search.optimizer} asks for one candidate at a time, so there is nobody "
            "to race with: set it to none, or choose an optimizer with generations"
        )


def places_of(optimizer: object, candidates: Sequence[Candidate]) -> int:
    """How many of the best the optimizer goes by, as it says itself; else the better half."""
    return int(getattr(optimizer, "selected", None) or max(1, len(candidates) // 2))


def _copy(known: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    return {task: set(ids) for task, ids in known.items()}


def _count(known: Mapping[str, Sequence[str] | set[str]]) -> int:
    return sum(map(len, known.values()))
