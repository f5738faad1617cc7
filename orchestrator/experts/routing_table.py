"""How a child's experts are chosen, compared with its parents: for its lineage, its card and its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from orchestrator.mri.dead_experts import DEAD_SHARE, dead_experts

NAMES = {
    "keep": "the father's, kept",
    "as_experts": "rows merged as their experts",
    "harc": "calibrated (HARC), as in this child",
    "child": "this child's",
}

MEANING = (
    "Child and parents have read the same prompts, each with its own hidden states. *Overlap* is the share "
    "of the experts which a parent chooses for a token of its own prompts that the child chooses too; *KL* "
    "the divergence of the child's routing from the parent's, in nats. Both are means over tokens and "
    "layers: 100 % and 0 would be the parent's own routing. *Load* is the entropy of how often the experts "
    "are chosen, as a share of that at an even load; *dead* are experts that are chosen less than "
    f"{DEAD_SHARE:.0%} as often as at an even load."
)


def routing_record(rows: Sequence[dict[str, Any]], **about: Any) -> dict[str, Any]:
    """What a lineage keeps of the rows of `workers.experts.routing_comparison`, with what else is told
    `about` them: instead of each expert's choices, which experts are dead."""
    layers = []
    for row in rows:
        of = {
            kind: {
                name: _without_choices(told, row["per_token"]) for name, told in row[kind].items()
            }
            for kind in ("models", "parents")
        }
        experts = len(next(iter(row["models"].values()))["choices"])
        layers.append(
            {"layer": row["layer"], "per_token": row["per_token"], "experts": experts, **of}
        )
    return {**about, "layers": layers}


def _without_choices(told: dict[str, Any], per_token: int) -> dict[str, Any]:
    """`dead` is None where there were too few tokens to tell."""
    rest = {key: value for key, value in told.items() if key != "choices"}
    return rest | {"dead": dead_experts(told["choices"], told["tokens"], per_token)}


def routing_table(record: dict[str, Any]) -> list[list[str]]:
    """A table of a lineage's `routing`, its head first; means over the layers."""
    layers = record["layers"]
    models, parents = list(layers[0]["models"]), list(layers[0]["parents"])
    against = list(layers[0]["models"][models[0]]["against"])
    table = [["routers", *(f"{name}: overlap, KL" for name in against), "load", "dead experts"]]
    for model in models:
        of = [layer["models"][model] for layer in layers]
        pairs = [
            f"{_mean([o['against'][n]['overlap'] for o in of]):.1%}, "
            f"{_mean([o['against'][n]['kl'] for o in of]):.4f}"
            for n in against
        ]
        table.append([NAMES.get(model, model), *pairs, *_load(of, layers)])
    for parent in parents:
        of = [layer["parents"][parent] for layer in layers]
        table.append([f"{parent} itself", *("" for _ in against), *_load(of, layers)])
    return table


def routing_notes(record: dict[str, Any]) -> list[str]:
    """What must be known to read the table, beside `MEANING`."""
    notes = []
    if not record["held_out"]:
        notes.append(
            "The prompts are those that the routers were calibrated on: the sets are too small to hold any "
            "out."
        )
    if calibration := record.get("calibration"):
        notes += calibration["warnings"]
    return notes


def _load(of: list[dict[str, Any]], layers: list[dict[str, Any]]) -> list[str]:
    even = [math.log2(layer["experts"]) for layer in layers]
    share = _mean(
        [o["load_entropy"] / most if most else 1.0 for o, most in zip(of, even, strict=True)]
    )
    known = [o["dead"] for o in of if o["dead"] is not None]
    return [f"{share:.1%}", str(sum(map(len, known))) if known else "too few tokens to tell"]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
