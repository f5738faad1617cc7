"""How much of each parent a merged tensor is, read from its method's parameters."""

from __future__ import annotations

from typing import Any


def parent_shares(parameters: dict[str, Any], parents: list[str]) -> dict[str, float]:
    """Parent -> share, summing to 1, of one tensor of a child.

    For weights: each weight over the sum of their magnitudes. For an interpolation by `t`: 1 - t and t.
    For a copy: all of its source. Weights that are all 0 leave only the base: every share is 0.
    """
    if "source" in parameters:
        return {parent: float(parent == parameters["source"]) for parent in parents}
    if "t" in parameters:
        return dict(zip(parents, (1.0 - parameters["t"], parameters["t"]), strict=True))
    weights = parameters["weight"]
    total = sum(abs(weights[parent]) for parent in parents)
    return {parent: abs(weights[parent]) / total if total else 0.0 for parent in parents}
