"""The parts of one object: what each receipt says, and whether the parts make the whole."""

from __future__ import annotations

import json
from typing import Any

from workers.storage.store import MOST_PARTS, StorageError


def receipt_of(start: int, size: int, **proof: str) -> str:
    """The receipt of a part of `size` bytes from byte `start` on; `proof` is the store's own."""
    return json.dumps({"start": start, "size": size, **proof}, sort_keys=True)


def check_part(what: str, number: int, start: int, size: int, whole_size: int) -> None:
    """Raises `StorageError` unless an object of `whole_size` bytes can have this part.

    `what` names the object.
    """
    if not 1 <= number <= MOST_PARTS:
        raise StorageError(
            f"{what}: part {number} is not among the parts 1 to {MOST_PARTS} that an object may "
            "have: write larger parts"
        )
    if start < 0 or start + size > whole_size:
        raise StorageError(
            f"{what}: part {number}, bytes {start} to {start + size}, is not inside the "
            f"{whole_size} bytes that the object was begun with"
        )


def check_whole(what: str, receipts: dict[int, str], whole_size: int) -> dict[int, dict[str, Any]]:
    """The receipts as data, in the order of their parts.

    Raises `StorageError` unless the parts follow one another from the first byte to the last.
    """
    stop = 0
    parsed: dict[int, dict[str, Any]] = {}
    for number in sorted(receipts):
        receipt = _parse(what, number, receipts[number])
        if receipt["start"] != stop:
            raise StorageError(
                f"{what}: part {number} begins at byte {receipt['start']}, the one before it ends "
                f"at byte {stop}: a part is missing, or its receipt is"
            )
        stop += receipt["size"]
        parsed[number] = receipt
    if stop != whole_size:
        raise StorageError(
            f"{what}: its parts end at byte {stop} of {whole_size}: "
            "the last ones are missing, or their receipts are"
        )
    return parsed


def _parse(what: str, number: int, text: str) -> dict[str, Any]:
    try:
        receipt = json.loads(text)
        if isinstance(receipt["start"], int) and isinstance(receipt["size"], int):
            return dict(receipt)
    except (ValueError, TypeError, KeyError):
        pass
    raise StorageError(f"{what}: {text!r} is no receipt of part {number}: write the part again")
