"""`darwin eval`: evaluate a checkpoint, compare it with others, and write the results down."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from orchestrator.evaluating.comparing import check_comparable, compare_evaluations
from orchestrator.evaluating.evaluation import Evaluation, Recorded, Wish, find_stored
from orchestrator.evaluating.running import Machines, run_evaluation
from orchestrator.evaluating.summary import summarize_task, warnings
from orchestrator.places import open_parent
from orchestrator.progress_bar import steps_bar
from orchestrator.reporting.items import ITEMS_FILE, item_columns, write_items
from workers.errors import BadInputError
from workers.evaluation.protocols import check_fits, protocol_label
from workers.evaluation.protocols.retrying import ConfidenceRetry
from workers.storage import Store, open_store

FORMAT = "darwin-eval-1"
RESULT_FILE = "result.json"


def evaluate_checkpoint(
    location: str, wish: Wish, against: list[str], out: str, machines: Machines
) -> dict[str, Any]:
    """The result as plain data: the checkpoint's summary, and its comparison with each of `against`.

    These are checkpoints, which are evaluated too, or places of earlier evaluations. Raises
    `BadInputError` for what cannot work; of that as much as can be known is told before anything runs.
    """
    _check_wish(wish)
    store = open_store(out)
    evaluation = Evaluation(open_parent(location), wish)
    others = [_open_other(place, evaluation) for place in against]
    own, result = _evaluate(evaluation, store, machines)
    compared = []
    for other in others:
        if isinstance(other, Evaluation):
            other, _ = _evaluate(other, store, machines)
        compared.append(compare_evaluations(own, other))
    told = [warning for one in compared for warning in one.pop("warnings")]
    warned = [*result.pop("warnings"), *told]
    return {"status": "done", **result, "against": compared, "warnings": warned}


def _check_wish(wish: Wish) -> None:
    for task in wish.tasks:
        check_fits(wish.protocol, task)
    protocol = wish.protocol
    if isinstance(protocol, ConfidenceRetry) and protocol.dev_items and wish.split == "search":
        raise BadInputError(
            "--dev-items: are search items, on which the threshold is fixed: items that fix it cannot be "
            "judged by it, so evaluate on --split holdout"
        )


def _open_other(place: str, evaluation: Evaluation) -> Evaluation | Recorded:
    """What is compared with; a wrong place must not be found out after hours."""
    stored = find_stored(place)
    if stored is None:
        if evaluation.wish.engine.get("kind") == "openai":
            raise BadInputError(
                f"--against {place}: the server at --base-url has one checkpoint, not this one too; evaluate "
                "it at its own server first, and give the STORE/eval/NAME where that is kept"
            )
        return Evaluation(open_parent(place), evaluation.wish)
    check_comparable(evaluation.identity, stored)
    return stored


def _evaluate(
    evaluation: Evaluation, out: Store, machines: Machines
) -> tuple[Recorded, dict[str, Any]]:
    """Evaluate one checkpoint, or find that it was; its results and their summary."""
    wish = evaluation.wish
    total = sum(len(task.items[wish.split]) for task in wish.tasks)
    if isinstance(wish.protocol, ConfidenceRetry) and wish.protocol.dev_items:
        total += sum(len(task.items["search"]) for task in wish.tasks)
    title = f"evaluating {evaluation.checkpoint.location}"
    with steps_bar(title, total, "items") as notify:
        recorded = run_evaluation(evaluation, out, machines, _say, notify)
    result = _summarize(recorded, wish)
    store = evaluation.store(out)
    if next(store.list_objects(RESULT_FILE), None) is None:
        write_items(store, ITEMS_FILE, _rows(recorded, protocol_label(wish.protocol)))
        store.write(RESULT_FILE, json.dumps(result, indent=2).encode())
    return recorded, result


def _summarize(recorded: Recorded, wish: Wish) -> dict[str, Any]:
    tasks = {
        task.name: summarize_task(
            task, task.items[wish.split], recorded.results[task.name], wish.protocol
        )
        for task in wish.tasks
    }
    limits = {
        task.name: None if task.lm_eval else task.decoding.max_new_tokens for task in wish.tasks
    }
    return {
        "format": FORMAT,
        "evaluation": recorded.place,
        "checkpoint": recorded.location,
        "content": recorded.identity["checkpoint"],
        "split": wish.split,
        "protocol": recorded.identity["protocol"],
        "seed": wish.protocol.seed,
        "uses_gold_labels": wish.protocol.uses_gold_labels,
        "thresholds": recorded.thresholds,
        "tasks": tasks,
        "engine": recorded.description,
        "warnings": warnings(tasks, limits),
    }


def _rows(recorded: Recorded, protocol: str) -> Iterator[dict[str, Any]]:
    """The items for the Parquet file."""
    about = {
        "name": recorded.location,
        "split": recorded.identity["split"],
        "protocol": protocol,
    }
    for task, results in recorded.results.items():
        for result in results.values():
            yield {**about, "task": task, **item_columns(result)}


def _say(text: str) -> None:
    print(text, file=sys.stderr)
