"""HARC before a merge: routers are calibrated layer by layer, kept beside the child, and then merged from
there.

They become a partial checkpoint under `routers/` of the child's place, which the recipe names as a further
parent: so the recipe describes the child completely, and its routers outlive the merge. Each finished layer
is recorded, so that an interrupted calibration goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from orchestrator.descent.family_tree import add_ancestry
from orchestrator.descent.lineage import (
    LINEAGE_FILE,
    LINEAGE_FORMAT,
    describe_source,
    lineage_bytes,
    package_version,
)
from orchestrator.experts.router import AS_EXPERTS, HARC, ROUTERS, Harc, with_routers
from orchestrator.experts.routing_table import routing_record
from orchestrator.pool.calls import open_calls
from orchestrator.progress_bar import steps_bar
from orchestrator.recipe_file import RecipeFile
from orchestrator.workers_config import WorkersConfig
from workers.actors import PROBE_THREADS
from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor, open_checkpoint
from workers.checkpoints.checkpoint import SINGLE_FILE
from workers.checkpoints.partial import partial_weights, write_partial
from workers.errors import BadInputError
from workers.experts.calibration_order import (
    RECORDS,
    TOLERANCE,
    CalibrationOrder,
    read_record,
    router_bytes,
    write_record,
)
from workers.experts.plain_routers import plain_routers
from workers.merging import ParentReference, Rule
from workers.merging.plan import Plan, form_of
from workers.storage import ObjectNotFoundError, PreconditionFailedError, Store
from workers.storage.documents import anything, keys, read_document, table, text

ROUTERS_FOLDER = "routers"
"""Of the child's place."""
MANIFEST = f"{RECORDS}/manifest.json"


@dataclass(frozen=True)
class Calibrated:
    """What a calibration ends with."""

    loaded: RecipeFile
    """Without the wish for one: the recipe takes what came of it, from the last of its parents."""
    routing: dict[str, Any]
    """What the child's lineage tells of them."""


def calibrate_routers(
    loaded: RecipeFile, target: Store, workers: WorkersConfig | None, address: str | None
) -> Calibrated:
    """The recipe that takes calibrated routers, with them among its parents.

    What an earlier run with the same parents, recipe and sets has left under `target` is used. Raises
    `BadInputError` if that is of another calibration, or the parents are no mixtures of experts of a kind
    whose routers can be calibrated.
    """
    assert loaded.harc is not None
    place = target.substore(ROUTERS_FOLDER)
    plan = _plan(loaded)
    order = _order(loaded, plan)
    key = _key(order)
    routing = _finished(place, key)
    if routing is None:
        records = _calibrate(loaded, order, plain_routers(plan.child), place, key, workers, address)
        _write(loaded, plan, records, place, key)
        routing = _finished(place, key)
        assert routing is not None
    place.delete_folder(RECORDS)
    return _with_parent(loaded, open_checkpoint(place.uri), routing)


def _plan(loaded: RecipeFile) -> Plan:
    plan = Plan(
        {name: ArchitectureMap.of(parent) for name, parent in loaded.parents.items()},
        ArchitectureMap.of(loaded.base) if loaded.base else None,
        form_of(loaded.recipe),
    )
    plain_routers(plan.child)
    plan.assign(loaded.recipe)  # what cannot be merged is not worth a calibration
    return plan


def _calibrate(
    loaded: RecipeFile,
    order: CalibrationOrder,
    routers: dict[int, LogicalTensor],
    place: Store,
    key: str,
    workers: WorkersConfig | None,
    address: str | None,
) -> list[dict[str, Any]]:
    """The records of all layers, the lowest first: those that are missing are made."""
    known = _records(place, key, list(routers))
    with (
        open_calls(loaded.parents, loaded.base, workers, address, processes=1) as calls,
        steps_bar("calibrating routers", len(routers), "layers") as notify,
    ):
        notify(len(known))
        for layer in list(routers)[len(known) :]:
            before = {done: record["sha256"] for done, record in known.items()}
            given = (order, layer, before, place.uri)
            try:
                ((_, found),) = calls.each("calibrate_router", [given])
            except BadInputError:
                if not known:  # so that the place is free for a recipe that was mended
                    place.delete_folder(RECORDS)
                raise
            known[layer] = write_record(place, layer, asdict(found))
            notify(1)
    return [known[layer] for layer in routers]


def _write(
    loaded: RecipeFile,
    plan: Plan,
    records: list[dict[str, Any]],
    place: Store,
    key: str,
) -> None:
    """The routers as a checkpoint, with a lineage of their own: they descend from the donors."""
    assert loaded.harc is not None
    tensors = {
        record["stored"]: (record["dtype"], tuple(record["shape"]), router_bytes(record))
        for record in records
    }
    weights = partial_weights(tensors)
    harc = loaded.harc
    donors = {name: loaded.parents[name] for name in harc.sets}
    lineage = {
        "format": LINEAGE_FORMAT,
        "software": {"darwin": package_version()},
        "parents": [{"name": n, **describe_source(parent)} for n, parent in donors.items()],
        "base": None,
        "recipe_id": loaded.recipe.id,
        "recipe": loaded.recipe.to_dict(),
        "calibration_key": key,
        "files": {SINGLE_FILE: hashlib.sha256(weights).hexdigest()},
        "routing": routing_record(
            [record["routing"] for record in records],
            sets=harc.summary,
            held_out=harc.holds_out,
            calibration={
                "warnings": _warnings(harc, records),
                "layers": [
                    {"tensor": record["name"], "tokens": record["tokens"], **record["solution"]}
                    for record in records
                ],
            },
        ),
        "tensors": [
            {
                "name": record["name"],
                "component": "router",
                "layer": plan.child.by_name[record["name"]].layer,
                "elements": plan.child.by_name[record["name"]].elements,
                "method": HARC,
                "parameters": {"weight": dict.fromkeys(donors, 1.0)},  # they count alike
                "changed": {},
                "moved": {},
                "not_finite": 0,
            }
            for record in records
        ],
    }
    add_ancestry(lineage, donors, None)
    write_partial(place, plan.layout.config, weights, {LINEAGE_FILE: lineage_bytes(lineage)})


def _warnings(harc: Harc, records: list[dict[str, Any]]) -> list[str]:
    """What speaks against the solution."""
    channels = records[0]["shape"][1]
    found = [
        f"HARC has seen {tokens} tokens of the prompts of {name}, fewer than the {channels} channels that a "
        "router reads: give it larger sets"
        for name, tokens in records[0]["tokens"].items()
        if tokens < channels
    ]
    tolerance = harc.options.get("tolerance", TOLERANCE)
    open_ = [r["name"] for r in records if r["solution"]["residual"] > tolerance]
    if open_:
        found.append(
            f"HARC has not converged in {len(open_)} of {len(records)} routers ({open_[0]}): allow more "
            "iterations, or give it larger sets"
        )
    return found


def _with_parent(loaded: RecipeFile, routers: Checkpoint, routing: dict[str, Any]) -> Calibrated:
    """The recipe with the calibrated routers as a parent; no other rule sees that."""
    name = ROUTERS_FOLDER
    while name in loaded.parents:
        name += "_"
    recipe = loaded.recipe
    others = tuple(loaded.parents)
    rules = [
        rule if rule.method == AS_EXPERTS else replace(rule, parents=rule.parents or others)
        for rule in recipe.rules[1:]
    ]
    first = Rule(ROUTERS, "passthrough", {"source": name}, parents=(name,))
    taking = replace(
        recipe,
        parents=(*recipe.parents, ParentReference(name, routers.fingerprint)),
        rules=(first, *rules),
    )
    taken = replace(
        loaded,
        parents=loaded.parents | {name: routers},
        recipe=taking,
        warnings=(*loaded.warnings, *routing["calibration"]["warnings"]),
        harc=None,
    )
    return Calibrated(taken, routing)


def _order(loaded: RecipeFile, plan: Plan) -> CalibrationOrder:
    assert loaded.harc is not None
    compared = {}
    rows = with_routers(replace(loaded.recipe, rules=loaded.recipe.rules[1:]), AS_EXPERTS)
    with suppress(BadInputError):  # there are methods whose rows cannot be merged so
        plan.assign(rows)
        compared[AS_EXPERTS] = rows.to_dict()
    return CalibrationOrder(
        loaded.recipe.to_dict(),
        loaded.harc.texts,
        loaded.harc.held_out,
        compared,
        **loaded.harc.options,
    )


def _key(order: CalibrationOrder) -> str:
    """What the calibrated routers depend on."""
    identity = asdict(order) | {
        "threads": PROBE_THREADS,
        "versions": {"darwin": package_version()}
        | {name: version(name) for name in ("torch", "transformers")},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _finished(place: Store, key: str) -> dict[str, Any] | None:
    """What the lineage of routers tells of their calibration; None if they are not complete."""
    try:
        lineage = read_document(place, LINEAGE_FILE, keys({"routing": table(anything)}))
        place.info("config.json")
    except ObjectNotFoundError:
        return None
    _check_key(place, lineage.get("calibration_key"), key)
    found: dict[str, Any] = lineage["routing"]
    return found


def _records(place: Store, key: str, layers: list[int]) -> dict[int, dict[str, Any]]:
    """Of the lowest layers, as far as an earlier run has come."""
    try:
        place.create(MANIFEST, json.dumps({"key": key}).encode())
    except PreconditionFailedError:
        _check_key(place, read_document(place, MANIFEST, keys({"key": text}))["key"], key)
    known: dict[int, dict[str, Any]] = {}
    for layer in layers:
        try:
            known[layer] = read_record(place, layer)
        except ObjectNotFoundError:
            break
    return known


def _check_key(place: Store, found: Any, key: str) -> None:
    if found != key:
        raise BadInputError(
            f"{place.uri}: holds routers that were calibrated with other parents, rules, sets or versions; "
            "remove the folder or choose another place"
        )
