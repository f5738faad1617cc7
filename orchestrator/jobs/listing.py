"""The campaigns of a store, and the Darwin jobs of a cluster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from orchestrator.jobs.cluster import Cluster
from orchestrator.ledger import lease as leases
from orchestrator.ledger.lease import Sighting, look_at_lease
from orchestrator.ledger.ledger import FOLDER
from orchestrator.overview import campaign_overview
from workers.errors import BadInputError
from workers.storage import Store, open_store

READ_THREADS = 8
POLL_SECONDS = 0.25
BEATS = 2.5
"""A driver that lives shows itself within so many heartbeats."""


def list_campaigns(location: str) -> list[dict[str, Any]]:
    """Each campaign of a store with its status: done, rejected, running, stopped, or damaged.

    Takes some seconds if a driver may be alive, until it has shown that it is.
    """
    store = open_store(location)
    names = [
        name
        for name in store.list_folders()
        if next(store.list_objects(f"{name}/{FOLDER}/"), None) is not None
    ]
    with ThreadPoolExecutor(READ_THREADS) as threads:
        rows = list(threads.map(lambda name: _row(store.substore(name)), names))
    living = _living(store, [row for row in rows if row["status"] == "unfinished"])
    for row in rows:
        if row["status"] == "unfinished":
            row["status"] = "running" if row["campaign"] in living else "stopped"
    return rows


def _row(store: Store) -> dict[str, Any]:
    try:
        overview = campaign_overview(store.uri)
        if overview["status"] == "unfinished":
            look_at_lease(store)  # one that is damaged concerns no other campaign
    except BadInputError as error:
        return {"campaign": store.uri, "status": "damaged", "error": str(error)}
    best = overview["best"]
    return {
        "campaign": store.uri,
        "status": overview["status"],
        "evaluations": overview["evaluations"],
        "budget": overview["budget"],
        "best_fitness": best["fitness"] if best else None,
        "child": overview["child"],
    }


def _living(store: Store, rows: list[dict[str, Any]]) -> set[str]:
    """The places of those campaigns whose lease is renewed while one watches."""
    stores = {row["campaign"]: open_store(row["campaign"]) for row in rows}
    watched: dict[str, Sighting] = {}
    for place, own in stores.items():
        seen = look_at_lease(own)
        if seen is not None and seen.may_live:
            watched[place] = seen
    living: set[str] = set()
    deadline = time.monotonic() + BEATS * leases.HEARTBEAT_SECONDS
    while len(living) < len(watched) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        for place in watched.keys() - living:
            seen = look_at_lease(stores[place])
            if seen is not None and seen.version != watched[place].version:
                living.add(place)
    return living


def list_everything(location: str | None, cluster: Cluster | None) -> dict[str, Any]:
    """What `darwin list` shows: the campaigns of a store, the jobs of a cluster, or both."""
    result: dict[str, Any] = {"status": "done"}
    if location is not None:
        result["campaigns"] = list_campaigns(location)
    if cluster is not None:
        result["jobs"] = [job.to_dict() for job in cluster.jobs()]
    if location is not None and cluster is not None:
        for row in result["campaigns"]:
            own = [job["job"] for job in result["jobs"] if job["campaign"] == row["campaign"]]
            row["job"] = own[-1] if own else None
    return result


def render_list(result: dict[str, Any]) -> RenderableType:
    """The lists for a person."""
    parts: list[RenderableType] = []
    if "campaigns" in result:
        rows = [
            (row["campaign"], row["status"], _progress(row), _number(row.get("best_fitness")))
            for row in result["campaigns"]
        ]
        titles = ("campaign", "status", "evaluations", "best fitness")
        parts.append(_table(titles, rows) if rows else "no campaigns")
    if "jobs" in result:
        rows = [
            (job["job"], job["status"], job["campaign"], _time(job["started"]))
            for job in result["jobs"]
        ]
        titles = ("job", "status", "campaign", "submitted")
        parts.append(_table(titles, rows) if rows else "no jobs")
    return Group(*parts)


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")  # places and ids are never cut short
    for row in rows:
        table.add_row(*row)
    return table


def _progress(row: dict[str, Any]) -> str:
    return (
        row["error"] if row["status"] == "damaged" else f"{row['evaluations']} of {row['budget']}"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
