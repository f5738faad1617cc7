"""Experts matched by real Ray workers before a merge."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.campaigns import run_darwin
from tests.checkpoint_files import files_of
from tests.expert_parents import copy_reordered, inverse
from tests.families import write_model

ORDERS = {0: (2, 0, 1, 3), 2: (3, 2, 1, 0)}


def test_two_workers_match_and_merge_as_one_machine_does(tmp_path: Path) -> None:
    """Hidden states go from the worker that runs the father to those that compare, layer by layer."""
    tuned = write_model(tmp_path / "tuned", "qwen3_moe", 1, spread=0.01)
    parents = {
        "father": write_model(tmp_path / "father", "qwen3_moe", 0),
        "mother": copy_reordered(tuned, tmp_path / "mother", ORDERS),
    }
    prompts = tmp_path / "letters.jsonl"
    prompts.write_text(
        '{"id": "1", "conditioned": "what is this?", "generic": "who are you then"}\n'
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "parents": [{"name": n, "path": str(p)} for n, p in parents.items()],
                "match_experts": "outputs",
                "sets": [str(prompts)],
                "rules": [
                    {
                        "method": "passthrough",
                        "where": {"components": ["expert"], "experts": [0, 1]},
                        "parameters": {"source": "mother"},
                    },
                    {"method": "as_experts", "where": {"components": ["router"]}},
                ],
            }
        )
    )
    run_darwin("merge", str(recipe), str(tmp_path / "here"))
    run_darwin("merge", str(recipe), str(tmp_path / "there"), "--workers", "2")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
    lineage = json.loads((tmp_path / "there" / "lineage.json").read_text())
    wanted = {str(layer): list(inverse(order)) for layer, order in ORDERS.items()}
    assert lineage["recipe"]["experts"] == {"mother": wanted}
    assert lineage["matching"]["donors"]["mother"]["poor"] == []
