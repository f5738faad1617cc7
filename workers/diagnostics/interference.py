"""A child's layers against its parents': interference and loss of function, from hidden states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def compare_layers(
    child: Sequence[torch.Tensor],
    parents: dict[str, Sequence[torch.Tensor]],
    contributions: dict[str, Sequence[float]],
) -> list[dict[str, Any]]:
    """Per layer, how far the child's outputs are from the parents', and what the layer adds.

    `child` and each of `parents` are the outputs `[tokens, hidden]` of each layer for the same tokens.
    `contributions`: model -> layer -> size of what the layer adds, relative to what comes in. Gives
    `nearest` (distance to the nearest parent), `spread` (distance of the two parents that are farthest
    from each other; None of a single one) and `contribution`. Numbers that are not finite are None.
    """
    layers = []
    for number, own in enumerate(child):
        outputs = [states[number] for states in parents.values()]
        spread = [angular_distance(one, other) for one, other in combinations(outputs, 2)]
        layers.append(
            {
                "layer": number,
                "nearest": _least(angular_distance(own, output) for output in outputs),
                "spread": finite(max(spread)) if spread else None,
                "contribution": {name: finite(c[number]) for name, c in contributions.items()},
            }
        )
    return layers


def angular_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over tokens of 1 - cos of two outputs `[tokens, hidden]`: 0 for equal directions, up to 2.

    A mean of angles, as the norms of a few tokens (attention sinks) would hide all others.
    """
    import torch

    cosine = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1)
    return float((1.0 - cosine).clamp(min=0.0).mean())


def finite(value: float) -> float | None:
    """`value` to six digits, so that files are readable; None if it is no finite number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _least(distances: Iterable[float]) -> float | None:
    found = list(distances)
    # min() of what holds a NaN depends on the order.
    return None if any(not math.isfinite(d) for d in found) else finite(min(found))
