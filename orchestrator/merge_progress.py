"""What lies beside a child while it is written, as it is read again: a manifest, and what is done."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from workers.errors import BadInputError
from workers.storage import Store
from workers.storage.documents import (
    anything,
    each,
    keys,
    number,
    read_document,
    table,
    text,
    whole,
)

PROGRESS = "merge-in-progress"
MANIFEST = f"{PROGRESS}/manifest.json"

READS_AT_ONCE = 8

_MANIFEST = keys({"recipe": text, "cut": text, "uploads": table(text)})
_PART = keys(
    {
        "file": text,
        "number": whole,
        "upload": text,
        "receipt": text,
        "checksum": whole,
        "changed": table(table(whole)),
        "not_finite": table(whole),
        "not_finite_in_father": table(whole),
    },
    {"moved": table(table(each(whole))), "reach": table(table(each(number)))},
)
_DONE = keys({}, {"files": table(text), "parts": each(_PART)})

WRITTEN = keys({"recipe_id": text, "files": table(text), "tensors": each(table(anything))})
"""What is read of the lineage of a child that is there already."""


def read_manifest(target: Store) -> dict[str, Any]:
    """The recipe's id, the cut into parts, and file -> upload. Raises `ObjectNotFoundError`."""
    return read_document(target, MANIFEST, _MANIFEST)


def read_progress(
    target: Store, parts: Collection[tuple[str, int]]
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """File -> SHA-256 of files that have appeared, and the reports of parts; `parts` are those there can be.

    Raises `BadInputError` for a record that is damaged, or of another merge.
    """
    names = {file for file, _ in parts}
    files: dict[str, str] = {}
    reports: list[dict[str, Any]] = []
    written = [info.key for info in target.list_objects(f"{PROGRESS}/") if info.key != MANIFEST]
    with ThreadPoolExecutor(READS_AT_ONCE) as threads:  # a child of 800 GB has thousands
        records = list(threads.map(lambda key: read_document(target, key, _DONE), written))
    for key, record in zip(written, records, strict=True):
        done = record.get("files", {}), record.get("parts", [])
        known = {(part["file"], part["number"]) for part in done[1]}
        if not (done[0].keys() <= names and known <= set(parts)):
            raise BadInputError(
                f"{target.uri}/{key}: names files or parts that this child does not have; remove the "
                "folder or choose another"
            )
        files |= done[0]
        reports += done[1]
    return files, reports
