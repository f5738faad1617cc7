"""Dead experts: those that a scan's probe has hardly ever seen chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

DEAD_SHARE = 0.05
"""An expert is dead if it is chosen less often than this share of the even load, k / E of the tokens.

The cards of Darwin V5 print "activation frequency under 5 %". Of tokens that would be every expert of a
perfectly balanced layer that chooses 8 of 256, as each is chosen for 3.1 % of them.
"""

LEAST_CHOICES = 5.0
"""With an even load each expert must be due so many choices, or that one has none says nothing."""


def dead_experts(choices: Sequence[int], tokens: int, per_token: int) -> list[int] | None:
    """The dead ones of a layer, from how often each was chosen; None if there were too few tokens to tell."""
    even = tokens * per_token / len(choices)
    if even < LEAST_CHOICES:
        return None
    return [expert for expert, count in enumerate(choices) if count < DEAD_SHARE * even]


def dead_by_layer(scan: dict[str, Any]) -> dict[str, dict[int, list[int] | None]]:
    """Parent -> layer with experts -> its dead ones, over all sets that the scan has probed with."""
    found: dict[str, dict[int, list[int] | None]] = {}
    for parent, sets in (scan["probe"] or {"parents": {}})["parents"].items():
        totals: dict[int, tuple[int, int, list[int]]] = {}
        for row in (row for rows in sets.values() for row in rows if "routing" in row):
            own = row["routing"]
            tokens, _, choices = totals.get(row["layer"], (0, 0, [0] * len(own["choices"])))
            choices = [one + other for one, other in zip(choices, own["choices"], strict=True)]
            totals[row["layer"]] = tokens + own["tokens"], own["per_token"], choices
        if totals:
            found[parent] = {
                layer: dead_experts(choices, tokens, per_token)
                for layer, (tokens, per_token, choices) in sorted(totals.items())
            }
    return found


def dead_expert_notes(found: dict[str, dict[int, list[int] | None]]) -> list[str]:
    """A line for each parent that has experts."""
    lines = []
    for parent, layers in found.items():
        known = {layer: dead for layer, dead in layers.items() if dead is not None}
        if not known:
            lines.append(f"dead experts of {parent}: too few tokens in the probe's sets to tell")
            continue
        places = ", ".join(f"layer {layer}: {len(dead)}" for layer, dead in known.items() if dead)
        lines.append(
            f"dead experts of {parent} (chosen less than {DEAD_SHARE:.0%} as often as at an even load): "
            f"{sum(map(len, known.values()))}" + (f" ({places})" if places else "")
        )
    return lines
