"""What the ledger of a search without generations says, fed to an optimizer by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from orchestrator.campaign import Campaign
from orchestrator.ledger.ledger import Record
from orchestrator.search import build_optimizer


def asked(ledger: Iterable[Record]) -> list[str]:
    """Recipes in the order in which they were asked for."""
    return [c["recipe"] for r in ledger if r["kind"] == "asked" for c in r["candidates"]]


def check_order(campaign: Campaign, ledger: list[Record]) -> None:
    """The ledger's order alone makes an optimizer ask for the genomes that are recorded: each is told when
    its last items are."""
    config = campaign.config.search
    tasks = campaign.inputs.tasks
    items = [(task.name, item.id) for task in tasks for item in task.items["search"]]
    even = [
        1 / len(tasks) / len(task.items["search"]) for task in tasks for _ in task.items["search"]
    ]
    optimizer: Any = build_optimizer(
        config.optimizer,
        campaign.space.start,
        config.step,
        config.population,
        campaign.config.seed,
        even,
    )
    points: dict[str, list[float]] = {}
    scores: dict[str, dict[tuple[str, str], float]] = {}
    for record in ledger:
        if record["kind"] == "asked":
            (candidate,) = record["candidates"]
            point = optimizer.ask_one()
            assert campaign.space.point(point) == candidate["genome"], record
            points[candidate["recipe"]] = point
        elif (
            record["kind"] == "scored"
            and record["recipe"] in points
            and record["split"] == "search"
        ):
            known = scores.setdefault(record["recipe"], {})
            for task, own in record["items"].items():
                known |= {(task, item["id"]): item["score"] for item in own}
            if record["complete"]:
                told = [known[item] for item in items]
                optimizer.tell_one(points[record["recipe"]], sum(told) / len(told), told)
