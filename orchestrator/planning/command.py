"""`darwin plan`: the plan of a campaign as data, and as a view for a terminal."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.config import load_config
from orchestrator.planning.cluster import GB, load_cluster
from orchestrator.planning.estimate import estimate
from orchestrator.planning.fits import gigabytes
from orchestrator.planning.inputs import open_planned
from orchestrator.pool.placement import check_placement
from orchestrator.search.optimizer import check_optimizer
from workers.errors import BadInputError

PARENTS = {
    True: "a worker's part of the parents, kept in memory",
    False: "(a worker's part of the parents, read for each candidate)",
}


def plan_campaign(
    path: str,
    overrides: list[str],
    cluster: str,
    changes: dict[str, float | None],
    likes: list[str],
    keeps: bool | None = None,
    score_seconds: float = 0.0,
) -> dict[str, Any]:
    """The plan of a campaign file (see `estimate`); one that does not fit is a plan with `problems`.

    Raises `BadInputError` for input that cannot work.
    """
    if not 0 <= score_seconds < math.inf:
        raise BadInputError(f"--score: {score_seconds} is not a number of seconds")
    machines = load_cluster(cluster, changes)
    config = load_config(path, overrides)
    check_placement(config.workers, config.address)
    check_optimizer(config.search.optimizer)
    return estimate(config, open_planned(config, likes), machines, keeps, score_seconds)


def render_plan(plan: dict[str, Any]) -> RenderableType:
    """The plan for a terminal."""
    parts: list[RenderableType] = [_facts(plan), "", _memory(plan), "", _stages(plan)]
    if not plan["score_seconds"]:
        parts.append(Text("without the scoring of candidates: give --score SECONDS", style="dim"))
    if plan["warnings"]:
        parts += [
            "",
            *(Text(f"warning: {warning}", style="yellow") for warning in plan["warnings"]),
        ]
    if plan["problems"]:
        parts += ["", Text("It does not fit:", style="bold red")]
        parts += [f"- {problem}" for problem in plan["problems"]]
    else:
        parts += ["", Text("It fits.", style="bold green")]
    return Group(*parts)


def _facts(plan: dict[str, Any]) -> Table:
    workers, cluster, child = plan["workers"], plan["cluster"], plan["child"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_row("campaign", plan["campaign"])
    for parent in plan["parents"]:
        like = f", planned as {parent['like']}" if parent["like"] else ""
        table.add_row(
            "", f"{parent['name']}: {parent['place']}, {gigabytes(parent['bytes'])}{like}"
        )
    gangs = f", {workers['engines']} gangs of {workers['gang']}," if workers["gang"] > 1 else ""
    table.add_row(
        "workers",
        f"{workers['count']}{gangs} on {workers['nodes']} of {cluster['nodes']} nodes, up to "
        f"{workers['most_on_a_node']} on a node",
    )
    table.add_row(
        "a node",
        f"{cluster['gpus_per_node']} GPUs of {cluster['gpu_memory']:g} GB, "
        f"{cluster['cores_per_node']} cores, {cluster['node_memory']:g} GB of memory, "
        f"network {cluster['nic']:g} GB/s, disk {cluster['disk']:g} GB/s and {cluster['disk_size']:g} GB",
    )
    low, high = child["parts_per_file"]
    table.add_row(
        "child",
        f"{gigabytes(child['bytes'])} in {child['files']} files of up to {gigabytes(child['largest_file'])}: "
        f"{child['parts']:,} parts, {low:,} to {high:,} to a file (a store takes {child['most_parts']:,})",
    )
    return table


def _memory(plan: dict[str, Any]) -> Table:
    memory, cluster = plan["memory"], plan["cluster"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("memory and disk")
    for name in ("needed", "there is"):
        table.add_column(name, justify="right")
    rows: list[tuple[str, float, float | None]] = [
        ("a worker's part of the live model", memory["live"], None),
        (PARENTS[plan["workers"]["keeps_parents"]], memory["resident"], None),
        ("units in flight of a worker that realizes a candidate", memory["streamed"], None),
        ("parts and units in flight of a worker that writes the child", memory["merging"], None),
        ("a worker's process beside these", memory["process"], None),
        ("a node's memory, in all", memory["node"], cluster["node_memory"]),
        ("a node's disk, for copies of parents", memory["copies"], cluster["disk_size"]),
    ]
    if memory["gpu"]:
        rows.insert(0, ("a GPU's memory", memory["gpu"], cluster["gpu_memory"]))
    for name, size, room in rows:
        there_is = gigabytes(room * GB) if room is not None else ""
        table.add_row(name, gigabytes(size) if size else "-", there_is)
    if plan["token_bytes"]:
        name = "over the network for each token that a gang reads, at most"
        table.add_row(name, gigabytes(plan["token_bytes"]), "")
    return table


def _stages(plan: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    for name in ("times", "read", "written", "over the network", "time"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for stage in plan["stages"]:
        sizes = [
            gigabytes(stage[key]) if stage[key] else "-" for key in ("read", "written", "moved")
        ]
        table.add_row(
            stage["name"], f"{stage['times']:,}", *sizes, duration(stage["seconds"]), stage["bound"]
        )
    table.add_row("in all", "", "", "", "", duration(plan["seconds"]))
    return table


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
