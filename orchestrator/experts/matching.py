"""The matching of donors' experts with the father's, before anything is merged: who compares what.

The order that is found becomes part of the recipes; how sure it is, part of the lineage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.pool.calls import Calls
from workers.checkpoints import ArchitectureMap, Checkpoint
from workers.diagnostics.calibration import CalibrationSet
from workers.errors import BadInputError
from workers.experts.quality import LayerMatching
from workers.merging.expert_order import (
    ExpertOrders,
    experts_by_layer,
    orders_to_dict,
    parse_orders,
)

WAYS = ("weights", "outputs")
"""What experts can be compared by."""


@dataclass(frozen=True)
class Matching:
    """The experts of donors that belong to the father's."""

    by: str
    orders: ExpertOrders = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    """Donor -> `similarity` and `margin` (means over its layers), `moved` of `experts`, the layers that are
    `poor`, and `layers`: layer -> `LayerMatching.to_dict`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of `from_dict`."""
        return {
            "by": self.by,
            "orders": orders_to_dict(self.orders),
            "quality": self.quality,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any], parents: Sequence[str]) -> Matching:
        """Read what `to_dict` wrote of these parents, the father first."""
        orders = parse_orders(data["orders"], list(parents), has_base=False)
        return Matching(data["by"], orders, data["quality"])

    @property
    def told(self) -> dict[str, Any]:
        """What a lineage says of it; the orders themselves are in the recipe."""
        return {"by": self.by, "donors": self.quality}

    @property
    def notes(self) -> list[str]:
        """What the user should know of each donor, a sentence each."""
        return notes_on_matching({"matching": self.told})


def match_experts(
    parents: dict[str, Checkpoint],
    by: str,
    sets: Sequence[CalibrationSet],
    calls: Calls,
    device: str = "cpu",
) -> Matching:
    """Match every donor's experts with those of the father, the first of `parents`.

    The workers behind `calls` must have opened the same parents; each call is one layer of one donor. `sets`
    are for `by` outputs. Raises `BadInputError` for a father without experts, and for donors whose experts
    are of another form.
    """
    father, *donors = parents
    layers = sorted(experts_by_layer(ArchitectureMap.of(parents[father])))
    if not layers:
        raise BadInputError(
            f"{parents[father].location}: has no routed experts that could be matched: leave out "
            "match_experts (of a campaign: experts.match)"
        )
    states: dict[int, Any] = {}
    if by == "outputs":
        ((_, states),) = calls.each("expert_inputs", [(tuple(sets), device)])
        missing = [layer for layer in layers if layer not in states]
        if missing:
            raise BadInputError(
                f"{parents[father].location}: layer {missing[0]} does not call its experts as others do: "
                "match them by weights"
            )
    asked = [(donor, layer) for donor in donors for layer in layers]
    arguments = [(donor, layer, states.get(layer), device) for donor, layer in asked]
    found: dict[str, dict[int, LayerMatching]] = {donor: {} for donor in donors}
    for number, matching in calls.each("match_experts", arguments):
        donor, layer = asked[number]
        found[donor][layer] = matching
    orders = {
        donor: {layer: of[layer].order for layer in layers if of[layer].moved}
        for donor, of in found.items()
    }
    return Matching(
        by,
        {donor: of for donor, of in orders.items() if of},
        {donor: _summary([of[layer] for layer in layers]) for donor, of in found.items()},
    )


def _summary(layers: list[LayerMatching]) -> dict[str, Any]:
    return {
        "similarity": round(sum(one.similarity for one in layers) / len(layers), 6),
        "margin": round(sum(one.margin for one in layers) / len(layers), 6),
        "moved": sum(one.moved for one in layers),
        "experts": sum(len(one.order) for one in layers),
        "poor": [one.layer for one in layers if one.is_poor],
        "layers": {str(one.layer): one.to_dict() for one in layers},
    }


def notes_on_matching(lineage: Mapping[str, Any]) -> list[str]:
    """What is to be said of the experts that a lineage says were matched, a sentence for each donor."""
    told = lineage.get("matching")
    return [_note(told["by"], *donor) for donor in told["donors"].items()] if told else []


def _note(by: str, name: str, found: dict[str, Any]) -> str:
    text = (
        f"By their {by}, {found['moved']} of {found['experts']} experts of {name} belong to an expert of the "
        f"father with another number; those that belong together are alike by {found['similarity']:.2f}, "
        f"{found['margin']:.2f} more than the next best"
    )
    if not found["poor"]:
        return f"{text}."
    listed = ", ".join(map(str, found["poor"]))
    return f"{text}. In the layers {listed} hardly so: they may not belong together there."
