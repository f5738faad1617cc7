"""The prescription for experts: from what a probe saw of each to the share that each donor is advised.

    r_MRI_d(l, e) = merit_d(l, e) / sum over all parents of merit(l, e)

The merit of an expert is the mean over all tokens of |routed weight * its output|, 0 where it is not chosen:
how much it adds to the residual stream (the score of REAP, arXiv 2510.13999, times how often it is chosen).
It stands in the place of the MRI of a tensor. That experts are judged by their activation is published (card
of Darwin V5 MoE); how, and what V9 does, is not: the formula is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import pstdev
from typing import Any

from orchestrator.genomes.parameter_file import DECIMALS
from orchestrator.mri.dead_experts import dead_by_layer
from orchestrator.mri.prescription import LEAST_DISPERSION, ExpertShares, Prescription
from workers.errors import BadInputError
from workers.merging.expert_order import ExpertOrders


def prescribe_experts(scan: dict[str, Any], orders: ExpertOrders | None = None) -> Prescription:
    """Shares of each layer's experts, the father's numbering, from the JSON of a scan with a probe.

    `orders`: which of a donor's experts belong at the father's places, if not those of the same numbers. The
    merit of a parent is the mean over the probe's sets. An expert has no advice if none of the parents
    uses it (its merit is 0 in all, or it is dead in all), or if it is the same in all. Without merits there
    is no advice at all, and nothing is told.

    Raises `BadInputError` for a merit that is not finite, and for parents with different numbers of experts.
    """
    parents = [parent["name"] for parent in scan["parents"]]
    orders = orders or {}
    merits = {parent: _merits(scan, parent, orders.get(parent, {})) for parent in parents}
    dead = _dead(scan, orders)
    equal = _equal(scan)
    experts: ExpertShares = {}
    for layer in sorted(set.intersection(*(set(of) for of in merits.values()))):
        of = {parent: merits[parent][layer] for parent in parents}
        count = len(of[parents[0]])
        for parent, own in of.items():
            if len(own) != count:
                raise BadInputError(
                    f"layer {layer} has {count} experts in {parents[0]}, but {len(own)} in {parent}: "
                    "experts are compared and moved one by one, so all parents need the same number"
                )
        totals = [math.fsum(own[expert] for own in of.values()) for expert in range(count)]
        advised = [
            total > 0.0
            and (layer, e) not in equal
            and not all((layer, e) in dead[p] for p in parents)
            for e, total in enumerate(totals)
        ]
        experts[layer] = {
            donor: tuple(
                round(of[donor][expert] / totals[expert], DECIMALS) if advised[expert] else None
                for expert in range(count)
            )
            for donor in parents[1:]
        }
    spread = round(_dispersion(experts, parents[1:]), DECIMALS)
    return Prescription({}, spread, spread >= LEAST_DISPERSION, experts=experts)


def _merits(
    scan: dict[str, Any], parent: str, order: Mapping[int, tuple[int, ...]]
) -> dict[int, list[float]]:
    """Layer -> the merit of the expert that belongs to each place, the mean over the probe's sets."""
    found: dict[int, list[list[float]]] = {}
    for name, rows in (scan.get("probe") or {"parents": {parent: {}}})["parents"][parent].items():
        for row in rows:
            merit = (row.get("routing") or {}).get("merit")
            if merit is None:
                continue
            for expert, value in enumerate(merit):
                if value is None or not math.isfinite(value):
                    raise BadInputError(
                        f"the probe {name!r} of {parent} found {value} at expert {expert} of layer "
                        f"{row['layer']}: its output is not finite. Repair the parent, or set scan.probe: "
                        "false"
                    )
            places = order.get(row["layer"], range(len(merit)))
            found.setdefault(row["layer"], []).append([merit[number] for number in places])
    return {
        layer: [math.fsum(values) / len(values) for values in zip(*of_sets, strict=True)]
        for layer, of_sets in found.items()
    }


def _dead(scan: dict[str, Any], orders: ExpertOrders) -> dict[str, set[tuple[int, int]]]:
    """Parent -> places whose expert it hardly ever chooses, as far as the probe's tokens can tell."""
    found = dead_by_layer(scan | {"probe": scan.get("probe") or {}})
    dead: dict[str, set[tuple[int, int]]] = {parent["name"]: set() for parent in scan["parents"]}
    for parent, layers in found.items():
        for layer, numbers in layers.items():
            order = orders.get(parent, {}).get(layer)
            places = {number: place for place, number in enumerate(order)} if order else {}
            dead[parent] |= {(layer, places.get(number, number)) for number in numbers or ()}
    return dead


def _equal(scan: dict[str, Any]) -> set[tuple[int, int]]:
    """(layer, expert) of those that are the same in all parents, and in the base if there is one."""
    same: set[tuple[int, int]] = set()
    different: set[tuple[int, int]] = set()
    for row in scan["static"]:
        if row["component"] == "expert" and row["expert"] is not None:
            pairs = (row.get("between") or {}).values()
            is_same = bool(pairs) and all(pair["changed"] == 0 for pair in pairs)
            (same if is_same else different).add((row["layer"], row["expert"]))
    return same - different


def _dispersion(experts: ExpertShares, donors: list[str]) -> float:
    """Standard deviation of a donor's share over the experts, the largest of the donors'."""
    shares = {
        donor: [share for of in experts.values() for share in of[donor] if share is not None]
        for donor in donors
    }
    return max((pstdev(known) for known in shares.values() if known), default=0.0)
