"""The ledger: a campaign's append-only record, and the truth about it.

Each record is one object, `ledger/00000042.json`, created under a number that nobody has used: the
store lets exactly one writer have it. Records carry the epoch of the lease they were written under. A new
owner's first record closes the sequence for every older one: a driver that lost its lease finds its
next number taken by a later epoch, and stops. Everything else (optimizer state, best candidate, what is
left to do) is derived by reading the records in order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from workers.errors import BadInputError
from workers.storage import PreconditionFailedError, Store

FOLDER = "ledger"
READ_THREADS = 16

Record = dict[str, Any]
"""`kind` says what happened; `epoch` who wrote it, and `time` when, in seconds since 1970 by that driver's
clock, for people alone: nothing is decided by it. The rest depends on the kind."""


class LeaseLostError(RuntimeError):
    """Another driver owns the campaign now; this one must not write anything more."""


class Ledger:
    """The records of one campaign, read once and then appended to by one owner."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.records: list[Record] = list(read_records(store))
        self.epoch: int | None = None

    def open_epoch(self, epoch: int) -> None:
        """Begin to write as the owner of `epoch`; records of older epochs that came late are kept.

        Raises `LeaseLostError` if a later driver has written already.
        """
        record = {"kind": "epoch", "epoch": epoch, "time": _now()}
        while True:
            newest = max((known["epoch"] for known in self.records), default=0)
            if newest > epoch:
                raise LeaseLostError(
                    f"{self.store.uri}: a later driver (epoch {newest}, this one's is {epoch}) has "
                    "taken over this campaign; this one stops"
                )
            if self._try_append(record):
                break
            # A former owner was still writing. What it wrote before our first record counts.
            self.records.extend(read_records(self.store, start=len(self.records)))
        self.epoch = epoch

    def append(self, kind: str, **content: Any) -> Record:
        """Record what happened, durably, before anything is done about it.

        Raises `LeaseLostError` if another driver has written since.
        """
        assert self.epoch is not None, "open_epoch comes first"
        record = {"kind": kind, "epoch": self.epoch, "time": _now(), **content}
        if not self._try_append(record):
            raise LeaseLostError(f"{self.store.uri}: another driver has taken over; this one stops")
        return record

    def of_kind(self, kind: str) -> Iterator[Record]:
        """The records of one kind, in order."""
        return (record for record in self.records if record["kind"] == kind)

    def last(self, kind: str) -> Record | None:
        """The newest record of a kind."""
        return next((r for r in reversed(self.records) if r["kind"] == kind), None)

    def since_begun(self) -> list[Record]:
        """The records from the newest `campaign` record on: those of the present budget."""
        begun = max(
            (i for i, r in enumerate(self.records) if r["kind"] == "campaign"), default=None
        )
        return [] if begun is None else self.records[begun:]

    def result(self) -> dict[str, Any] | None:
        """What the campaign came to, if it has come to its end with its present budget.

        Its `status` is "done", or "rejected" if the child did not pass the gates.
        """
        ends = [r for r in self.since_begun() if r["kind"] in ("finished", "rejected")]
        if not ends:
            return None
        found = {
            key: value for key, value in ends[-1].items() if key not in ("kind", "epoch", "time")
        }
        status = "done" if ends[-1]["kind"] == "finished" else "rejected"
        # Names are recorded, not places: a campaign's folder may be moved.
        places = {key: f"{self.store.uri}/{found[key]}" for key in ("child", "report")}
        return {"status": status, "campaign": self.store.uri, **found, **places}

    def _try_append(self, record: Record) -> bool:
        key = _key(len(self.records))
        data = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        try:
            self.store.create(key, data)
        except PreconditionFailedError:
            # A retried request may meet its own first try: then the record is ours all the same.
            if self.store.read(key) != data:
                return False
        self.records.append(record)
        return True


def read_records(store: Store, start: int = 0) -> Iterator[Record]:
    """The records from number `start` on, in order. Raises `BadInputError` for a damaged ledger."""
    keys = [info.key for info in store.list_objects(f"{FOLDER}/")][start:]
    expected = [_key(start + position) for position in range(len(keys))]
    if keys != expected:
        wrong = next(key for key, wanted in zip(keys, expected, strict=True) if key != wanted)
        raise BadInputError(
            f"{store.uri}: the ledger has a gap before {wrong}: records were removed, so the campaign "
            "cannot be resumed"
        )
    with ThreadPoolExecutor(READ_THREADS) as threads:
        for key, data in zip(keys, threads.map(store.read, keys), strict=True):
            try:
                yield _parse(data)
            except (ValueError, RecursionError) as error:
                raise BadInputError(f"{store.uri}/{key}: not a ledger record ({error})") from error


def _parse(data: bytes) -> Record:
    record = json.loads(data)
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("no kind in it")
    if type(record.get("epoch")) is not int:
        raise ValueError("no epoch in it")
    return record


def _now() -> float:
    return round(time.time(), 3)


def _key(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"
