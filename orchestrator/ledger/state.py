"""What a ledger says: the evaluations, generations and decisions of a campaign, read record by record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.ledger.item_scores import ItemScores, SharedIds
from orchestrator.ledger.ledger import Ledger, Record
from orchestrator.ledger.record_shapes import campaign_records
from orchestrator.ledger.standing import Standing
from orchestrator.racing.record import RACE_KINDS, Races
from orchestrator.statistics import Results, mean_score, objective
from orchestrator.watching.spending import Spending
from workers.storage import Store


@dataclass
class Evaluation:
    """All that is known about one recipe on one split."""

    results: dict[str, Results] = field(default_factory=dict)
    """Task -> item id -> result; of candidates that are done with, no more than `ItemScores` has."""
    complete: bool = False
    failed: str | None = None
    """Why it was given up."""
    seconds: float = 0.0
    repeated: bool = False
    """Whether an item is recorded more than once."""
    _scores: dict[str, float] | None = field(default=None, compare=False)

    def take(self, items: Mapping[str, list[dict[str, Any]]]) -> int:
        """Add these results, task -> results; how many items they are of that were not known."""
        new = 0
        for task, given in items.items():
            known = self.results.get(task, {})
            own: dict[str, Any] = known if isinstance(known, dict) else dict(known)
            before = len(own)
            own.update((item["id"], item) for item in given)
            self.results[task] = own
            new += len(own) - before
            self.repeated |= len(own) - before < len(given)
        self._scores = None
        return new

    def settle(self, shared: SharedIds) -> None:
        """Keep no more than `ItemScores` of each result."""
        for task, results in self.results.items():
            if isinstance(results, dict):
                self.results[task] = ItemScores(list(results.values()), shared)

    def take_settled(
        self, items: Mapping[str, list[dict[str, Any]]], shared: SharedIds
    ) -> int | None:
        """The same as `take` and `settle`, in one step; None, and nothing is done, where that cannot be: if
        there are results already, or an item is there twice."""
        if self.results:
            return None
        found = {task: ItemScores(given, shared) for task, given in items.items()}
        if any(len(found[task]) < len(given) for task, given in items.items()):
            return None
        self.results, self._scores = dict(found), None
        return sum(map(len, items.values()))

    def scores(self) -> dict[str, float]:
        """Task -> mean score, of a complete evaluation."""
        if self._scores is None:
            self._scores = {
                task: results.mean() if isinstance(results, ItemScores) else mean_score(results)
                for task, results in self.results.items()
            }
        return dict(self._scores)

    def has(self, chosen: Mapping[str, Iterable[str]] | None) -> bool:
        """Whether the chosen items, task -> item ids, are all finished; None: all there are."""
        return chosen is not None and all(
            set(items) <= self.results.get(task, {}).keys() for task, items in chosen.items()
        )

    @property
    def finished_items(self) -> dict[str, list[str]]:
        return {task: list(results) for task, results in self.results.items()}


@dataclass(frozen=True)
class Candidate:
    """A genome and the recipe that it decodes to."""

    genome: dict[str, float]
    recipe_id: str


class CampaignState:
    """The state of a campaign; `apply` takes the records in order, old ones and new ones alike."""

    def __init__(
        self,
        objective: str,
        records: Iterable[Record] = (),
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.objective = objective
        self.weights = weights or {}
        """Task -> its weight, for the objective `weighted`."""
        self.evaluations: dict[tuple[str, str], Evaluation] = {}
        """(recipe id, split) -> evaluation."""
        self.generations: list[list[Candidate]] = []
        """In a search without generations each candidate is one by itself."""
        self.is_steady = False
        """Whether the search has no generations; known when it has begun."""
        self.round_of: list[int] = []
        """The round of breeding of each generation; a campaign without breeding has one round."""
        self.rounds: dict[int, Record] = {}
        """Number -> what is recorded of a round when it begins: its parents, and its `limit`."""
        self.races = Races()
        self.failures = 0
        """Attempts that failed, whether or not another one succeeded."""
        self.items = 0
        """Different items that were scored, over all recipes and splits."""
        self.endings: list[str] = []
        """Recipes whose evaluation on search items came to an end, or whose race did, as that happened."""
        self.rewinds = 0
        """How often something that had come to an end was opened again."""
        self._asked: dict[int, int] = {}
        """Round -> how many generations it has asked for."""
        self._candidates: set[str] = set()
        self._gene_names: dict[str, str] = {}
        """One string for each, however many genomes have the gene."""
        self._failed: set[tuple[str, str]] = set()
        """Evaluations that were given up."""
        self._shared_ids: SharedIds = {}
        self._standings: dict[int, Standing] = {}
        self.spending = Spending()
        for record in records:
            self.apply(record)

    def judge_by(self, objective: str, weights: Mapping[str, float] | None) -> None:
        """Set what fitness is, where that is found in the very ledger that was read."""
        self.objective, self.weights = objective, weights or {}
        self._standings.clear()

    def apply(self, record: Record) -> None:
        """Take in one record."""
        self.spending.apply(record)
        if record["kind"] == "asked":
            asked = [self._candidate(c) for c in record["candidates"]]
            self.take_asked(asked, record.get("round", 1))
            self.is_steady = "number" in record
        elif record["kind"] in RACE_KINDS:
            self.races.apply(record, self.generations, self.evaluations)
            if record["kind"] == "raced":
                for recipe in record["told"]:
                    self.evaluation(recipe, "search").settle(self._shared_ids)
                    self.endings.append(recipe)
        elif record["kind"] == "round":
            self.rounds[record["round"]] = record
            self.rewinds += 1  # it may change what a budget pays for
        elif record["kind"] == "epoch":
            self._forgive()
        elif record["kind"] == "scored":
            self._take_scored(record)
        elif record["kind"] == "failed":
            self.failures += 1
            if record["given_up"]:
                key = record["recipe"], record["split"]
                evaluation = self.evaluation(*key)
                self.rewinds += evaluation.complete and evaluation.failed is None
                evaluation.complete, evaluation.failed = True, record["error"]
                self._failed.add(key)
                self._note_end(*key)

    def take_asked(self, asked: list[Candidate], number: int) -> None:
        """Take in one generation, of round `number`."""
        self.generations.append(asked)
        self._candidates.update(candidate.recipe_id for candidate in asked)
        self.round_of.append(number)
        self._asked[number] = self._asked.get(number, 0) + 1

    def _candidate(self, asked: Mapping[str, Any]) -> Candidate:
        name = self._gene_names.setdefault
        genome = {name(gene, gene): value for gene, value in asked["genome"].items()}
        return Candidate(genome, asked["recipe"])

    def _take_scored(self, record: Record) -> None:
        recipe, split = record["recipe"], record["split"]
        evaluation = self.evaluation(recipe, split)
        self.rewinds += evaluation.complete
        # A driver that replays what it has read once has no items in its records.
        items = record.get("items", {})
        is_done_with = record["complete"] and split == "search" and recipe in self._candidates
        new = evaluation.take_settled(items, self._shared_ids) if is_done_with else None
        if new is None:
            new = evaluation.take(items)
            if is_done_with:
                evaluation.settle(self._shared_ids)
        self.items += new
        evaluation.complete = record["complete"]
        evaluation.seconds += record["realize_seconds"] + record["score_seconds"]
        if evaluation.complete:
            self._note_end(recipe, split)

    def _note_end(self, recipe: str, split: str) -> None:
        if split == "search":
            self.endings.append(recipe)

    def _forgive(self) -> None:
        """A new driver tries again what must not fail for good: parents, held-out items, or everything
        if nothing has worked so far. Failed candidates of a search that went on stay failed, because
        the optimizer was told so."""
        hopeless = not any(
            self._worked(candidate.recipe_id) for asked in self.generations for candidate in asked
        )
        if hopeless:
            self.races.try_again()
            self.rewinds += 1
        for key in list(self._failed):
            recipe_id, split = key
            if split != "search" or hopeless or recipe_id not in self._candidates:
                evaluation = self.evaluations[key]
                evaluation.complete, evaluation.failed = False, None
                self._failed.remove(key)
                self.rewinds += 1

    def _worked(self, recipe_id: str) -> bool:
        """Whether the recipe has results on search items, of all of them or, if it raced, of some."""
        evaluation = self.evaluations.get((recipe_id, "search"))
        if evaluation is None or evaluation.failed is not None:
            return False
        return evaluation.complete or (recipe_id in self.races.runners and bool(evaluation.results))

    def is_settled(self, recipe_id: str) -> bool:
        """Whether nothing more is asked of it on search items: scored, told apart by a race, or failed."""
        evaluation = self.evaluations.get((recipe_id, "search"))
        return (evaluation is not None and evaluation.complete) or recipe_id in self.races.decided

    @property
    def has_scores(self) -> bool:
        """Whether anything was asked or scored, so that the campaign is what it is."""
        return bool(self.generations) or any(e.results for e in self.evaluations.values())

    def judged(self, parents: Iterable[str]) -> int:
        """How many different recipes, besides the `parents`, were scored on the held-out items."""
        return len({r for (r, split), e in self.evaluations.items()
                    if split == "holdout" and e.results} - set(parents))  # fmt: skip

    def evaluation(self, recipe_id: str, split: str) -> Evaluation:
        """The evaluation of a recipe on a split, begun or not."""
        found = self.evaluations.get((recipe_id, split))
        if found is None:
            found = self.evaluations[recipe_id, split] = Evaluation()
        return found

    def fitness(self, recipe_id: str) -> float | None:
        """Fitness on the search items; None if the evaluation failed or is not complete."""
        evaluation = self.evaluations.get((recipe_id, "search"))
        if evaluation is None or not evaluation.complete or evaluation.failed is not None:
            return None
        scores = evaluation.scores()
        weights = [self.weights[task] for task in scores] if self.objective == "weighted" else ()
        return objective(scores.values(), self.objective, weights)

    def task_scores(self, recipe_id: str) -> tuple[float, ...] | None:
        """The score on each task, in the order of the tasks' names; None if there is no fitness."""
        if self.fitness(recipe_id) is None:
            return None
        scores = self.evaluations[recipe_id, "search"].scores()
        return tuple(scores[task] for task in sorted(scores))

    def told_fitness(self, number: int, recipe_id: str) -> float | None:
        """What the optimizer is told of a candidate of generation `number`: its fitness, or the race's
        estimate of it; None if it failed."""
        told = self.races.told(number)
        return self.fitness(recipe_id) if told is None else told.get(recipe_id)

    def within_budget(self, budget: int) -> list[list[Candidate]]:
        """The candidates of each generation that the budget pays for, in the order they were asked.

        A recipe asked for again costs nothing, because it is not scored again. A round of breeding has
        spent, with those before it, no more than its limit.
        """
        return self._standing(budget).paid()

    def paid_of(self, number: int, budget: int) -> list[Candidate]:
        """The same of one generation; none if the budget was spent before it."""
        return self._standing(budget).paid_of(number)

    def _standing(self, budget: int) -> Standing:
        """How the search stands within a budget, as of now."""
        standing = self._standings.get(budget)
        if standing is None or standing.rewinds != self.rewinds:
            standing = self._standings[budget] = Standing(self, budget)
        standing.update()
        return standing

    def generations_through(self, number: int) -> int:
        """How many generations were asked for in this round of breeding and those before it."""
        return sum(count for own, count in self._asked.items() if own <= number)

    def round_of_recipe(self, recipe_id: str) -> int:
        """The round in which the recipe was asked for first."""
        return next(
            number
            for generation, number in zip(self.generations, self.round_of, strict=True)
            if any(candidate.recipe_id == recipe_id for candidate in generation)
        )

    def best_of_round(self, number: int, count: int, budget: int) -> list[Candidate]:
        """The fittest different candidates of a round; of equals those that were asked for first."""
        fitness: dict[str, float] = {}
        candidates: dict[str, Candidate] = {}
        for generation, own in zip(self.within_budget(budget), self.round_of, strict=False):
            for candidate in generation if own == number else ():
                value = self.fitness(candidate.recipe_id)
                if value is not None and candidate.recipe_id not in candidates:
                    fitness[candidate.recipe_id] = value
                    candidates[candidate.recipe_id] = candidate
        order = sorted(candidates, key=lambda recipe_id: -fitness[recipe_id])  # stable
        return [candidates[recipe_id] for recipe_id in order[:count]]

    def evaluated(self, budget: int) -> int:
        """How many different candidates within the budget were scored, told apart by a race, or have
        failed."""
        return self._standing(budget).settled

    def given_up(self, budget: int) -> int:
        """How many of them have failed."""
        return self._standing(budget).given_up

    @property
    def asked(self) -> int:
        """How many different candidates were asked for."""
        return len(self._candidates)

    def best(self, budget: int) -> tuple[Candidate, float] | None:
        """The fittest candidate, and its fitness; of equals the one that was asked for first."""
        return self._standing(budget).best


def read_campaign(store: Store) -> tuple[Ledger, CampaignState]:
    """The ledger of the campaign in `store`, without items, and what it says by the objective `mean`."""
    state = CampaignState("mean")
    return Ledger(store, state.apply, campaign_records()), state


def scored_record(recipe_id: str, split: str, worker: int, scored: Any) -> dict[str, Any]:
    """The content of a `scored` record."""
    return {
        "recipe": recipe_id,
        "split": split,
        "worker": worker,
        "items": scored.items,
        "complete": scored.complete,
        "realize_seconds": round(scored.realize_seconds, 6),
        "score_seconds": round(scored.score_seconds, 6),
    }
