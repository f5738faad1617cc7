"""Matching before a merge without a search."""

from __future__ import annotations

import sys

from orchestrator.experts.matching import Matching, match_experts
from orchestrator.pool.calls import open_calls
from orchestrator.recipe_file import RecipeFile
from orchestrator.workers_config import WorkersConfig


def match_recipe(
    loaded: RecipeFile, workers: WorkersConfig | None, address: str | None
) -> Matching | None:
    """Match the experts of a recipe file's parents if it asks for that, and say what came of it."""
    if loaded.match is None:
        return None
    with open_calls(loaded.parents, loaded.base, workers, address) as calls:
        matching = match_experts(loaded.parents, loaded.match.by, loaded.match.sets, calls)
    for note in matching.notes:
        print(f"darwin: {note}", file=sys.stderr)
    return matching
