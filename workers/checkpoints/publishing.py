"""Make written weight files a checkpoint, in an order that no reader can catch half done."""

from __future__ import annotations

import json

from workers.checkpoints.checkpoint import INDEX_FILE, Checkpoint
from workers.checkpoints.layout import Layout
from workers.storage import PreconditionFailedError, StorageError, Store


def publish_companions(
    father: Checkpoint,
    layout: Layout,
    target: Store,
    files: dict[str, bytes],
    removed: frozenset[str] = frozenset(),
) -> None:
    """Make finished weights a checkpoint: the father's small files, `files` over them, config last.

    Those of his files that are `removed` are left out.
    Index and configuration are the father's own, or those of a layout that is not his.
    A copy of a father's file that is there already must be the same, else `StorageError`; `files`
    (card, lineage) take the place of older ones, when a campaign went on and chose the same child.
    """
    assert "config.json" not in files, "config.json is the father's, and comes last"
    kept = [name for name in father.companions if name not in files and name not in removed]
    copies = {name: father.store.read(name) for name in kept}
    index = layout.index
    if index is not None:
        copies[INDEX_FILE] = father.store.read(INDEX_FILE) if layout.is_fathers else index
    if not layout.is_fathers:
        text = json.dumps(layout.config, indent=2, ensure_ascii=False)
        copies["config.json"] = f"{text}\n".encode()
    last = [name for name in (INDEX_FILE, "config.json") if name in copies]
    for name, data in files.items():
        _create_or_update(target, name, data)
    for name in [name for name in copies if name not in last] + last:
        try:
            target.create(name, copies[name])
        except PreconditionFailedError:
            if target.read(name) != copies[name]:
                raise StorageError(
                    f"{target.uri}/{name}: another file of that name is in the way; remove the "
                    "folder or choose another"
                ) from None


def _create_or_update(target: Store, name: str, data: bytes) -> None:
    try:
        target.create(name, data)
    except PreconditionFailedError:
        present, version = target.read_with_version(name)
        if present != data:
            target.replace(name, data, version)
