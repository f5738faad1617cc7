"""The lineage: what a child was made from, how, and with what evidence, as data."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import Any

import yaml

from orchestrator.config import CampaignConfig
from orchestrator.inputs import Inputs
from orchestrator.judgement import Judgement
from orchestrator.ledger.state import CampaignState
from workers.checkpoints import Checkpoint
from workers.merging import Recipe
from workers.storage import ObjectNotFoundError
from workers.storage.hub import pinned_parts

LINEAGE_FILE = "lineage.json"
LINEAGE_FORMAT = 2
ALIGNMENT_FILE = "alignment.json"
ATTRIBUTION_FILE = "attribution.json"
"""Beside the lineage: which parent the weights come from, measured (see `attribution`)."""


def build_lineage(
    config: CampaignConfig,
    inputs: Inputs,
    state: CampaignState,
    recipe: Recipe,
    parent_recipes: dict[str, Recipe],
    genome: dict[str, float],
    judgement: Judgement,
    weights: dict[str, Any],
) -> dict[str, Any]:
    """Parents, recipe and evidence of a child: everything its card says, as data.

    `weights` is `child_writer.ChildReport.to_dict`. Nothing in it depends on when or where the
    campaign ran.
    """
    parents = [
        {
            "name": parent.name,
            "fingerprint": inputs.parents[parent.name].fingerprint,
            "license": licence_of(inputs.parents[parent.name]),
            **hub_source(inputs.parents[parent.name], parent.hub),
            "unused_tensors": inputs.unused[parent.name],
        }
        for parent in config.parents
    ]
    base = inputs.base
    return {
        "format": LINEAGE_FORMAT,
        "campaign": config.name,
        "software": {"darwin": package_version()},
        "parents": parents,
        "base": {
            "fingerprint": base.fingerprint,
            "license": licence_of(base),
            **hub_source(base),
        }
        if base
        else None,
        "recipe_id": recipe.id,
        "recipe": recipe.to_dict(),
        "genome": genome,
        "search": {
            "optimizer": config.search.optimizer,
            "method": config.genome.method,
            "genome_space": PurePath(config.genome.space).stem,
            "evaluations": state.evaluated(config.search.evaluations),
            **({"racing": raced} if (raced := state.races.to_dict()) else {}),
            "objective": config.objective,
            **({"weights": state.weights} if config.objective == "weighted" else {}),
            "seed": config.seed,
            "fitness": state.fitness(recipe.id),
            "parents_fitness": {
                name: state.fitness(parent.id) for name, parent in parent_recipes.items()
            },
        },
        "tasks": {
            task.name: {
                "kind": task.kind,
                "fingerprint": task.fingerprint,
                "origin": task.origin,
                "template": task.template_hash,
                "left_out": task.left_out,
                "search_items": len(task.items["search"]),
                "holdout_items": len(task.items["holdout"]),
            }
            for task in inputs.tasks
        },
        "children_judged": state.judged(parent.id for parent in parent_recipes.values()),
        **judgement.to_dict(),
        **weights,
    }


def hub_source(checkpoint: Checkpoint, known_as: str | None = None) -> dict[str, str | None]:
    """The checkpoint's id on the hub (`known_as`, or where it was read), and the commit that was read."""
    model, commit = pinned_parts(checkpoint.store.uri) or (None, None)
    return {"hub": known_as or model, "revision": commit}


def describe_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """A parent, or a base, as a lineage tells of it: its content, licence, and where on the hub it was
    read."""
    return {
        "fingerprint": checkpoint.fingerprint,
        "license": licence_of(checkpoint),
        **hub_source(checkpoint),
    }


def lineage_bytes(data: dict[str, Any]) -> bytes:
    """Lineage or attribution as a file: a line for each key, and for each tensor.

    Models of experts have ten thousands of them.
    """
    lines = []
    for key, value in data.items():
        text = json.dumps(value, ensure_ascii=False)
        if key == "tensors":
            tensors = ",\n".join(json.dumps(tensor, ensure_ascii=False) for tensor in value)
            text = f"[\n{tensors}\n]"
        lines.append(f"{json.dumps(key)}: {text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def licence_of(checkpoint: Checkpoint) -> str | None:
    """The licence that the checkpoint's own model card declares, or None."""
    try:
        card = checkpoint.store.read("README.md").decode(errors="replace")
    except ObjectNotFoundError:
        return None
    front, found, _ = card.removeprefix("---").partition("\n---")
    if not card.startswith("---") or not found:
        return None
    try:
        data = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    licence = data.get("license") if isinstance(data, dict) else None
    return licence if isinstance(licence, str) else None


def package_version() -> str:
    """Darwin's own version."""
    try:
        return version("darwin-orchestrator")
    except PackageNotFoundError:
        return "unknown"
