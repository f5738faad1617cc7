"""A scan of the weights where donors' experts lie under other numbers than the father's they belong to."""

from __future__ import annotations

from typing import Any

from workers.merging.expert_order import ExpertOrders


def at_matched_places(static: list[dict[str, Any]], orders: ExpertOrders) -> list[dict[str, Any]]:
    """The rows of a scan's static part, each with what was found of the experts that belong there.

    How far parents are from one another was measured by number: where an expert is another one, nothing is
    told of that.
    """
    by_name = {row["tensor"]: row for row in static}

    def matched(row: dict[str, Any]) -> dict[str, Any]:
        expert, of = row["expert"], row["of"]
        if expert is None:
            return row
        for parent, layers in orders.items():
            number = layers[row["layer"]][expert] if row["layer"] in layers else expert
            if number != expert and parent in of:
                name = row["tensor"].replace(f"experts.{expert}.", f"experts.{number}.", 1)
                of = of | {parent: by_name[name]["of"][parent]}
        return row if of is row["of"] else row | {"of": of, "between": {}}

    return [matched(row) for row in static]
