"""The winner's curse: the best of many noisy scores is too high, by how much, and how much was to expect.

The child was chosen because it did best on the search items, by merit and by luck with those very
items; on items that did not choose it the luck is gone. The held-out score is the one that counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.ledger.state import CampaignState, Evaluation
from orchestrator.statistics import objective

RESAMPLES = 500
SEED = 0


def winners_curse(
    state: CampaignState, chosen: str, candidates: Iterable[str], parents: dict[str, str]
) -> dict[str, Any]:
    """Search scores beside held-out ones, of the chosen recipe and of the `parents` (name -> recipe).

    `shrinkage` is search minus held-out. `expected` is what `expected_shrinkage` finds for the choice
    among those of the `candidates` that were scored on all search items. Parents were not chosen by the
    search items: what they lose tells how much harder the held-out items are.
    """
    kind = state.objective
    models = {"child": chosen, **parents}
    found: dict[str, dict[str, Any]] = {}
    for name, recipe in models.items():
        search, held_out = (
            _scores(state.evaluation(recipe, split), kind, state.weights)
            for split in ("search", "holdout")
        )
        found[name] = {"search": search, "holdout": held_out, "shrinkage": None}
        if search is not None and held_out is not None:
            found[name]["shrinkage"] = {
                "objective": search["objective"] - held_out["objective"],
                "tasks": {
                    task: value - held_out["tasks"][task] for task, value in search["tasks"].items()
                },
            }
    scored = [
        state.evaluation(recipe, "search")
        for recipe in dict.fromkeys([chosen, *candidates])
        if _covers(state.evaluation(recipe, "search"), state.evaluation(chosen, "search"))
    ]
    return {
        "models": found,
        "candidates": len(scored),
        "expected": expected_shrinkage(
            [evaluation.results for evaluation in scored], kind, state.weights
        ),
        "resamples": RESAMPLES,
    }


def expected_shrinkage(
    candidates: list[dict[str, Any]], kind: str, weights: Mapping[str, float]
) -> float | None:
    """How much of the best candidate's objective comes from choosing it by these items; an estimate.
    None if a task has but one item, as a draw then leaves none to score on.

    `candidates` hold task -> item id -> result, all of the same items. The choice is made again on items
    drawn with replacement, and scored on the items that were not drawn; how much less that is than the
    best score of all, in the mean of the draws, is expected to be lost on new items (the bootstrap
    bias correction of Tsamardinos, Greasidou and Borboudakis 2018, Machine Learning 107, which keeps
    the candidates' scores paired by item). Rather too much than too little: a draw holds 63 % of the
    items, and chooses worse than all do.
    """
    import numpy

    chance = numpy.random.Generator(numpy.random.PCG64(SEED))
    drawn, left, whole = [], [], []
    leaves = numpy.ones(RESAMPLES, dtype=bool)
    for task in candidates[0]:
        items = sorted(candidates[0][task])
        scores = numpy.array(
            [[results[task][item]["score"] for item in items] for results in candidates],
            dtype=numpy.float32,
        )
        draws = chance.multinomial(len(items), [1 / len(items)] * len(items), RESAMPLES)
        times = draws.astype(numpy.float32).T
        rest = (times == 0).astype(numpy.float32)
        leaves &= rest.any(axis=0)
        drawn.append(scores @ times / len(items))
        left.append(scores @ rest / numpy.maximum(rest.sum(axis=0), 1))
        whole.append(scores.mean(axis=1))

    def combined(scores: list[Any]) -> Any:
        if kind == "worst":
            return numpy.min(scores, axis=0)
        return numpy.average(scores, 0, [weights.get(task, 1.0) for task in candidates[0]])

    if not leaves.any():
        return None
    winners = combined(drawn).argmax(axis=0)
    elsewhere = combined(left)[winners, numpy.arange(RESAMPLES)][leaves]
    return max(0.0, float(combined(whole).max() - elsewhere.mean()))


def _scores(
    evaluation: Evaluation, kind: str, weights: Mapping[str, float]
) -> dict[str, Any] | None:
    """Task -> score, and the objective; None if it was not scored to the end."""
    if not evaluation.complete or evaluation.failed is not None:
        return None
    scores = evaluation.scores()
    of_tasks = [weights.get(task, 1.0) for task in scores]
    return {"objective": objective(scores.values(), kind, of_tasks), "tasks": scores}


def _covers(evaluation: Evaluation, other: Evaluation) -> bool:
    """Whether it has a result for each item that the other has one for."""
    return evaluation.failed is None and all(
        other.results[task].keys() <= evaluation.results.get(task, {}).keys()
        for task in other.results
    )
