"""The child's model card: what it is, what was measured, what it is made of. Written from the lineage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from orchestrator.descent.ancestry import Ancestry, parse_ancestry
from orchestrator.descent.lineage import ATTRIBUTION_FILE, LINEAGE_FILE
from orchestrator.experts.matching import notes_on_matching
from orchestrator.mri.prescribing import notes_on_search
from orchestrator.objectives import scalar_name
from orchestrator.reporting.ancestry_view import founders, licences, tree_lines
from orchestrator.reporting.evidence import better_of
from orchestrator.reporting.expert_map import expert_map, expert_rows
from orchestrator.reporting.front import front_section
from orchestrator.reporting.held_out_section import held_out_section
from orchestrator.reporting.making import making
from orchestrator.reporting.markdown import join, table
from orchestrator.reporting.routing_section import routing_section
from orchestrator.statistics import format_p_value
from orchestrator.watching.spending import cost_words

MOST_WARNINGS = 10
"""Of the health check, on the card."""
SHARES_ARE = {
    "recipe": "those of this child's parents are its recipe's weights.",
    "measured": "those of this child's parents were measured on its bytes.",
}


COST_LINE = "What it took: "
"""Begins the one line of a card that differs from run to run."""

BRED_SHARES = "By way of children that were bred and never written, they are those of recipes."


@dataclass(frozen=True)
class ComponentChange:
    """What became of one component."""

    component: str
    elements: int
    methods: list[str]
    changed: dict[str, float]
    """Parent -> share of the elements that differ from it."""


def build_card(lineage: dict[str, Any], cost: dict[str, Any] | None = None) -> str:
    """The child's README.md: Hub metadata, what it is made of, and what was measured; `cost`, if known, is
    what the search took until then."""
    names = [parent["name"] for parent in lineage["parents"]]
    metadata: dict[str, Any] = {
        "base_model": [parent["hub"] or parent["name"] for parent in lineage["parents"]],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "merge",
            *(["evolutionary-merge"] if _evolved(lineage["search"]) else []),
            "darwin",
        ],
    }
    declared = {parent["license"] for parent in lineage["parents"]}
    ancestry = parse_ancestry(lineage["ancestry"]) if "ancestry" in lineage else None
    if ancestry:
        declared |= {licence or None for licence in ancestry.licences()}
    if len(declared) == 1 and None not in declared:
        metadata["license"] = declared.pop()
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) + "---\n",
        f"# {lineage['campaign']}\n",
        f"A merge of {join(names)} by Darwin, {_how_found(lineage['search'])}, without training.\n",
        f"**{verdict(lineage)}**\n",
        f"{reservations(lineage)}\n",
        _health(lineage),
        routing_section(lineage),
        held_out_section(lineage, names),
        front_section(lineage),
        "## How it was made\n",
        making(lineage),
        f"{COST_LINE}{cost_words(cost)}.\n" if cost else "",
        "".join(f"{note}\n" for note in notes_on_search(lineage["search"])),
        "".join(f"{note}\n" for note in notes_on_matching(lineage)),
        _measured(lineage),
        tensor_table(lineage, names),
        _experts(lineage),
        "## Lineage\n",
        parent_table(lineage),
        _unused(lineage),
        _ancestry(ancestry) if ancestry else "",
        f"Recipe `{lineage['recipe_id']}`. The recipe, the genome, the held-out results, and for every "
        f"tensor its method, parameters, changes and SHA-256 are in `{LINEAGE_FILE}`.\n",
    ]
    return "\n".join(part for part in parts if part)


def _evolved(search: dict[str, Any]) -> bool:
    """Whether candidates came of what others had reached."""
    return search["evaluations"] > 1 and search["optimizer"] not in ("random", "random_steady")


def _how_found(search: dict[str, Any]) -> str:
    if _evolved(search):
        return "found by evolutionary search"
    if search["evaluations"] > 1:
        return f"the best of {search['evaluations']} candidates drawn at random"
    return "the one candidate of its campaign"


def verdict(lineage: dict[str, Any]) -> str:
    """In one sentence, which parents the child beats on the held-out items, or why it may not claim to."""
    if failed := (lineage.get("health") or {}).get("rejected"):
        return f"Rejected: this child did not pass the gates {join(failed)}, so it is kept aside."
    beaten = lineage["beaten"]
    rest = [p["name"] for p in lineage["parents"] if p["name"] not in beaten]
    if not beaten:
        return "This child beats none of its parents on the held-out items (p < 0.05)."
    if rest:
        return f"On the held-out items this child beats {join(beaten)} (p < 0.05), but not {join(rest)}."
    return "On the held-out items this child beats every parent (p < 0.05)."


def reservations(lineage: dict[str, Any]) -> str:
    """What the verdict means, and the single tasks on which a parent is better than the child."""
    better = [
        f"{c['parent']} on {c['task']} (p = {format_p_value(c['p_value'])})"
        for c in lineage["comparisons"]
        if c["task"] != "all" and better_of(c) == "parent"
    ]
    aim = scalar_name(lineage["search"]["objective"])
    meaning = (
        "To beat a parent is to have more right answers over all items, and a higher "
        f"{aim} of the tasks' scores, both significantly."
    )
    if allowed := (lineage.get("health") or {}).get("allowed"):
        meaning = f"Published although it did not pass {join(allowed)}: the campaign allows that. {meaning}"
    if not better:
        return meaning
    return f"{meaning} On single tasks these parents are better than the child: {join(better)}."


def _health(lineage: dict[str, Any]) -> str:
    """What was checked before the child was published; empty for children from before there were gates."""
    health = lineage.get("health")
    if not health:
        return ""
    rows = [["check", "result", "found", "bound"]]
    rows += [[g["name"], g["result"], g["finding"], g["bound"]] for g in health["gates"]]
    warnings = [w for g in health["gates"] for w in g["warnings"]]
    some = warnings[:MOST_WARNINGS]
    if warnings[MOST_WARNINGS:]:
        some.append(f"{len(warnings) - len(some)} more are in `{LINEAGE_FILE}`")
    lines = "".join(f"- {' '.join(warning.split())}\n" for warning in some)
    return f"## Health check\n\n{table(rows)}" + (f"\n{lines}" if lines else "")


def tensor_table(lineage: dict[str, Any], names: list[str]) -> str:
    """What each component was merged by, and how much of it differs from the parents with these names."""
    rows = [["component", "parameters", "method", *(f"differs from {name}" for name in names)]]
    for change in component_changes(lineage):
        shares = [f"{change.changed[name]:.1%}" for name in names]
        rows.append([change.component, f"{change.elements:,}", ", ".join(change.methods), *shares])
    return table(rows)


def _experts(lineage: dict[str, Any]) -> str:
    """What became of the routed experts; empty for models without."""
    found = expert_map(lineage)
    if found is None:
        return ""
    return (
        f"### Experts\n\nRouted experts that are {found.parents[0]}'s, a blend, or another parent's:\n\n"
        + table(expert_rows(found))
    )


def _measured(lineage: dict[str, Any]) -> str:
    """Which parent each component comes from, as measured; empty for a lineage from before that was."""
    told, alike = [], []
    for part in lineage.get("attribution", ()):
        if not part["shares"]:
            alike.append(part["component"])
            continue
        name, share = max(part["shares"].items(), key=lambda item: item[1])
        explained = part["explained"]
        by = "" if explained is None else f" ({explained:.0%} explained)"
        told.append(f"{part['component']} {share:.0%} {name}{by}")
    if not told:
        return ""
    alike_there = f" The parents cannot be told apart in {join(alike)}." if alike else ""
    return (
        f"Measured from the weights, not read from the recipe: **{', '.join(told)}**. These are the largest "
        "shares in the combination of the parents that is nearest to the child, and how much of the "
        f"distances to them it explains.{alike_there} All shares, by layer and by tensor, are in "
        f"`{ATTRIBUTION_FILE}`.\n"
    )


def component_changes(lineage: dict[str, Any]) -> list[ComponentChange]:
    """Per component: how much of it there is, and how much of it differs from each parent."""
    names = [parent["name"] for parent in lineage["parents"]]
    tensors: dict[str, list[dict[str, Any]]] = {}
    for tensor in lineage["tensors"]:
        tensors.setdefault(tensor["component"], []).append(tensor)
    changes = []
    for component, parts in tensors.items():
        elements = sum(tensor["elements"] for tensor in parts)
        methods = sorted({tensor["method"] for tensor in parts})
        changed = {
            name: sum(tensor["changed"].get(name, 0) for tensor in parts) / max(elements, 1)
            for name in names
        }
        changes.append(ComponentChange(component, elements, methods, changed))
    return changes


def parent_table(lineage: dict[str, Any]) -> str:
    """Who the parents and the base are."""
    rows = [["role", "parent", "licence", "fingerprint"]]
    for number, parent in enumerate(lineage["parents"]):
        rows.append(
            [
                parent.get("gives") or ("mother" if number else "father"),
                parent["hub"] or parent["name"],
                parent["license"] or "not declared",
                f"`{parent['fingerprint'][:16]}`",
            ]
        )
    if lineage["base"]:
        base = lineage["base"]
        rows.append(
            ["base", "", base["license"] or "not declared", f"`{base['fingerprint'][:16]}`"]
        )
    return table(rows)


def _ancestry(ancestry: Ancestry) -> str:
    """The tree over all generations, what of the child comes from each founder, and all licences."""
    tree = "\n".join(line.replace("`", "'") for line in tree_lines(ancestry))
    components = list(ancestry.child.elements or {})
    rows = [["founder", "share", *components, "licence", "fingerprint"]]
    for founder in founders(ancestry):
        rows.append(
            [
                founder.name,
                f"{founder.share:.1%}",
                *(f"{founder.shares.get(component, 0.0):.1%}" for component in components),
                founder.ancestor.license or "not declared",
                f"`{(founder.ancestor.fingerprint or '')[:16]}`",
            ]
        )
    declared = [["licence", "ancestors"]]
    declared += [[licence, ", ".join(names)] for licence, names in licences(ancestry)]
    return "\n".join(
        [
            "### Ancestors\n",
            "Percentages are shares of this child. They multiply from generation to generation: "
            f"{SHARES_ARE[ancestry.child.based_on]}{' ' + BRED_SHARES if ancestry.child.through else ''}\n",
            f"```text\n{tree}\n```\n",
            "Founders, of whom nothing older is known, each summed over all the ways that lead to it:\n",
            table(rows),
            "Licences that all these ancestors declare; each of them counts:\n",
            table(declared),
        ]
    )


def _unused(lineage: dict[str, Any]) -> str:
    """Tensors of mothers that the father's layout has no place for; empty if there are none."""
    lines = []
    for parent in lineage["parents"]:
        names = parent["unused_tensors"]
        if names:
            some = ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if names[3:] else "")
            lines.append(f"- {len(names)} of {parent['name']}: {some}\n")
    return (
        "Tensors that the father does not have, so the child neither:\n\n" + "".join(lines)
        if lines
        else ""
    )
