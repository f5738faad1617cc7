"""The health check of written weights: read back what the store really holds."""

from __future__ import annotations

import hashlib

from workers.checkpoints.checkpoint import Checkpoint
from workers.storage import StorageError, Store

READ_BYTES = 32 << 20


def verify_weights(father: Checkpoint, target: Store, digests: dict[str, str]) -> None:
    """Compare the weight files in `target` with the father's layout and the tensors' SHA-256 digests.

    Raises `StorageError` naming file and tensor if anything differs from what was merged.
    """
    buffer = memoryview(bytearray(READ_BYTES))
    for file in father.weight_files:
        where = f"{target.uri}/{file.name}"
        if target.info(file.name).size != file.size:
            raise StorageError(f"{where}: has another size than the father's file")
        header = memoryview(bytearray(len(file.header.raw)))
        target.read_into(file.name, 0, header)
        if header != file.header.raw:
            raise StorageError(f"{where}: has another header than the father's file")
        for entry in file.header.entries:
            digest = hashlib.sha256()
            for start in range(entry.start, entry.stop, READ_BYTES):
                part = buffer[: min(READ_BYTES, entry.stop - start)]
                target.read_into(file.name, start, part)
                digest.update(part)
            if digest.hexdigest() != digests[entry.name]:
                raise StorageError(f"{where}: tensor {entry.name!r} is not what was written")
