"""The ledger: a campaign's append-only record, and the truth about it.

Each record is created as an object of its own, `ledger/00000042.json`, under a number that nobody has used:
the store lets exactly one writer have it. Records carry the epoch of the lease they were written under. A new
owner's first record closes the sequence for every older one: a driver that lost its lease finds its
next number taken by a later epoch, and stops. Everything else (optimizer state, best candidate, what is
left to do) is derived by reading the records in order.

Older records are moved into segments (`orchestrator.ledger.compaction`), and their numbers become free in the
store. The order holds all the same:

* *A driver that has written.* Its next number comes right behind a record of its own. If another driver has
  written since, the record with that number is the other one's first: any driver's records are consecutive,
  so had it begun earlier, the record before would be its own. A driver's first record is of kind `epoch`, and
  those are never removed. So the number is taken, for ever.
* *A driver that has yet to write its first.* Its next number comes behind what it has read, and that may have
  been taken, compacted and removed meanwhile. So when it got the number it looks for a segment that holds it:
  that was there before the number became free again. If there is one with another record, the driver removes
  what it wrote, which no reader has taken for a record, reads on, and tries behind that.
* *A try whose answer was lost* may be repeated after its record was compacted, and then succeeds once more.
  The record is in the ledger; its second copy is in a segment's shadow, and goes with the next leftovers.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.ledger.compaction import Compaction
from orchestrator.ledger.records import (
    FOLDER,
    Record,
    list_segments,
    loose_key,
    read_records,
    read_with_sizes,
)
from workers.errors import BadInputError
from workers.storage import ObjectNotFoundError, PreconditionFailedError, Store

__all__ = ["FOLDER", "LeaseLostError", "Ledger", "Record", "read_records"]

BULKY = {"scored": "items", "race": "items", "asked": "candidates"}
"""Kind -> the key of what makes most of a ledger."""


class LeaseLostError(RuntimeError):
    """Another driver owns the campaign now; this one must not write anything more."""


class Ledger:
    """The records of one campaign, read once and then appended to by one owner.

    A `follower` is given each record, read or appended, and takes of it what it needs; then the ledger keeps
    nothing `BULKY`, which is too much for one driver's memory. `check` is given each record that is read,
    before, and raises `ValueError` for one that cannot be (`orchestrator.ledger.record_shapes`).
    """

    def __init__(
        self,
        store: Store,
        follower: Callable[[Record], None] | None = None,
        check: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.store = store
        self.records: list[Record] = []
        self.epoch: int | None = None
        self._follower = follower
        self._check = check
        self._last: dict[str, Record] = {}
        """Kind -> its newest record."""
        self._begun: int | None = None
        """Where the newest `campaign` record is."""
        self._compaction = Compaction(store)
        self.read_on()

    @property
    def newest_epoch(self) -> int:
        """That of the last driver that has written; 0 if none has."""
        return max((record["epoch"] for record in self.records), default=0)

    def open_epoch(self, epoch: int) -> None:
        """Begin to write as the owner of `epoch`; records of older epochs that came late are kept.

        Raises `LeaseLostError` if a later driver has written already.
        """
        record = {"kind": "epoch", "epoch": epoch, "time": _now()}
        while True:
            if self.newest_epoch > epoch:
                raise LeaseLostError(
                    f"{self.store.uri}: a later driver (epoch {self.newest_epoch}, this one's is {epoch}) "
                    "has taken over this campaign; this one stops"
                )
            number, data = len(self.records), _dump(record)
            if self._create(number, data):
                if not any(part.first <= number <= part.last for part in list_segments(self.store)):
                    self._take_in(record, len(data), data)
                    break
                self.read_on()
                # If the segment has this very record, a later driver has taken it in: it must stay.
                if self.records[number] != record:
                    self.store.delete(loose_key(number))
            # A former owner was still writing. What it wrote before our first record counts.
            self.read_on()
        self.epoch = epoch
        self._compaction.begin()

    def append(self, kind: str, **content: Any) -> Record:
        """Record what happened, durably, before anything is done about it.

        Raises `LeaseLostError` if another driver has written since.
        """
        assert self.epoch is not None, "open_epoch comes first"
        record = {"kind": kind, "epoch": self.epoch, "time": _now(), **content}
        data = _dump(record)
        if not self._create(len(self.records), data):
            raise LeaseLostError(f"{self.store.uri}: another driver has taken over; this one stops")
        self._take_in(record, len(data), data)
        return record

    def close(self) -> None:
        """Write no more."""
        self._compaction.close()

    def has_next(self) -> bool:
        """Whether another driver has written the next record, as far as one request can tell: it may have
        been compacted since."""
        try:
            self.store.info(loose_key(len(self.records)))
        except ObjectNotFoundError:
            return False
        return True

    def of_kind(self, kind: str) -> Iterator[Record]:
        """The records of one kind, in order."""
        return (record for record in self.records if record["kind"] == kind)

    def last(self, kind: str) -> Record | None:
        """The newest record of a kind."""
        return self._last.get(kind)

    def since_begun(self) -> list[Record]:
        """The records from the newest `campaign` record on: those of the present budget."""
        return [] if self._begun is None else self.records[self._begun :]

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

    def read_on(self) -> None:
        """Take in what was written behind the last record that is known."""
        with _no_garbage_collection():
            for record, size in read_with_sizes(self.store, len(self.records)):
                try:
                    self._check(record)
                except ValueError as error:
                    place = f"{self.store.uri}/{loose_key(len(self.records))}"
                    raise BadInputError(f"{place}: not a ledger record ({error})") from error
                self._take_in(record, size)

    def _take_in(self, record: Record, size: int | None, own: bytes | None = None) -> None:
        number = len(self.records)
        self._compaction.take_in(number, size, record["kind"] == "epoch", own)
        if self._follower is not None:
            self._follower(record)
            bulky = BULKY.get(record["kind"])
            if bulky is not None:
                record = {key: value for key, value in record.items() if key != bulky}
        self.records.append(record)
        self._last[record["kind"]] = record
        if record["kind"] == "campaign":
            self._begun = number

    def _create(self, number: int, data: bytes) -> bool:
        """Whether the number is ours with these bytes."""
        key = loose_key(number)
        try:
            self.store.create(key, data)
        except PreconditionFailedError:
            # A retried request may meet its own first try: then the record is ours all the same.
            try:
                return self.store.read(key) == data
            except ObjectNotFoundError:
                return False  # another driver has compacted it
        return True


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Reading makes millions of objects that stay, and no cycles: collections would look through them again
    and again, for a sixth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _now() -> float:
    return round(time.time(), 3)


def _dump(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
