"""One merge without a search: `darwin merge`."""

from __future__ import annotations

import json
import os
from typing import Any

from orchestrator.lineage import LINEAGE_FILE, LINEAGE_FORMAT, licence_of, package_version
from orchestrator.progress_bar import progress_bar
from orchestrator.recipe_file import load_recipe_file
from workers.checkpoints import open_checkpoint, publish_companions
from workers.errors import BadInputError
from workers.storage import open_store


def merge_recipe(path: str, out: str) -> dict[str, Any]:
    """Write the child of a recipe file into the empty place `out`; what was written.

    Raises `BadInputError` for a recipe that cannot work and for a place that is not empty.
    """
    loaded = load_recipe_file(path)
    target = open_store(out)
    if next(target.list_objects(), None) is not None:
        raise BadInputError(f"{target.uri}: is not empty; choose a new place for the child")
    import torch

    from workers.merging.child import write_weights
    from workers.merging.executor import Merger

    torch.set_num_threads(1)
    merger = Merger(loaded.parents, loaded.base)
    father = next(iter(loaded.parents.values()))
    with progress_bar(f"merging {len(loaded.parents)} parents", father.total_bytes) as notify:
        report = write_weights(merger, loaded.recipe, target, os.cpu_count() or 1, notify)
    lineage = {
        "format": LINEAGE_FORMAT,
        "software": {"darwin": package_version()},
        "parents": [
            {"name": name, "fingerprint": parent.fingerprint, "license": licence_of(parent)}
            for name, parent in loaded.parents.items()
        ],
        "recipe_id": loaded.recipe.id,
        "recipe": loaded.recipe.to_dict(),
        **report.to_dict(),
    }
    publish_companions(father, target, {LINEAGE_FILE: json.dumps(lineage, indent=1).encode()})
    child = open_checkpoint(target.uri)
    return {
        "status": "done",
        "child": target.uri,
        "recipe_id": loaded.recipe.id,
        "tensors": len(child.tensors),
        "bytes": child.total_bytes,
    }
