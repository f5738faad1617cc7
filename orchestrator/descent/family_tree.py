"""Put a child's ancestry together: from its own lineage, and from those that lie beside its parents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.descent.ancestry import (
    Ancestor,
    Ancestry,
    Descent,
    join,
    parse_ancestry,
    parse_scores,
)
from orchestrator.descent.lineage import LINEAGE_FILE, LINEAGE_FORMAT, hub_source, licence_of
from orchestrator.descent.shares import weighted_shares
from workers.checkpoints import Checkpoint
from workers.storage import ObjectNotFoundError

BASE = "base"

ShareTable = Mapping[str, Mapping[str, float]]
"""Component -> parent, or `base` -> its share there."""


def add_ancestry(
    lineage: dict[str, Any],
    parents: Mapping[str, Checkpoint],
    base: Checkpoint | None,
    measured: ShareTable | None = None,
    through: Sequence[Descent] = (),
    bred: Mapping[str, Ancestor] | None = None,
) -> None:
    """Add the key `ancestry` to a child's lineage, with all that its parents' own lineages tell.

    `measured` shares, or else those that the lineage has as `attribution`, stand in for those that the
    recipe's weights give, component by component. `bred`, by
    key: children that were bred from and never written; the child came `through` some of them. A
    parent's lineage that cannot be read is noted, and the parent taken for a founder.
    """
    child = replace(describe_child(lineage, measured), through=tuple(through))
    known = []
    for parent in lineage["parents"]:
        hub = parent.get("hub")
        known.append(
            (parent["fingerprint"], ancestry_of(parents[parent["name"]], parent["name"], hub))
        )
    if base is not None:
        known.append((base.fingerprint, ancestry_of(base, BASE)))
    known += [(key, Ancestry(ancestor, {})) for key, ancestor in (bred or {}).items()]
    try:
        ancestry = join(child, known)
    except ValueError as error:  # Nothing that Darwin wrote: a child is never its own ancestor.
        note = f"its {LINEAGE_FILE} and those of the other parents contradict each other ({error})"
        ancestry = join(
            child,
            [(key, Ancestry(as_founder(told.child, note), {})) for key, told in known],
        )
    lineage["ancestry"] = ancestry.to_dict()


def as_founder(ancestor: Ancestor, note: str | None = None) -> Ancestor:
    """The ancestor as if nothing older were known of it."""
    return replace(ancestor, parents=(), through=(), note=note)


def ancestry_of(checkpoint: Checkpoint, name: str, hub: str | None = None) -> Ancestry:
    """What a checkpoint tells of itself: of one without a lineage, that it is a founder."""
    source = hub_source(checkpoint, hub)
    founder = Ancestor(
        name,
        checkpoint.fingerprint,
        license=licence_of(checkpoint),
        hub=source["hub"],
        revision=source["revision"],
    )
    try:
        content = checkpoint.store.read(LINEAGE_FILE)
    except ObjectNotFoundError:
        return Ancestry(founder, {})
    if checkpoint.adapter is not None:
        note = "an adapter on a child of Darwin, whose ancestors are not followed"
        return Ancestry(replace(founder, note=note), {})
    try:
        lineage = json.loads(content)
        if lineage["format"] > LINEAGE_FORMAT:
            raise ValueError(f"format {lineage['format']} is newer than this version of Darwin")
        told = parse_ancestry(lineage["ancestry"]) if "ancestry" in lineage else _older(lineage)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        note = f"its {LINEAGE_FILE} cannot be read ({error!s:.100})"
        return Ancestry(replace(founder, note=note), {})
    known = {
        key: getattr(founder, key) for key in ("name", "fingerprint", "license", "hub", "revision")
    }
    return Ancestry(replace(told.child, **known), told.ancestors)


def _older(lineage: dict[str, Any]) -> Ancestry:
    """The ancestry of a lineage that was written without one: its parents, and no further."""
    child = describe_child(lineage)
    base = lineage.get("base")
    parents = [*lineage["parents"], *([base | {"name": BASE}] if base else [])]
    known = {
        parent["fingerprint"]: Ancestor(
            parent["name"],
            parent["fingerprint"],
            license=parent.get("license"),
            hub=parent.get("hub"),
            revision=parent.get("revision"),
        )
        for parent in parents
    }
    # Through plain data, so that what others wrote is checked as an ancestry is.
    return parse_ancestry(Ancestry(child, known).to_dict())


def describe_child(lineage: dict[str, Any], measured: ShareTable | None = None) -> Ancestor:
    """The child of a lineage, with its descent from its parents and its base."""
    names = [parent["name"] for parent in lineage["parents"]]
    tensors, base = lineage["tensors"], lineage.get("base")
    elements: dict[str, int] = {}
    for tensor in tensors:
        elements[tensor["component"]] = elements.get(tensor["component"], 0) + tensor["elements"]
    measured = measured or measured_shares(lineage)
    of_recipe = {
        component: given
        for (component,), given in weighted_shares(tensors, names, "component").items()
    }
    table: ShareTable = {  # what the parents leave is the base's
        component: {BASE: max(0.0, 1.0 - sum(given.values())) if base else 0.0, **given}
        for component, given in (of_recipe | dict(measured)).items()
    }
    descents = [
        Descent(
            parent["fingerprint"],
            parent["name"],
            "mother" if number else "father",
            shares_of(table, parent["name"]),
        )
        for number, parent in enumerate(lineage["parents"])
    ]
    if base:
        descents.append(Descent(base["fingerprint"], BASE, BASE, shares_of(table, BASE)))
    return Ancestor(
        lineage.get("campaign") or "merge",
        recipe_id=lineage["recipe_id"],
        campaign=lineage.get("campaign"),
        scores=_scores(lineage),
        elements=elements,
        based_on="measured" if measured else "recipe",
        parents=tuple(descents),
    )


def measured_shares(lineage: dict[str, Any]) -> ShareTable:
    """What was measured on the child's bytes, of the components whose parents can be told apart."""
    return {
        part["component"]: part["shares"]
        for part in lineage.get("attribution") or ()
        if part["shares"]
    }


def shares_of(table: ShareTable, parent: str) -> dict[str, float]:
    """Component -> the parent's share, of a table by component."""
    return {component: float(given.get(parent, 0.0)) for component, given in table.items()}


def _scores(lineage: dict[str, Any]) -> dict[str, Any] | None:
    """The headline of what a campaign's child scored on held-out items."""
    if "holdout_fitness" not in lineage:
        return None
    return parse_scores(
        {
            "objective": lineage["search"]["objective"],
            "fitness": lineage["holdout_fitness"]["child"],
            "beaten": lineage["beaten"],
        }
    )
