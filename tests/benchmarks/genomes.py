"""`make bench-genomes`: does a scan of the parents, or a ratio genome, find better children?

Searches of equal evaluations over specialists of a shipped family (pairs of the dense ones; or all three
mixtures of experts, where the question is what moving experts alone can reach), with the same items,
optimizer and method, for many seeds; and the best of each search on held-out items. Each search runs in this
process alone, without Ray, so that ten seeds take minutes.

    python -m tests.benchmarks.genomes [--family strings] [--seeds 10] [--evaluations 60] [--processes 2]
        [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context

from scipy.stats import wilcoxon

from orchestrator.config import CampaignConfig, config_from_dict
from orchestrator.genomes.build import build_space
from orchestrator.genomes.space import Space
from orchestrator.inputs import Inputs, open_inputs
from orchestrator.mri.prescribing import scan_and_prescribe
from orchestrator.pool.calls import LocalCalls
from orchestrator.search import build_optimizer
from orchestrator.statistics import objective
from workers.actors import MergeSpec, MergeWorker
from workers.evaluation import make_batches, score_batch
from workers.merging import Recipe

Scan = dict[str, bool]
SETUPS: dict[str, dict[str, tuple[str, Scan]]] = {
    "strings": {
        "components, no scan": ("components", {"static": False}),
        "darwin14, no scan": ("darwin14", {"static": False}),
        "darwin14, static MRI": ("darwin14", {}),
        "darwin14, static and probe": ("darwin14", {"probe": True}),
        "darwin14, probe": ("darwin14", {"static": False, "probe": True}),
    },
    "strings_moe": {
        "components, no scan": ("components", {"static": False}),
        "darwin14, static and probe": ("darwin14", {"probe": True}),
        "experts, no scan": ("experts", {"static": False}),
        "experts, probe": ("experts", {"static": False, "probe": True}),
    },
}
"""Family -> name -> genome space, and what of the parents is scanned; the probe's sets are those of the
parents' skills."""

PARENTS = {
    "strings": (("reverse", "sort"), ("reverse", "shift"), ("sort", "shift")),
    "strings_moe": (("sort", "reverse", "shift"),),
}
STEP = 0.25
BATCH = 128


@dataclass(frozen=True)
class Found:
    """What one search came to."""

    parents: tuple[str, ...]
    setup: str
    seed: int
    genes: int
    """That are searched: the trust is not where the scan tells nothing."""
    search: float
    holdout: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.genomes")
    parser.add_argument("--family", default="strings", choices=SETUPS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--items", type=int, default=128, help="search items of each task")
    parser.add_argument("--method", default="linear")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", help="keeps every result in this file")
    arguments = parser.parse_args()
    family = arguments.family
    jobs = list(product([family], PARENTS[family], SETUPS[family], range(arguments.seeds)))
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        given = [(*job, arguments.evaluations, arguments.items, arguments.method) for job in jobs]
        found = []
        for result in pool.map(search, *zip(*given, strict=True)):
            print(result, file=sys.stderr)
            found.append(result)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([vars(result) for result in found], file)
    print(table(family, found))


def search(
    family: str,
    parents: tuple[str, ...],
    setup: str,
    seed: int,
    evaluations: int,
    items: int,
    method: str,
) -> Found:
    """One search; the best candidate's fitness on the search items and on the held-out ones."""
    from workers.evaluation.engines.transformers_engine import TransformersEngine

    config = configuration(family, parents, setup, seed, items, method)
    inputs = open_inputs(config)
    space = space_of(inputs, config)
    optimizer = build_optimizer("cma_es", space.start, STEP, None, seed)
    engine = TransformersEngine(inputs.parents, inputs.base, dtype="float32")

    def fitness(recipe: Recipe, split: str) -> float:
        engine.realize(recipe)
        return objective(
            (
                statistics.mean(
                    result.score
                    for batch in make_batches(task.items[split], BATCH)
                    for result in score_batch(engine, task, batch)
                )
                for task in inputs.tasks
            ),
            config.objective,
        )

    scores: dict[str, tuple[float, Recipe]] = {}
    while len(scores) < evaluations and optimizer.stopped() is None:
        points = optimizer.ask()
        recipes = [space.decode(space.point(point)) for point in points]
        for recipe in recipes:
            if recipe.id not in scores and len(scores) < evaluations:
                scores[recipe.id] = fitness(recipe, "search"), recipe
        if any(recipe.id not in scores for recipe in recipes):
            break
        optimizer.tell(points, [scores[recipe.id][0] for recipe in recipes])
    best, recipe = max(scores.values(), key=lambda scored: scored[0])
    return Found(parents, setup, seed, len(space.genes), best, fitness(recipe, "holdout"))


def configuration(
    family: str, parents: tuple[str, ...], setup: str, seed: int, items: int, method: str
) -> CampaignConfig:
    space, scan = SETUPS[family][setup]
    return config_from_dict(
        {
            "name": "bench",
            "parents": [{"name": name, "path": f"shipped:{family}/{name}"} for name in parents],
            "base": f"shipped:{family}/base",
            "tasks": [{"name": name, "search_items": items} for name in parents],
            "genome": {"space": space, "method": method},
            "scan": scan | {"sets": [f"strings_{name}" for name in parents]},
            "objective": "worst",
            "seed": seed,
        }
    )


def space_of(inputs: Inputs, config: CampaignConfig) -> Space:
    """The campaign's space, with what the scan prescribes."""
    given = (
        config.genome, inputs.father_map, inputs.references, inputs.base_reference, config.seed,
        config.scan.scans,
    )  # fmt: skip
    space = build_space(*given, probes=config.scan.probe)
    if not space.to_prescribe:
        return space
    worker = MergeWorker(MergeSpec({}, None, {}))
    worker.parents, worker.base = inputs.parents, inputs.base
    prescription = scan_and_prescribe(config, inputs, space, LocalCalls(worker), None)
    return build_space(*given, prescription, probes=config.scan.probe)


def table(family: str, found: list[Found]) -> str:
    """Means over seeds, and each setup against the first one, seed by seed."""
    lines = [
        "| parents | genome space | genes | on search items | held out | against the first (p) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    setups = SETUPS[family]
    for parents, setup in product(PARENTS[family], setups):
        own = [f for f in found if (f.parents, f.setup) == (parents, setup)]
        first = [f for f in found if (f.parents, f.setup) == (parents, next(iter(setups)))]
        differences = [one.holdout - other.holdout for one, other in zip(own, first, strict=True)]
        against = ""
        if any(differences):
            p_value = wilcoxon(differences).pvalue
            against = f"{statistics.mean(differences):+.3f} ({p_value:.3f})"
        means = (
            f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
            for values in ([f.search for f in own], [f.holdout for f in own])
        )
        lines.append(
            f"| {' x '.join(parents)} | {setup} | {own[0].genes} | {' | '.join(means)} | {against} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
