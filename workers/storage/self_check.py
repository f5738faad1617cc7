"""Proof, on the live store, that it honours the conditional writes on which everything rests."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from workers.errors import BadInputError
from workers.storage.store import PreconditionFailedError, StorageError, Store


def check_store(store: Store) -> None:
    """Try each conditional write on a throw-away object.

    Some S3 servers take the condition and ignore it; two drivers of one campaign would then
    overwrite each other's records unseen. Raises `BadInputError` naming the store and what it
    ignores, and `StorageError` if the store does not work at all.
    """
    key = f"darwin-store-check-{secrets.token_hex(8)}"
    first = store.create(key, b"first")
    try:
        _expect_refusal(store, "create-only (If-None-Match: *)", lambda: store.create(key, b"no"))
        _expect_refusal(store, "create-only for uploads", lambda: _upload(store, key, b"no"))
        _expect_content(store, key, b"first", "create-only")
        _replace(store, key, b"second", first)
        swap = "compare-and-swap (If-Match)"
        _expect_refusal(store, swap, lambda: store.replace(key, b"no", first))
        _expect_content(store, key, b"second", swap)
        store.delete(key)
        swap_of_missing = f"{swap} of an object that is gone"
        _expect_refusal(store, swap_of_missing, lambda: store.replace(key, b"no", first))
    finally:
        store.delete(key)


def _upload(store: Store, key: str, data: bytes) -> None:
    upload_id = store.begin_parts(key, len(data))
    try:
        store.finish_parts(key, upload_id, {1: store.write_part(key, upload_id, 1, 0, data)})
    except StorageError:
        store.abandon_parts(key, upload_id)
        raise


def _replace(store: Store, key: str, data: bytes, version: str) -> None:
    try:
        store.replace(key, data, version)
    except PreconditionFailedError as error:
        raise BadInputError(
            f"{store.uri} refuses to replace an object that is at the version named (If-Match): "
            f"{_what_to_do()}"
        ) from error


def _expect_refusal(store: Store, precondition: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except PreconditionFailedError:
        return
    raise BadInputError(f"{store.uri} ignores {precondition}: {_what_to_do()}")


def _expect_content(store: Store, key: str, expected: bytes, precondition: str) -> None:
    if store.read(key) != expected:
        raise BadInputError(
            f"{store.uri} reports {precondition} as refused but does the write: {_what_to_do()}"
        )


def _what_to_do() -> str:
    return (
        "no campaign is safe on it; use a server that honours conditional writes, "
        "for example AWS S3 or SeaweedFS >= 4.48, or a local folder"
    )
