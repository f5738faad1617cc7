"""Which parent a child's weights come from, measured: `darwin attribute`, and the end of every campaign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.child_writer import ChildWriter
from orchestrator.descent.lineage import ATTRIBUTION_FILE, LINEAGE_FILE
from orchestrator.descent.shares import weighted_shares
from orchestrator.inputs import check_parents
from orchestrator.places import open_parent
from orchestrator.pool.calls import Calls, open_calls
from workers.actors import MergeWorker
from workers.checkpoints import (
    COMPONENTS,
    ArchitectureMap,
    Checkpoint,
    LogicalTensor,
)
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.diagnostics.attribution import (
    CHUNK_ELEMENTS,
    Products,
    attribute,
    cut_chunks,
    to_dict,
)
from workers.errors import BadInputError
from workers.merging import ParentReference, Recipe
from workers.merging.expert_order import parse_orders
from workers.merging.plan import BASE
from workers.merging.recipe import parse_form, parse_slice
from workers.storage import ObjectNotFoundError
from workers.storage.documents import anything, each, keys, read_document, table

ATTRIBUTION_FORMAT = 1

GROUP_BYTES = 32 << 20
"""At least so much of the child is measured in one call."""

MEASURED = keys({}, {"components": each(table(anything)), "cells": each(table(anything))})

NOTHING: dict[str, Any] = {
    "coefficients": {}, "shares": None, "undetermined": [], "explained": None, "uniform": None,
    "residual": None,
}  # fmt: skip
"""Of tensors that no parent has: there is nothing to compare them with."""


def attribute_written(writer: ChildWriter, calls: Calls) -> dict[str, Any]:
    """The attribution of a child whose weights are written; that of an earlier try, if there is one.

    The child need not be published yet: it is published with its attribution.
    """
    try:
        known = read_document(writer.target, ATTRIBUTION_FILE, MEASURED)
    except ObjectNotFoundError:
        pass
    else:
        if (known.get("format"), known.get("recipe_id")) == (ATTRIBUTION_FORMAT, writer.recipe.id):
            return dict(known)
    form = replace(writer.recipe, rules=(), seed=0)  # what was merged how must not matter
    measured = _measure(calls, form, writer.target.uri, False, writer.plan.child.tensors)
    return {"format": ATTRIBUTION_FORMAT, "recipe_id": writer.recipe.id, **measured}


def attribute_checkpoint(
    location: str,
    parents: dict[str, str],
    base: str | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """The attribution of the checkpoint at `location` to these parents (name -> place, the father first).

    Stacked layers, reordered experts, and another vocabulary than the father's, are paired as the child's
    lineage says, if it has one; nothing else is taken from there. What the lineage's recipe intended goes
    beside it as `intended`. Raises `BadInputError` for parents that do not fit together or to the child.
    """
    if len(parents) < 2 and base is None:
        raise BadInputError(
            "one parent alone would be all of the child, whatever it is: name its other parents, or the base"
        )
    child = open_parent(location)
    lineage = _read_lineage(child)
    opened = {name: open_parent(place) for name, place in parents.items()}
    opened_base = open_parent(base) if base is not None else None
    stored = lineage.get("recipe", {})
    vocabulary = stored.get("vocabulary")
    check_parents(opened | ({BASE: opened_base} if opened_base else {}), vocabulary)
    names = list(opened)
    try:
        layers = [parse_slice(part, names) for part in stored.get("layers") or ()]
        form = parse_form({"vocabulary": vocabulary}, names)
        orders = dict(stored.get("experts") or {})
        if opened_base is None:
            orders.pop(BASE, None)
        experts = parse_orders(orders, names, opened_base is not None)
    except BadInputError as error:
        raise BadInputError(
            f"{child.location}/{LINEAGE_FILE}: {error}: give the parents the names that they have there"
        ) from error
    recipe = Recipe(
        tuple(ParentReference(name, parent.fingerprint) for name, parent in opened.items()),
        (),
        ParentReference(BASE, opened_base.fingerprint) if opened_base else None,
        layers=tuple(layers),
        experts=experts,
        **form,
    )
    tensors = ArchitectureMap.of(child).tensors

    def prepare(worker: MergeWorker) -> None:
        worker.start(recipe)  # once, before the processes share it

    with open_calls(opened, opened_base, None, None, prepare, processes) as calls:
        measured = _measure(calls, recipe, child.location, True, tensors)
    if {name: measured["total"][name] for name in NOTHING} == NOTHING:
        raise BadInputError(
            f"{child.location}: has no tensor of the name and shape of one of its parents: these are none"
        )
    return {
        "format": ATTRIBUTION_FORMAT,
        "child": child.location,
        "recipe_id": lineage.get("recipe_id"),
        **measured,
        "intended": _intended(lineage),
        "warnings": _warnings(lineage, names, base),
    }


def _warnings(lineage: dict[str, Any], names: list[str], base: str | None) -> list[str]:
    """Where the numbers would be read as another thing than they are."""
    found = []
    if lineage.get("base") and base is None:
        found.append(
            "the child was merged with a base, and none is given: what comes from that is counted as the "
            "parents'; give it with --base"
        )
    theirs = [str(parent.get("name")) for parent in lineage.get("parents") or ()]
    if theirs and not set(names) <= set(theirs):
        found.append(
            f"the lineage calls the parents {', '.join(theirs)}: under other names the recipe's shares are "
            "not shown beside the measured ones"
        )
    return found


def render_attribution(result: dict[str, Any]) -> Any:
    """The components as a table for a terminal."""
    from rich.table import Table

    points = [*result["parents"], *([BASE] if result["base"] else [])]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("component", "elements", *points, "explained", "identical tensors"):
        table.add_column(head, justify="left" if head == "component" else "right")
    intended = result.get("intended") or {}
    for part in [*result["components"], {"component": "all", **result["total"]}]:
        shares = part["shares"] or {}
        nothing = "unknown" if part["residual"] is None else "alike"
        same = [f"{count} {name}" for name, count in part["identical"].items() if count]
        table.add_row(
            part["component"],
            f"{part['elements']:,}",
            *(_percent(shares.get(name, 0.0)) if shares else nothing for name in points),
            "" if part["explained"] is None else _percent(part["explained"]),
            ", ".join(same) or "none",
        )
        wanted = intended.get(part["component"])
        if wanted is not None:
            named = (f"({_percent(wanted[name])})" if name in wanted else "" for name in points)
            table.add_row("  (recipe)", "", *named, "", "")
    return table


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _measure(
    calls: Calls, recipe: Recipe, child: str, published: bool, tensors: Sequence[LogicalTensor]
) -> dict[str, Any]:
    """Everything that is the same for a written child and one that a user names."""
    sizes = [tensor.elements * BITS_PER_ELEMENT[tensor.dtype] // 8 for tensor in tensors]
    groups = _groups(tensors, max(calls.group_bytes(sum(sizes)), GROUP_BYTES))
    given = [(recipe.to_dict(), child, published, group) for group in groups]
    found: dict[int, list[Products]] = dict(calls.each("attribute", given))
    products: dict[str, Products] = {}
    for number, group in enumerate(groups):
        for (name, _), part in zip(group, found[number], strict=True):
            if name in products:
                products[name].add(part)
            else:
                products[name] = part
    parents = [parent.name for parent in recipe.parents]
    return {
        "parents": parents,
        "base": recipe.base is not None,
        "total": _describe(tensors, products, parents),
        "components": _by("component", tensors, products, parents),
        "cells": _by("component", tensors, products, parents, "layer"),
        "tensors": [
            {"name": tensor.name, "expert": tensor.expert, "component": tensor.component,
             "layer": tensor.layer, **_describe([tensor], products, parents)}
            for tensor in tensors
        ],
    }  # fmt: skip


def _groups(tensors: Sequence[LogicalTensor], most: int) -> list[list[tuple[str, int]]]:
    """The chunks of the child, in order, in groups of about so many bytes."""
    chunk_bytes = {
        t.name: min(t.elements, CHUNK_ELEMENTS) * BITS_PER_ELEMENT[t.dtype] // 8 for t in tensors
    }
    groups: list[list[tuple[str, int]]] = []
    size = most
    for chunk in cut_chunks(tensors):
        if size >= most:
            groups.append([])
            size = 0
        groups[-1].append(chunk)
        size += chunk_bytes[chunk[0]]
    return groups


def _by(
    component: str,
    tensors: Sequence[LogicalTensor],
    products: dict[str, Products],
    parents: list[str],
    *further: str,
) -> list[dict[str, Any]]:
    """The attribution of the tensors that agree in these attributes, in the order of the model."""
    keys = (component, *further)
    groups: dict[tuple[Any, ...], list[LogicalTensor]] = {}
    for tensor in tensors:
        groups.setdefault(tuple(getattr(tensor, key) for key in keys), []).append(tensor)
    ordered = sorted(
        groups.items(),
        key=lambda item: (
            COMPONENTS.index(item[0][0]),
            *((layer is None, layer or 0) for layer in item[0][1:]),
        ),
    )
    return [
        dict(zip(keys, place, strict=True)) | _describe(group, products, parents)
        for place, group in ordered
    ]


def _describe(
    tensors: Sequence[LogicalTensor], products: dict[str, Products], parents: list[str]
) -> dict[str, Any]:
    elements = sum(tensor.elements for tensor in tensors)
    found = attribute((products[tensor.name] for tensor in tensors), elements)
    return {
        "elements": elements,
        "tensors": len(tensors),
        "identical": {
            name: sum(products[tensor.name].changed.get(name) == 0 for tensor in tensors)
            for name in parents
        },
        **(to_dict(found) if found else NOTHING),
    }


def _read_lineage(child: Checkpoint) -> dict[str, Any]:
    """What a child of Darwin says of itself; nothing, if it is none."""
    try:
        lineage = read_document(child.store, LINEAGE_FILE)
    except (ObjectNotFoundError, ValueError):
        return {}
    good = isinstance(lineage, dict) and isinstance(lineage.get("recipe"), dict)
    return lineage if good else {}


def _intended(lineage: dict[str, Any]) -> dict[str, dict[str, float]] | None:
    """The parents' shares in each component by the recipe in the lineage; None if it does not tell."""
    try:
        parents = [parent["name"] for parent in lineage["parents"]]
        shares = weighted_shares(lineage["tensors"], parents, "component")
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return {component: found for (component,), found in shares.items()}
