"""An evaluation's results have the same bits, in whatever pieces it was done."""

from __future__ import annotations

from typing import Any

from orchestrator.config import SHIPPED, load_config
from orchestrator.inputs import absolute_places, open_inputs
from workers.evaluation.task import Item, Task
from workers.evaluation_worker import EvaluationWorker, WorkerSpec
from workers.merging import passthrough_recipe


def test_an_interrupted_evaluation_gives_the_same_results() -> None:
    config = load_config(str(SHIPPED / "campaign" / "demo.yaml"))
    inputs = open_inputs(config)
    parents, base = absolute_places(inputs)
    written = inputs.tasks[0].items["search"][:40]
    letters = tuple("abcd")
    tasks = (
        Task("written", "exact_match", {"search": written}),
        Task(
            "chosen",
            "multiple_choice",
            {"search": tuple(Item(item.id, item.prompt, 0, letters) for item in written)},
        ),
    )
    references = (*inputs.references, inputs.base_reference)
    spec = WorkerSpec(
        parents=parents,
        base=base,
        fingerprints={r.name: r.fingerprint for r in references if r is not None},
        tasks=tasks,
        block_items=12,
        engine={"dtype": "float32", "batch_size": 5},
    )
    recipe = passthrough_recipe(inputs.references, "sort").to_dict()

    worker = EvaluationWorker(spec)
    description = worker.describe()
    assert (description["batch_size"], description["block_items"]) == (5, 12)
    whole = worker.evaluate(recipe, "search", {}, seconds=1e9)
    assert whole.complete

    pieces: dict[str, list[dict[str, Any]]] = {task.name: [] for task in tasks}
    calls, complete = 0, False
    while not complete:
        calls += 1
        if calls == 3:  # another worker goes on
            worker = EvaluationWorker(spec)
            assert worker.describe() == description
        finished = {name: [item["id"] for item in items] for name, items in pieces.items()}
        scored = worker.evaluate(recipe, "search", finished, seconds=0)
        complete = scored.complete
        for name, items in scored.items.items():
            pieces[name] += items
    assert calls == 8  # blocks: four of each task
    assert pieces == whole.items
