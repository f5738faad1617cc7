"""The model MRI: the scan of parents and base, kept in a store by what they contain.

The driver reads headers and puts together what workers found; no weight passes through it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, Protocol

from orchestrator.pool.calls import Calls
from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.diagnostics.static import scanned_tensors
from workers.merging.plan import BASE
from workers.storage import ObjectNotFoundError, Store
from workers.storage.documents import read_document

FORMAT = 1
"""Of the JSON, and of how its numbers are made: with another one, nothing that was kept is used again."""

FOLDER = "scans"
DIGEST = "sha256"
"""Of all else in the JSON."""
LEAST_GROUP_BYTES = 8 << 20
GROUP_TENSORS = 256
"""Small tensors are given to a worker together: so many, or of so many bytes."""


class Probe(Protocol):
    """What makes a scan's `probe` part, which needs the parents to run."""

    @property
    def identity(self) -> dict[str, Any]:
        """What its result depends on beside the parents."""

    def run(self, parents: dict[str, Checkpoint], calls: Calls) -> dict[str, Any]:
        """The `probe` part of the scan of these parents."""


def scan_parents(
    parents: dict[str, Checkpoint],
    base: Checkpoint | None,
    calls: Calls,
    store: Store | None,
    probe: Probe | None = None,
    notify: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """The scan of these parents, the father first: from the store if it is there, else made and kept.

    `notify` is told of bytes of parents and base scanned. The workers behind `calls` must have opened the
    same checkpoints. The JSON is described in docs/diagnostics.md. Raises `BadInputError` for weights
    that cannot be read; one that is not finite is no error here, but stands in the counts.
    """
    kept = find_scan(parents, base, store, probe)
    if kept is not None:
        return kept
    if probe is not None:
        scan = scan_parents(parents, base, calls, store, None, notify)
        scan = scan | {"probe": probe.run(parents, calls)}
    else:
        scan = _scan_static(parents, base, calls, notify)
    if store is not None:
        kept = scan | {DIGEST: _digest(scan)}
        store.write(scan_key(parents, base, probe), json.dumps(kept).encode())
    return scan


def find_scan(
    parents: dict[str, Checkpoint],
    base: Checkpoint | None,
    store: Store | None,
    probe: Probe | None = None,
) -> dict[str, Any] | None:
    """The scan that was kept of these parents, whatever they were called; None if there is none."""
    if store is None:
        return None
    try:
        scan = read_document(store, scan_key(parents, base, probe))
    except (ObjectNotFoundError, ValueError):
        return None  # a damaged one is made again
    if scan.pop(DIGEST, None) != _digest(scan):
        return None  # as is one that was changed
    return _renamed(scan, list(parents))


def _digest(scan: dict[str, Any]) -> str:
    text = json.dumps(scan, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def scan_key(
    parents: dict[str, Checkpoint], base: Checkpoint | None, probe: Probe | None = None
) -> str:
    """Where the scan is kept: a hash of what it is of. The parents' order matters, their names do not."""
    identity = {
        "format": FORMAT,
        "parents": [parent.fingerprint for parent in parents.values()],
        "base": base.fingerprint if base else None,
        "probe": probe.identity if probe else None,
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return f"{FOLDER}/{hashlib.sha256(text.encode()).hexdigest()}.json"


def scan_bytes(parents: dict[str, Checkpoint], base: Checkpoint | None) -> int:
    """What `notify` will have been told of in the end."""
    maps = _maps(parents, base)
    tensors, _ = scanned_tensors(maps)
    return sum(_bytes(tensor, maps) for tensor in tensors)


def _scan_static(
    parents: dict[str, Checkpoint],
    base: Checkpoint | None,
    calls: Calls,
    notify: Callable[[int], None],
) -> dict[str, Any]:
    maps = _maps(parents, base)
    tensors, left_out = scanned_tensors(maps)
    sizes = {tensor.name: _bytes(tensor, maps) for tensor in tensors}
    groups = _groups(sizes, max(calls.group_bytes(sum(sizes.values())), LEAST_GROUP_BYTES))
    found: dict[str, dict[str, Any]] = {}
    for number, rows in calls.each("scan_tensors", [(group,) for group in groups]):
        found |= {row["tensor"]: row for row in rows}
        notify(sum(sizes[name] for name in groups[number]))
    static = [found[tensor.name] for tensor in tensors]
    return _header(parents, base) | {"static": static, "left_out": left_out, "probe": {}}


def _header(parents: dict[str, Checkpoint], base: Checkpoint | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "parents": [{"name": n, "fingerprint": p.fingerprint} for n, p in parents.items()],
        "base": {"name": BASE, "fingerprint": base.fingerprint} if base else None,
    }


def _renamed(scan: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The scan of the same parents by other names, in their order."""
    new = dict(zip((parent["name"] for parent in scan["parents"]), names, strict=True))
    new[BASE] = BASE
    if all(old == name for old, name in new.items()):
        return scan

    def rename(of: dict[str, Any]) -> dict[str, Any]:
        return {"|".join(new[name] for name in key.split("|")): found for key, found in of.items()}

    parents = [parent | {"name": name} for parent, name in zip(scan["parents"], names, strict=True)]
    static = [
        row | {"of": rename(row["of"]), "between": rename(row["between"])} for row in scan["static"]
    ]
    probe = scan["probe"]
    if probe:
        probe = probe | {
            "parents": {
                new[parent]: {
                    called: [_row_renamed(row, rename) for row in rows]
                    for called, rows in of.items()
                }
                for parent, of in probe["parents"].items()
            }
        }
    left_out = rename(scan["left_out"])
    return scan | {"parents": parents, "static": static, "left_out": left_out, "probe": probe}


def _row_renamed(
    row: dict[str, Any], rename: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    routing = row.get("routing", {})
    if "overlap" not in routing:
        return row
    return row | {"routing": routing | {"overlap": rename(routing["overlap"])}}


def _maps(parents: dict[str, Checkpoint], base: Checkpoint | None) -> dict[str, ArchitectureMap]:
    checkpoints = parents | ({BASE: base} if base else {})
    return {name: ArchitectureMap.of(checkpoint) for name, checkpoint in checkpoints.items()}


def _bytes(tensor: LogicalTensor, maps: dict[str, ArchitectureMap]) -> int:
    found = (own for m in maps.values() if (own := m.find(tensor.name)) is not None)
    return sum(own.elements * BITS_PER_ELEMENT[own.dtype] // 8 for own in found)


def _groups(sizes: dict[str, int], group_bytes: int) -> list[list[str]]:
    """The tensors in groups of about so many bytes, the largest first: none is begun at the very end."""
    groups: list[list[str]] = []
    size = 0
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        is_full = not groups or len(groups[-1]) == GROUP_TENSORS
        if is_full or size + sizes[name] > group_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += sizes[name]
    return groups
