"""How much of each parent a merged tensor is, read from its method's parameters."""

from __future__ import annotations

from typing import Any


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
