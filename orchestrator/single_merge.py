"""One merge without a search: `darwin merge`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from orchestrator.child_writer import ChildWriter
from orchestrator.descent.family_tree import add_ancestry
from orchestrator.descent.lineage import (
    LINEAGE_FILE,
    LINEAGE_FORMAT,
    describe_source,
    lineage_bytes,
    package_version,
)
from orchestrator.experts.calibrating import ROUTERS_FOLDER, calibrate_routers
from orchestrator.experts.matched_merge import match_recipe
from orchestrator.merge_progress import PROGRESS
from orchestrator.pool.calls import open_calls
from orchestrator.progress_bar import progress_bar
from orchestrator.recipe_file import load_recipe_file
from orchestrator.reporting.merge_card import build_merge_card
from orchestrator.weight_meaning import meaning_warnings
from orchestrator.workers_config import WorkersConfig
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
    _check_place(target, calibrates=loaded.harc is not None)
    writer = ChildWriter.create(loaded.recipe, loaded.parents, loaded.base, target)
    matching = match_recipe(loaded, workers, address)
    if matching is not None:
        loaded = replace(loaded, recipe=replace(loaded.recipe, experts=matching.orders))
    calibrated = None
    if loaded.harc is not None:
        calibrated = calibrate_routers(loaded, target, workers, address)
        loaded = calibrated.loaded
    if matching is not None or calibrated is not None:
        writer = ChildWriter.create(loaded.recipe, loaded.parents, loaded.base, target)
    opened = loaded.parents | ({"base": loaded.base} if loaded.base else {})
    told = [*loaded.warnings, *meaning_warnings(opened), *writer.plan.warnings(loaded.recipe)]
    for warning in told:
        print(f"darwin: warning: {warning}", file=sys.stderr)
    with (
        open_calls(
            loaded.parents,
            loaded.base,
            workers,
            address,
            lambda worker: worker.start(loaded.recipe),
        ) as calls,
        progress_bar(f"merging {', '.join(loaded.parents)}", writer.total_bytes) as notify,
    ):
        report = writer.write(calls, notify)
    lineage = {
        "format": LINEAGE_FORMAT,
        "software": {"darwin": package_version()},
        "parents": [
            {"name": name, **describe_source(parent)} for name, parent in loaded.parents.items()
        ],
        "base": describe_source(loaded.base) if loaded.base else None,
        "recipe_id": loaded.recipe.id,
        "recipe": loaded.recipe.to_dict(),
        **({"matching": matching.told} if matching else {}),
        **report.to_dict(),
    }
    files = loaded.files
    if calibrated is not None:
        lineage["parents"][-1]["gives"] = ROUTERS_FOLDER
        lineage["routing"] = calibrated.routing
    add_ancestry(lineage, loaded.parents, loaded.base)
    if calibrated is not None:
        files = files | {"README.md": build_merge_card(lineage).encode()}
    writer.publish(files | {LINEAGE_FILE: lineage_bytes(lineage)})
    return {
        "status": "done",
        "child": target.uri,
        "recipe_id": loaded.recipe.id,
        "tensors": len(writer.plan.layout.tensors),
        "bytes": writer.plan.layout.total_bytes,
    }


def _check_place(target: Store, calibrates: bool) -> None:
    """Refuse a place that holds anything but an unfinished merge, or routers that are calibrated for one."""
    unfinished = next(target.list_objects(f"{PROGRESS}/"), None) is not None
    if calibrates and not unfinished:
        unfinished = (
            next(target.list_objects(f"{ROUTERS_FOLDER}/"), None) is not None
            and next(target.list_objects("config.json"), None) is None
        )
    if not unfinished and next(target.list_objects(), None) is not None:
        raise BadInputError(f"{target.uri}: is not empty; choose a new place for the child")
