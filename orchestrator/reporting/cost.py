"""What a campaign took, as its report shows it."""

from __future__ import annotations

from statistics import median
from typing import Any

from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.state import CampaignState
from orchestrator.watching.spending import HOUR, SHORT, Seconds, hours, money_words, number

ROWS = {
    "candidates": "candidates, merged and scored on search items",
    "parents": "parents on search items",
    "holdout": "child and parents on held-out items",
    "failed": "attempts that failed",
}
IDLE = "loading, waiting, scanning, examining, writing"


def cost_section(ledger: Ledger, state: CampaignState) -> dict[str, Any] | None:
    """What the page shows of the cost; None if the ledger is older than that."""
    searched = {c.recipe_id for generation in state.generations for c in generation}
    by_recipe = used_by_recipe(ledger)
    own = {recipe: seconds for recipe, seconds in by_recipe.items() if recipe in searched}
    cost = state.spending.to_dict(len(own))
    if cost is None:
        return None
    unit, reserved = cost["unit"], cost["reserved_seconds"]
    short = reserved < SHORT
    rows = [["", f"{unit}-{'seconds' if short else 'hours'}", "of all"]]
    spent = {text: cost["used_for"].get(name, 0.0) for name, text in ROWS.items()}
    rest = max(0.0, reserved - sum(spent.values()))
    for text, seconds in {**spent, IDLE: rest, "reserved in all": reserved}.items():
        shown = number(seconds if short else seconds / HOUR)
        rows.append([text, shown, f"{seconds / reserved:.1%}" if reserved else ""])
    priced = cost["money"] is not None
    candidates = sorted(seconds.of(unit) for seconds in own.values())
    return {
        "headline": f"{cost['price']['currency']} {cost['money']:,.2f}"
        if priced
        else hours(reserved, unit),
        "below": f"{hours(reserved, unit)} reserved" if priced else "reserved by the workers",
        "note": f"Time of workers, times the {unit}s that Ray reserved for them. "
        + (f"In all {money_words(cost)}." if priced else ""),
        "rows": rows,
        "candidates": f"A candidate took {number(median(candidates))} {unit}-seconds (median of "
        f"{len(candidates)}), the cheapest {number(candidates[0])}, the dearest "
        f"{number(candidates[-1])}, attempts that failed among them."
        if candidates
        else None,
    }


def used_by_recipe(ledger: Ledger) -> dict[str, Seconds]:
    """Recipe -> what merging it and scoring it on search items took, failed attempts among it."""
    found: dict[str, Seconds] = {}
    for record in ledger.records:
        if "used" in record and record["split"] == "search":
            found.setdefault(record["recipe"], Seconds()).add(Seconds.parse(record["used"]))
    return found
