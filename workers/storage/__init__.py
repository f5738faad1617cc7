"""Bytes: local folders and S3 behind one small interface (`Store`).

`open_store(location)` takes what users write anywhere in a configuration: a plain path, `file://`,
`s3://bucket/prefix`, or `shipped:NAME` for what comes with the package.
A new kind of store is one file with a `Store` in it, a line in `locations.py`, and a test class that
inherits `workers.storage.conformance.StoreConformance`.
"""

from workers.storage.locations import open_store
from workers.storage.self_check import check_store
from workers.storage.store import (
    LEAST_PART_BYTES,
    MOST_PARTS,
    Bytes,
    ObjectInfo,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    Store,
)

__all__ = [
    "LEAST_PART_BYTES",
    "MOST_PARTS",
    "Bytes",
    "ObjectInfo",
    "ObjectNotFoundError",
    "PreconditionFailedError",
    "StorageError",
    "Store",
    "check_store",
    "open_store",
]
