"""The tables of docs/cluster.md: what `darwin plan` says of the 397B campaign on 4, 8 and 16 nodes.

`python -m tests.plan_tables` writes them into the page.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.config import CampaignConfig, load_config
from orchestrator.planning.cluster import load_cluster
from orchestrator.planning.command import duration
from orchestrator.planning.estimate import estimate
from orchestrator.planning.fits import gigabytes
from orchestrator.planning.inputs import PlannedInputs, open_planned

PAGE = Path(__file__).parents[1] / "docs" / "cluster.md"
BEGIN, END = "<!-- plan of the 397B -->\n", "<!-- end of the plan -->\n"
NODES = (4, 8, 16)
CAMPAIGN, LIKE = "qwen35_397b_expert_transplant", "qwen35_397b"


def plans(inputs: PlannedInputs, config: CampaignConfig) -> list[dict[str, Any]]:
    """The plan on each number of nodes: two nodes for each live model, all else as it ships."""
    found = []
    for nodes in NODES:
        config.workers.count = nodes // 2
        found.append(estimate(config, inputs, load_cluster("gpu8_80gb", {"nodes": nodes})))
    return found


def in_a_bucket(inputs: PlannedInputs) -> PlannedInputs:
    """The same parents, read where they lie."""
    parents = {name: replace(parent, kind="bucket") for name, parent in inputs.parents.items()}
    moved = replace(inputs, parents=parents)
    vars(moved).update(traffic=inputs.traffic, parts=inputs.parts)  # depend on no place
    return moved


def with_tables(page: str) -> str:
    """The page with its tables made anew."""
    before, rest = page.split(BEGIN)
    _, behind = rest.split(END)
    return before + BEGIN + tables() + END + behind


def tables() -> str:
    config = load_config(CAMPAIGN)
    inputs = open_planned(config, [LIKE])
    found, streamed = plans(inputs, config), plans(in_a_bucket(inputs), config)
    assert all(plan["status"] == "fits" for plan in (*found, *streamed))
    return "\n".join([*_facts(found, streamed), "", *_times(found, streamed), ""])


def _facts(found: list[dict[str, Any]], streamed: list[dict[str, Any]]) -> list[str]:
    def memory(key: str, of: list[dict[str, Any]] = found) -> list[str]:
        return [gigabytes(plan["memory"][key]) for plan in of]

    rows = [
        ("GPUs, live models", [f"{p['workers']['count']}, {p['workers']['engines']}" for p in found]),
        ("a GPU's memory: its part of a live model, and buffers", memory("gpu")),
        ("a worker's part of the parents, kept in memory", memory("resident")),
        ("units in flight instead, streamed from a bucket", memory("streamed", streamed)),
        ("parts and units in flight of a worker that writes the child", memory("merging")),
        ("a node's memory, in all", memory("node")),
        ("the same, streamed", memory("node", streamed)),
        ("a node's disk for copies of parents", memory("copies")),
        ("parts of a file of the child, at most", [f"{p['child']['parts_per_file'][1]:,}" for p in found]),
    ]  # fmt: skip
    return [*_head("", "memory, disk and parts"), *(_row(name, cells) for name, cells in rows)]


def _times(found: list[dict[str, Any]], streamed: list[dict[str, Any]]) -> list[str]:
    lines = _head("bytes read / written / over the network", "stage")
    for title, plans_of in (("", found), (", streamed", streamed)):
        for number, stage in enumerate(plans_of[0]["stages"]):
            if title and not stage["name"].startswith("realize"):
                continue
            stages = [plan["stages"][number] for plan in plans_of]
            cells = [f"{duration(s['seconds'])} ({s['bound']})" for s in stages]
            times = f"{stage['times']} x " if stage["times"] > 1 else ""
            read = [s["read"] for s in stages]
            sizes = " / ".join(
                " to ".join(dict.fromkeys(_size(s[key]) for s in (stages[0], stages[-1])))
                for key in ("read", "written", "moved")
            )
            assert all(read)
            lines.append(_row(f"{times}{stage['name']}{title}", [sizes, *cells]))
    return lines


def _size(size: int) -> str:
    return gigabytes(size) if size else "-"


def _head(extra: str, title: str) -> list[str]:
    columns = [title, *([extra] if extra else []), *(f"{nodes} nodes" for nodes in NODES)]
    return [_row(columns[0], columns[1:]), "| " + " | ".join(["---"] * len(columns)) + " |"]


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
