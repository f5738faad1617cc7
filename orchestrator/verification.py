"""Verify a child as it lies in its store, against what its lineage says: `darwin verify`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.descent.lineage import LINEAGE_FILE, LINEAGE_FORMAT
from orchestrator.places import open_parent, resolve
from workers.checkpoints import ArchitectureMap, Checkpoint, WeightFile
from workers.checkpoints.health import count_not_finite
from workers.errors import BadInputError
from workers.merging.expert_order import ExpertOrders, ExpertPlaces, parse_orders
from workers.storage import ObjectNotFoundError
from workers.storage.documents import parse_json
from workers.storage.locations import find_store

READ_BYTES = 16 << 20

TENSOR_KEYS: dict[str, type] = {"name": str, "elements": int, "not_finite": int, "changed": dict}
PARENT_KEYS: dict[str, type] = {"name": str, "fingerprint": str}


def verify_child(location: str, parents: list[str]) -> dict[str, Any]:
    """Read the whole child again; what was checked, and the `problems` that were found.

    Shards against their SHA-256, index and headers against one another, tensors against those that were
    merged, values for NaN and infinity, and that the child is none of its parents. With the locations of
    `parents` (any of those in the lineage) also element by element against these. Raises
    `BadInputError` for what is no child of Darwin, or no checkpoint at all.
    """
    try:
        child = open_parent(location)
    except BadInputError as error:
        if not _was_written(location):
            raise
        return {
            "status": "damaged", "child": location, "files": 0, "tensors": 0, "bytes": 0, "changed": {},
            "problems": [str(error)],
        }  # fmt: skip
    lineage = _read_lineage(child)
    problems = [*_check_files(child, lineage), *_check_tensors(child, lineage)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = list(threads.map(lambda file: _read_file(child, file), child.weight_files))
    not_finite: dict[str, int] = {}
    for file, (digest, broken) in zip(child.weight_files, found, strict=True):
        not_finite |= broken
        if digest != lineage["files"].get(file.name):
            problems.append(
                f"{file.name}: has SHA-256 {digest}, but the lineage says {lineage['files'].get(file.name)}"
            )
    expected = {t["name"]: t["not_finite"] for t in lineage["tensors"] if t["not_finite"]}
    for name, count in not_finite.items():
        if count > expected.get(name, 0):
            problems.append(f"tensor {name!r}: {count} elements are NaN or infinite")
    changed = {
        parent["name"]: _changed_by_lineage(lineage, parent["name"])
        for parent in lineage["parents"]
        if "gives" not in parent  # it has a few tensors only: that the others differ says nothing
    }
    changed |= _changed_by_reading(child, lineage, parents, problems)
    for name, count in changed.items():
        # Layers that are stacked anew are another model, also where each is a parent's own.
        if count == 0 and not lineage["recipe"].get("layers"):
            problems.append(f"the child has the values of {name}: nothing was merged into it")
    return {
        "status": "damaged" if problems else "sound",
        "child": child.location,
        "files": len(child.weight_files),
        "tensors": len(child.tensors),
        "bytes": child.total_bytes,
        "changed": changed,
        "problems": problems,
    }


def _was_written(location: str) -> bool:
    """Whether a child of Darwin was once whole here, though it can no longer be opened."""
    try:
        find_store(resolve(location)).info(LINEAGE_FILE)
    except ObjectNotFoundError:
        return False
    return True


def _read_lineage(child: Checkpoint) -> dict[str, Any]:
    try:
        lineage = parse_json(child.store.read(LINEAGE_FILE))
    except ObjectNotFoundError:
        raise BadInputError(
            f"{child.location}: has no {LINEAGE_FILE}: it was not written by Darwin"
        ) from None
    except ValueError as error:
        raise BadInputError(f"{child.location}/{LINEAGE_FILE}: not valid JSON ({error})") from error
    if not isinstance(lineage, dict) or lineage.get("format") != LINEAGE_FORMAT:
        raise BadInputError(
            f"{child.location}/{LINEAGE_FILE}: not of format {LINEAGE_FORMAT}, the one this version reads"
        )
    checks: dict[str, Callable[[Any], bool]] = {
        "files": lambda files: isinstance(files, dict),
        "tensors": lambda tensors: _are_tables(tensors, TENSOR_KEYS),
        "parents": lambda parents: bool(parents) and _are_tables(parents, PARENT_KEYS),
        "recipe": lambda recipe: isinstance(recipe, dict),
    }
    for key, good in checks.items():
        if not good(lineage.get(key)):
            raise BadInputError(
                f"{child.location}/{LINEAGE_FILE}: {key} is missing or not as Darwin writes it; "
                "restore the file, or merge again"
            )
    return lineage


def _expert_orders(child: Checkpoint, lineage: dict[str, Any]) -> ExpertOrders:
    names = [parent["name"] for parent in lineage["parents"]]
    try:
        return parse_orders(lineage["recipe"].get("experts") or {}, names, has_base=True)
    except BadInputError as error:
        raise BadInputError(f"{child.location}/{LINEAGE_FILE}: recipe: {error}") from error


def _are_tables(values: Any, keys: dict[str, type]) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, dict)
        and all(isinstance(value.get(key), kind) for key, kind in keys.items())
        for value in values
    )


def _check_files(child: Checkpoint, lineage: dict[str, Any]) -> Iterator[str]:
    present = {file.name for file in child.weight_files}
    for name in sorted(set(lineage["files"]) ^ present):
        where = (
            "the index does not name it" if name not in present else "the lineage does not name it"
        )
        yield f"{name}: {where}"


def _check_tensors(child: Checkpoint, lineage: dict[str, Any]) -> Iterator[str]:
    present = {tensor.name: tensor.elements for tensor in ArchitectureMap.of(child).tensors}
    merged = {tensor["name"]: tensor["elements"] for tensor in lineage["tensors"]}
    for name in sorted(merged.keys() - present.keys()):
        yield f"tensor {name!r}: was merged, but is not there"
    for name in sorted(present.keys() - merged.keys()):
        yield f"tensor {name!r}: is there, but was not merged"
    for name in sorted(present.keys() & merged.keys()):
        if present[name] != merged[name]:
            yield f"tensor {name!r}: has {present[name]} elements, {merged[name]} were merged"


def _read_file(child: Checkpoint, file: WeightFile) -> tuple[str, dict[str, int]]:
    """SHA-256 of a file, and the logical tensors in it with the number of values that are no numbers."""
    logical: dict[str, list[Any]] = {}
    for tensor in ArchitectureMap.of(child).tensors:
        logical.setdefault(tensor.stored, []).append(tensor)
    digest = hashlib.sha256(file.header.raw)
    buffer = memoryview(bytearray(READ_BYTES))
    broken: dict[str, int] = {}
    for entry in file.header.entries:
        size = (entry.stop - entry.start) // max(entry.elements, 1)
        for tensor in sorted(logical[entry.name], key=lambda tensor: tensor.offset):
            first = entry.start + tensor.offset * size
            stop = first + tensor.elements * size
            for start in range(first, stop, READ_BYTES):
                piece = buffer[: min(READ_BYTES, stop - start)]
                child.store.read_into(file.name, start, piece)
                digest.update(piece)
                count = count_not_finite(piece, entry.dtype)
                if count:
                    broken[tensor.name] = broken.get(tensor.name, 0) + count
    return digest.hexdigest(), broken


def _changed_by_lineage(lineage: dict[str, Any], parent: str) -> int:
    """Elements that differ from the parent, or that it has not, as they were counted in the merge."""
    return sum(tensor["changed"].get(parent, tensor["elements"]) for tensor in lineage["tensors"])


def _changed_by_reading(
    child: Checkpoint, lineage: dict[str, Any], locations: list[str], problems: list[str]
) -> dict[str, int]:
    if not locations:
        return {}
    from workers.merging.child import count_changes
    from workers.merging.expert_rows import read_matched
    from workers.merging.sources import Source

    names = {parent["fingerprint"]: parent["name"] for parent in lineage["parents"]}
    orders = _expert_orders(child, lineage)
    # Older versions did not compare a head with a mother whose own is tied to her embedding.
    compared = {tensor["name"]: tensor["changed"] for tensor in lineage["tensors"]}
    own, own_map = Source(child), ArchitectureMap.of(child)
    changed = {}
    for location in locations:
        parent = open_parent(location)
        if parent.fingerprint not in names:
            raise BadInputError(f"{parent.location}: is none of the parents that the lineage names")
        name = names[parent.fingerprint]
        other, other_map = Source(parent), ArchitectureMap.of(parent)
        if name == lineage["parents"][0]["name"] and not lineage["recipe"].get("layers"):
            problems += [
                f"tensor {tensor.name!r} of the father {name} is not in the child"
                for tensor in other_map.tensors
                if tensor.name not in own_map.by_name
            ]
        places = ExpertPlaces(
            {name: orders[name]} if name in orders else {}, own_map, {name: other_map}
        )
        total = 0
        for tensor in own_map.tensors:
            wanted = places.counterpart(name, tensor)
            match = other_map.by_name.get(wanted)
            if name in compared.get(tensor.name, ()):
                match = other_map.find(wanted)
            if match is None or match.shape != tensor.shape:
                total += tensor.elements
                continue
            for first in range(0, tensor.elements, READ_BYTES):
                count = min(READ_BYTES, tensor.elements - first)
                theirs = read_matched(other, match, places.rows(name, tensor), first, count)
                total += count_changes(own.read(tensor, first, count), theirs)
        changed[name] = total
    return changed
