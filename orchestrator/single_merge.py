"""One merge without a search: `darwin merge`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from orchestrator.calls import open_calls
from orchestrator.child_writer import PROGRESS, ChildWriter
from orchestrator.config import WorkersConfig
from orchestrator.descent.family_tree import add_ancestry
from orchestrator.descent.lineage import (
    LINEAGE_FILE,
    LINEAGE_FORMAT,
    hub_source,
    licence_of,
    lineage_bytes,
    package_version,
)
from orchestrator.experts.matched_merge import match_recipe
from orchestrator.progress_bar import progress_bar
from orchestrator.recipe_file import load_recipe_file
from workers.checkpoints import Checkpoint
from workers.errors import BadInputError
from workers.storage import Store, open_store


def merge_recipe(
    path: str,
    out: str,
    workers: WorkersConfig | None = None,
    address: str | None = None,
    parents: dict[str, str] | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Write the child of a recipe file into the place `out`; what was written.

    Places of `parents`, by name, and of the `base` count instead of those in the file.

    With `workers`, parts of it are merged by actors on the Ray cluster at `address`, or on this
    machine; else by processes of this one. A merge that was interrupted goes on at the parts that are
    missing. Raises `BadInputError` for a recipe that cannot work and for a place that holds anything
    else.
    """
    loaded = load_recipe_file(path, parents, base)
    target = open_store(out)
    _check_place(target)
    writer = ChildWriter.create(loaded.recipe, loaded.parents, loaded.base, target)
    matching = match_recipe(loaded, workers, address)
    if matching is not None:
        loaded = replace(loaded, recipe=replace(loaded.recipe, experts=matching.orders))
        writer = ChildWriter.create(loaded.recipe, loaded.parents, loaded.base, target)
    for warning in [*loaded.warnings, *writer.plan.warnings]:
        print(f"darwin: warning: {warning}", file=sys.stderr)
    with (
        open_calls(
            loaded.parents,
            loaded.base,
            workers,
            address,
            lambda worker: worker.start(loaded.recipe),
        ) as calls,
        progress_bar(f"merging {len(loaded.parents)} parents", writer.total_bytes) as notify,
    ):
        report = writer.write(calls, notify)
    lineage = {
        "format": LINEAGE_FORMAT,
        "software": {"darwin": package_version()},
        "parents": [{"name": name, **_source(parent)} for name, parent in loaded.parents.items()],
        "base": _source(loaded.base) if loaded.base else None,
        "recipe_id": loaded.recipe.id,
        "recipe": loaded.recipe.to_dict(),
        **({"matching": matching.told} if matching else {}),
        **report.to_dict(),
    }
    add_ancestry(lineage, loaded.parents, loaded.base)
    writer.publish(loaded.files | {LINEAGE_FILE: lineage_bytes(lineage)})
    return {
        "status": "done",
        "child": target.uri,
        "recipe_id": loaded.recipe.id,
        "tensors": len(writer.plan.layout.tensors),
        "bytes": writer.plan.layout.total_bytes,
    }


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "fingerprint": checkpoint.fingerprint,
        "license": licence_of(checkpoint),
        **hub_source(checkpoint),
    }


def _check_place(target: Store) -> None:
    """Refuse a place that holds anything but an unfinished merge."""
    unfinished = next(target.list_objects(f"{PROGRESS}/"), None)
    if unfinished is None and next(target.list_objects(), None) is not None:
        raise BadInputError(f"{target.uri}: is not empty; choose a new place for the child")
