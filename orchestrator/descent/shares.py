"""How much of each parent a child is: measured, and as its recipe says."""

from __future__ import annotations

import math
from typing import Any

from workers.merging.plan import Assignment


def parent_shares(method: str, parameters: dict[str, Any], parents: list[str]) -> dict[str, float]:
    """Parent -> share, summing to 1, of one tensor of a child.

    For weights: each weight over the sum of their magnitudes. For slerp: 1 - t and t. For a copy: all of
    its source. Methods without weights count their parents alike. Weights that are all 0 leave only the
    base: every share is 0.
    """
    if "source" in parameters:
        return {parent: float(parent == parameters["source"]) for parent in parents}
    if method == "slerp":
        return dict(zip(parents, (1.0 - parameters["t"], parameters["t"]), strict=True))
    weights = parameters.get("weight", dict.fromkeys(parents, 1.0))
    total = sum(abs(weight) for weight in weights.values())
    return {parent: abs(weights.get(parent, 0.0)) / total if total else 0.0 for parent in parents}


def recorded_parameters(way: Assignment) -> dict[str, Any]:
    """What a lineage says of how a tensor was merged: the parameters of its method.

    Of a router whose rows are merged as their experts are, the mean share of each parent in the rows.
    """
    if not way.rows:
        return way.values
    rows = [parent_shares(row.method.name, row.values, list(row.parents)) for row in way.rows]
    return {
        "weight": {
            name: math.fsum(row.get(name, 0.0) for row in rows) / len(rows) for name in way.parents
        }
    }


def weighted_shares(
    tensors: list[dict[str, Any]], parents: list[str], *keys: str
) -> dict[tuple[Any, ...], dict[str, float]]:
    """The parents' shares in the tensors that agree in `keys`, weighted by their elements."""
    elements: dict[tuple[Any, ...], int] = {}
    totals: dict[tuple[Any, ...], dict[str, float]] = {}
    for tensor in tensors:
        place = tuple(tensor[key] for key in keys)
        elements[place] = elements.get(place, 0) + tensor["elements"]
        total = totals.setdefault(place, dict.fromkeys(parents, 0.0))
        shares = parent_shares(tensor["method"], tensor["parameters"], parents)
        for parent, share in shares.items():
            total[parent] += share * tensor["elements"]
    return {
        place: {parent: value / max(elements[place], 1) for parent, value in total.items()}
        for place, total in totals.items()
    }


def measured_shares(
    groups: list[dict[str, Any]], parents: list[str], *keys: str
) -> dict[tuple[Any, ...], dict[str, float]]:
    """The parents' shares in the groups of an attribution; none at all where they cannot be told apart.

    What is missing from a sum of 1 is the base's.
    """
    return {
        tuple(group[key] for key in keys): {parent: shares.get(parent, 0.0) for parent in parents}
        if (shares := group["shares"]) is not None
        else {}
        for group in groups
    }
