"""Dead experts: those that a scan's probe has hardly ever seen chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.mri.experts import RoutingByLayer, routing_by_layer

DEAD_SHARE = 0.05
"""An expert is dead if it is chosen less often than this share of the even load, k / E of the tokens.

The cards of Darwin V5 print "activation frequency under 5 %". Of tokens that would be every expert of a
perfectly balanced layer that chooses 8 of 256, as each is chosen for 3.1 % of them.
"""

LEAST_CHOICES = 5.0
"""With an even load each expert must be due so many choices, or that one has none says nothing."""

MOST_LAYERS = 6
"""So many layers with dead experts are named."""


def dead_experts(choices: Sequence[int], tokens: int, per_token: int) -> list[int] | None:
    """The dead ones of a layer, from how often each was chosen; None if there were too few tokens to tell."""
    even = tokens * per_token / len(choices)
    if even < LEAST_CHOICES:
        return None
    return [expert for expert, count in enumerate(choices) if count < DEAD_SHARE * even]


def dead_by_layer(scan: dict[str, Any]) -> dict[str, dict[int, list[int] | None]]:
    """Parent -> layer with experts -> its dead ones, over all sets that the scan has probed with."""
    return dead_of(routing_by_layer(scan))


def dead_of(found: RoutingByLayer) -> dict[str, dict[int, list[int] | None]]:
    """The same of what was found."""
    return {
        parent: {
            layer: dead_experts(routing["choices"], routing["tokens"], routing["per_token"])
            for layer, routing in layers.items()
        }
        for parent, layers in found.items()
    }


def dead_expert_notes(found: dict[str, dict[int, list[int] | None]]) -> list[str]:
    """A line for each parent that has experts."""
    lines = []
    for parent, layers in found.items():
        known = {layer: dead for layer, dead in layers.items() if dead is not None}
        if not known:
            lines.append(f"dead experts of {parent}: too few tokens in the probe's sets to tell")
            continue
        most = sorted(known, key=lambda layer: (-len(known[layer] or ()), layer))
        named = [layer for layer in most if known[layer]][:MOST_LAYERS]
        places = ", ".join(f"layer {layer}: {len(known[layer] or ())}" for layer in sorted(named))
        if len(named) < sum(map(bool, known.values())):
            places = f"most in {places}"
        lines.append(
            f"dead experts of {parent} (chosen less than {DEAD_SHARE:.0%} as often as at an even load): "
            f"{sum(map(len, known.values()))}" + (f" ({places})" if places else "")
        )
    return lines
