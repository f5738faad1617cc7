"""What racing saves: item evaluations until a search is as good as one that asks every item.

The demo campaign's search (`worst` of three skills, 128 items each) for many seeds, in this process alone:
once with every candidate asked every item, then with racing and with item response theory until they have
found a candidate that is as good **on all search items**, which is known of those alone that were asked all
of them. What finding that out costs is counted. Nothing is asked but what is counted, except that answers
that the full search of the seed was given are not asked for again.

    python -m tests.benchmarks.racing [--seeds 20] [--evaluations 200] [--processes 2] [--json FILE]
        [--setup NAME=KEY:VALUE,...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from multiprocessing import get_context
from typing import Any

import yaml

from orchestrator.config import SHIPPED, CampaignConfig, config_from_dict
from orchestrator.genomes.build import build_space
from orchestrator.inputs import Inputs, open_inputs
from orchestrator.ledger.state import Candidate
from orchestrator.objectives import task_weights
from orchestrator.racing.contest import Known, begin, complete_leaders, prepare, ranked
from orchestrator.racing.generation import places_of
from orchestrator.racing.race import Chosen
from orchestrator.racing_config import RacingConfig
from orchestrator.search import Optimizer, build_optimizer
from orchestrator.statistics import Results, mean_score, objective
from workers.evaluation import choose_items, make_batches, score_batch
from workers.merging import Recipe, passthrough_recipe

SETUPS: dict[str, dict[str, Any]] = {
    "racing": {"use": "race"},
    "racing, every item equally likely": {"use": "race", "random_share": 1.0},
    "item response theory": {"use": "irt"},
}
BATCH = 128
MOST = 1.0
"""A search that has asked this share of the full one's items without being as good has failed."""


@dataclass(frozen=True)
class Found:
    """What one search came to."""

    setup: str
    seed: int
    target: float
    """What the full search reached, on all search items."""
    full: int
    """Items that it asked."""
    full_first: int
    """Items that it had asked when it had that, which nobody knew then."""
    best: float
    asked: int
    candidates: int
    holdout: float
    full_holdout: float

    @property
    def reached(self) -> bool:
        return self.best >= self.target

    @property
    def share(self) -> float:
        """Of the full search's items; infinite if it was not as good."""
        return self.asked / self.full if self.reached else float("inf")


class Laboratory:
    """The demo's candidates, asked one item at a time and never twice."""

    def __init__(self, seed: int) -> None:
        from workers.evaluation.engines.transformers_engine import TransformersEngine

        demo = yaml.safe_load((SHIPPED / "campaign" / "demo.yaml").read_text())
        self.config: CampaignConfig = config_from_dict(demo | {"seed": seed})
        self.inputs: Inputs = open_inputs(self.config)
        references, base = self.inputs.references, self.inputs.base_reference
        self.space = build_space(
            self.config.genome, self.inputs.father_map, references, base, seed, scans=False
        )
        self.engine = TransformersEngine(self.inputs.parents, self.inputs.base, dtype="float32")
        self._answers: dict[tuple[str, str], dict[str, Results]] = {}
        self._realized = ""

    def optimizer(self) -> Optimizer:
        search = self.config.search
        return build_optimizer(
            search.optimizer, self.space.start, search.step, search.population, self.config.seed
        )

    @cached_property
    def items(self) -> Chosen:
        return {task.name: [i.id for i in task.items["search"]] for task in self.inputs.tasks}

    @cached_property
    def parents(self) -> list[Recipe]:
        return [passthrough_recipe(self.inputs.references, name) for name in self.inputs.parents]

    def ask(self, recipe: Recipe, chosen: Chosen, split: str = "search") -> Known:
        """The results of the chosen items."""
        known = self._answers.setdefault((recipe.id, split), {})
        for task in self.inputs.tasks:
            own = known.setdefault(task.name, {})
            missing = {task.name: [i for i in chosen[task.name] if i not in own]}
            for batch in make_batches(choose_items(task.items[split], missing, task.name), BATCH):
                if self._realized != recipe.id:
                    self.engine.realize(recipe)
                    self._realized = recipe.id
                own.update((r.id, r.to_dict()) for r in score_batch(self.engine, task, batch))
        return {task: {item: known[task][item] for item in ids} for task, ids in chosen.items()}

    def fitness(self, recipe: Recipe, split: str = "search") -> float:
        """On every item of the split."""
        items = {task.name: [i.id for i in task.items[split]] for task in self.inputs.tasks}
        return self.combine(self.ask(recipe, items, split))

    def combine(self, results: Known) -> float:
        return objective(map(mean_score, results.values()), self.config.objective)


class Search:
    """One search of the laboratory's, counting what it asks."""

    def __init__(self, laboratory: Laboratory, config: RacingConfig) -> None:
        self.laboratory = laboratory
        self.config = config
        self.optimizer = laboratory.optimizer()
        self.recipes: dict[str, Recipe] = {}
        self.known: dict[str, dict[str, Results]] = {}
        """Recipe -> what this search has asked it."""
        self.fitness: dict[str, float] = {}
        """Of those that were asked every item."""
        self.asked = 0
        self.history = [[laboratory.ask(parent, laboratory.items) for parent in laboratory.parents]]
        self.best_after: list[tuple[int, float]] = []
        """(items asked, best fitness that is known) whenever it rose."""

    @property
    def best(self) -> float:
        return self.best_after[-1][1] if self.best_after else 0.0

    def ask(self, recipe_id: str, chosen: Chosen) -> None:
        known = self.known.setdefault(recipe_id, {task: {} for task in self.laboratory.items})
        before = sum(map(len, known.values()))
        for task, results in self.laboratory.ask(self.recipes[recipe_id], chosen).items():
            known[task].update(results)
        self.asked += sum(map(len, known.values())) - before
        if all(len(known[task]) == len(ids) for task, ids in self.laboratory.items.items()):
            self.fitness[recipe_id] = self.laboratory.combine(known)
            if self.fitness[recipe_id] > self.best:
                self.best_after.append((self.asked, self.fitness[recipe_id]))

    def winner(self) -> Recipe:
        return self.recipes[max(self.fitness, key=lambda recipe: self.fitness[recipe])]

    def run(self, evaluations: int | None, target: float, most: float) -> None:
        """Until so many candidates, the target, or that many items."""
        generation = 0
        while self.optimizer.stopped() is None and self.best < target and self.asked < most:
            points = self.optimizer.ask()
            space = self.laboratory.space
            recipes = [space.decode(space.point(point)) for point in points]
            ids = list(dict.fromkeys(recipe.id for recipe in recipes))
            left = None if evaluations is None else evaluations - len(self.recipes)
            self.recipes |= {r.id: r for r in recipes[:left]}
            paid = [recipe for recipe in ids if recipe in self.recipes]
            told = self.decide(paid, generation)
            if len(paid) < len(ids):
                return
            self.optimizer.tell(points, [told[recipe.id] for recipe in recipes])
            generation += 1

    def decide(self, ids: list[str], generation: int) -> Mapping[str, float]:
        """Ask the generation as the configuration says; what the optimizer is told."""
        items = self.laboratory.items
        if self.config.use == "none":
            for recipe in ids:
                self.ask(recipe, items)
            return {recipe: self.fitness[recipe] for recipe in ids}
        standing = {r: f for r, f in self.fitness.items() if f == self.best}
        seed = f"{self.laboratory.config.seed}:{generation}"
        contest = begin(
            self.config,
            prepare(self.config, items, self.history, seed),
            ids,
            places_of(self.optimizer, [Candidate({}, recipe) for recipe in ids]),
            self.laboratory.config.objective,
            task_weights(self.laboratory.config),
        )
        while not contest.ended:
            for recipe, chosen in contest.choose().items():
                self.ask(recipe, chosen)
            contest.take({recipe: self.known[recipe] for recipe in ids})
        told = ranked(contest.estimates(), contest.stopped)
        complete_leaders(
            told,
            self.fitness.get,
            lambda recipe: self.ask(recipe, items),
            dict(list(standing.items())[:1]),
            1,
            self.config.leaders,
        )
        self.history.append([self.known[recipe] for recipe in ids])
        return told


def measure(seed: int, evaluations: int, setups: Mapping[str, Mapping[str, Any]]) -> list[Found]:
    """The full search of a seed, and the others against it."""
    laboratory = Laboratory(seed)
    full = Search(laboratory, RacingConfig())
    full.run(evaluations, float("inf"), float("inf"))
    held_out = laboratory.fitness(full.winner(), "holdout")
    found = []
    for name, changes in setups.items():
        search = Search(laboratory, RacingConfig(**changes))
        search.run(None, full.best, MOST * full.asked)
        found.append(
            Found(
                name, seed, full.best, full.asked, full.best_after[-1][0], search.best, search.asked,
                len(search.recipes), laboratory.fitness(search.winner(), "holdout"), held_out,
            )
        )  # fmt: skip
        print(found[-1], f"share {found[-1].share:.3f}", file=sys.stderr, flush=True)
    return found


def table(found: list[Found]) -> str:
    """Medians over the seeds."""
    lines = [
        "| search | as good in | items asked, of the full search's: median (quartiles) | worst seed | "
        "of those until the full search had its best | candidates | held out: full, this |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for setup in dict.fromkeys(one.setup for one in found):
        own = [one for one in found if one.setup == setup]
        shares = sorted(one.share for one in own)
        quarter = [shares[len(shares) * k // 4] for k in (1, 3)]
        early = [one.asked / one.full_first if one.reached else float("inf") for one in own]
        lines.append(
            f"| {setup} | {sum(one.reached for one in own)} of {len(own)} | "
            f"{statistics.median(shares):.3f} ({quarter[0]:.3f} to {quarter[1]:.3f}) | {shares[-1]:.3f} | "
            f"{statistics.median(early):.2f} | {statistics.median(o.candidates for o in own):.0f} | "
            f"{statistics.median(o.full_holdout for o in own):.3f}, "
            f"{statistics.median(o.holdout for o in own):.3f} |"
        )
    return "\n".join(lines)


def parse_setup(text: str) -> tuple[str, dict[str, Any]]:
    name, _, changes = text.partition("=")
    pairs = (pair.partition(":") for pair in changes.split(","))
    return name, {key: yaml.safe_load(value) for key, _, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.racing")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--evaluations", type=int, default=200, help="of the full search")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--setup", action="append", type=parse_setup, help="instead of the usual")
    parser.add_argument("--json", help="keeps every result in this file")
    arguments = parser.parse_args()
    setups = dict(arguments.setup) if arguments.setup else SETUPS
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        jobs = product(seeds, [arguments.evaluations], [setups])
        found = [one for own in pool.map(measure, *zip(*jobs, strict=True)) for one in own]
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([asdict(one) for one in found], file)
    print(table(found))


if __name__ == "__main__":
    main()
