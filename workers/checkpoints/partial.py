"""Partial checkpoints: some tensors of a model in a place of their own; recipes take them by
`passthrough`."""

from __future__ import annotations

import json
from typing import Any

from workers.checkpoints.checkpoint import SINGLE_FILE
from workers.checkpoints.layout import weight_file
from workers.checkpoints.safetensors_format import TensorEntry
from workers.storage import PreconditionFailedError, StorageError, Store


def partial_weights(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file of tensors by their stored names: dtype, shape, bytes."""
    entries = [TensorEntry(name, kind, shape, 0, 0) for name, (kind, shape, _) in tensors.items()]
    laid_out = weight_file(SINGLE_FILE, entries)
    parts = [tensors[entry.name][2] for entry in laid_out.header.entries]
    data = laid_out.header.raw + b"".join(parts)
    assert len(data) == laid_out.size
    return data


def write_partial(
    target: Store, config: dict[str, Any], weights: bytes, files: dict[str, bytes]
) -> None:
    """Make the file `weights` a checkpoint with this configuration, which comes last; `files` go beside it.

    A file that is there already must be the same, else `StorageError`.
    """
    text = f"{json.dumps(config, indent=2, ensure_ascii=False)}\n"
    contents = {SINGLE_FILE: weights, **files, "config.json": text.encode()}
    for name, content in contents.items():
        try:
            target.create(name, content)
        except PreconditionFailedError:
            if target.read(name) != content:
                raise StorageError(
                    f"{target.uri}/{name}: another file of that name is in the way; remove the folder or "
                    "choose another"
                ) from None
