"""The section of a model card on how the child's experts are chosen."""

from __future__ import annotations

from typing import Any

from orchestrator.experts.routing_table import MEANING, routing_notes, routing_table
from orchestrator.reporting.markdown import table


def routing_section(lineage: dict[str, Any]) -> str:
    """How the child's experts are chosen; empty where that was not measured."""
    record = lineage.get("routing")
    if not record:
        return ""
    if "not_compared" in record:
        return (
            f"## Routing of experts\n\nNot compared with the parents': {record['not_compared']}\n"
        )
    notes = "".join(f"\n{note}\n" for note in routing_notes(record))
    return f"## Routing of experts\n\n{table(routing_table(record))}\n{MEANING}\n{notes}"
