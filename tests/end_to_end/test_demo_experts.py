"""The campaign `demo_experts` with a smaller budget: a transplant that a search found, and what it moved."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import load_file

from tests.campaigns import run_darwin
from workers.families import strings_moe

PARENTS = ["sort", "reverse", "shift"]
FAMILY = Path(strings_moe.__file__).parent


def test_a_transplant_beats_every_parent(tmp_path: Path) -> None:
    """In the mean and in the worst skill of held-out items; and nothing but routed experts, with the
    router's rows that call them, has moved."""
    items = [f"tasks.{number}.holdout_items=128" for number in range(3)]
    result = run_darwin("run", "demo_experts", f"store={tmp_path}", "search.evaluations=24", *items)
    scores = {
        name: [task["score"] for task in tasks.values()]
        for name, tasks in result["holdout"].items()
    }
    for parent in PARENTS:
        assert mean(scores["child"]) > mean(scores[parent])
        assert min(scores["child"]) > min(scores[parent])
    assert result["beaten"] == PARENTS

    child, father = (
        load_file(folder / "model.safetensors")
        for folder in (Path(result["child"]), FAMILY / PARENTS[0])
    )
    assert list(child) == list(father)
    moved = {name for name in child if not torch.equal(child[name], father[name])}
    assert moved and all(".mlp.experts." in name or ".mlp.gate." in name for name in moved)
