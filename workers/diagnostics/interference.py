"""A child's layers against its parents': interference and loss of function, from hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    `broken` (models whose output holds NaN or infinite values, which are left out of what follows),
    `nearest` (distance to the nearest parent; None without child or parents), `spread` (distance of the two
    parents that are farthest from each other; None of a single one) and `contribution`, None where it is
    no finite number.
    """
    layers = []
    for number, own in enumerate(child):
        sound, broken = [], []
        for name, states in parents.items():
            if is_finite(states[number]):
                sound.append(states[number])
            else:
                broken.append(name)
        nearest = [angular_distance(own, output) for output in sound]
        if not is_finite(own):
            nearest = []
            broken.append("child")
        spread = [angular_distance(one, other) for one, other in combinations(sound, 2)]
        layers.append(
            {
                "layer": number,
                "broken": broken,
                "nearest": finite(min(nearest)) if nearest else None,
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


def is_finite(values: torch.Tensor) -> bool:
    """Whether all of `values` are finite."""
    import torch

    return bool(torch.isfinite(values).all())
