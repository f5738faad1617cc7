"""The model card of a child that was merged without a search."""

from __future__ import annotations

from typing import Any

import yaml

from orchestrator.descent.lineage import LINEAGE_FILE
from orchestrator.reporting.card import parent_table, tensor_table
from orchestrator.reporting.markdown import join
from orchestrator.reporting.routing_section import routing_section


def build_merge_card(lineage: dict[str, Any]) -> str:
    """The README.md of a child that was merged without a search, and whose routing was measured."""
    whole = [parent for parent in lineage["parents"] if "gives" not in parent]
    names = [parent["name"] for parent in whole]
    metadata = {
        "base_model": [parent["hub"] or parent["name"] for parent in whole],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "darwin"],
    }
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) + "---\n",
        f"# A merge of {join(names)}\n",
        "Merged by Darwin from a recipe, without training. Nothing was scored: this card makes no claim "
        "about what the child can do.\n",
        routing_section(lineage),
        "## How it was made\n",
        tensor_table(lineage, names),
        "## Lineage\n",
        parent_table(lineage),
        f"Recipe `{lineage['recipe_id']}`. The recipe, and for every tensor its method, parameters and "
        f"changes, are in `{LINEAGE_FILE}`.\n",
    ]
    return "\n".join(part for part in parts if part)
