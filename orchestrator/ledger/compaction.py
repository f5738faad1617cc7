"""Compaction: loose records are gathered into segments, so that a long ledger is read in few requests.

No history is lost: a segment has the very bytes of its records. Where it begins and ends follows from the
records alone, so whoever compacts makes the same segments, in any order of events:

* a segment is created, never changed, and only with records that are in the ledger for certain;
* a loose record is removed only when a segment that holds it is there, and never if its kind is `epoch`, or
  not known: why those must stay is told in `orchestrator.ledger.ledger`.

So a driver may be killed between any two steps, and one that was replaced may compact as well: it can only do
what the owner would do. What was left undone is done by the next owner.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from orchestrator.ledger.records import list_records, list_segments, loose_key, segment_key
from workers.errors import BadInputError
from workers.storage import PreconditionFailedError, Store

SEGMENT_RECORDS = 512
SEGMENT_BYTES = 4 * 2**20
"""A segment ends with the record that reaches one of the two."""
MOST_KEPT_SEGMENTS = 2
"""Where more wait to be made, the store is slow or away, and records are read again later."""
READ_THREADS = 8
CLOSE_SECONDS = 30.0

Chunk = tuple[int, int]
"""The first and the last record of a segment to be."""


class Compaction:
    """Gathers the records of one ledger in a thread of its own: a driver does not wait for it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._epochs: set[int] = set()
        """The numbers of all records of that kind."""
        self._known = 0
        """So many records were taken in."""
        self._first = 0
        """The first record behind the last segment, made or to be made."""
        self._bytes = 0
        self._own: dict[int, bytes] = {}
        """Records that this driver has written and that no segment has yet, as far as there is room: what is
        known need not be read."""
        self._chunks: deque[Chunk] = deque()
        self._has_segments = False
        self._is_owner = False
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def take_in(
        self, number: int, size: int | None, is_epoch: bool, own: bytes | None = None
    ) -> None:
        """Learn of the ledger's next record; `size` in bytes, None if it is in a segment already. `own` are
        its bytes if this driver has written it."""
        if own is not None and len(self._chunks) < MOST_KEPT_SEGMENTS:
            self._own[number] = own
        if is_epoch:
            self._epochs.add(number)
        self._known = number + 1
        if size is None:
            # Of whatever was thought of until now, another driver's segments are the truth.
            self._chunks.clear()
            self._has_segments = True
            self._first, self._bytes = number + 1, 0
            return
        self._bytes += size
        if number + 1 - self._first >= SEGMENT_RECORDS or self._bytes >= SEGMENT_BYTES:
            self._chunks.append((self._first, number))
            self._first, self._bytes = number + 1, 0
            self._go_on()

    def begin(self) -> None:
        """Begin to compact: this driver owns the ledger now."""
        self._is_owner = True
        if self._has_segments or self._chunks:
            self._go_on(clean=True)

    def close(self) -> None:
        """Finish what is being done, and wait for it no longer than `CLOSE_SECONDS`; what is then left is for
        the next owner."""
        thread = self._thread
        if thread is not None:
            thread.join(CLOSE_SECONDS)
        self._is_closing = True

    def _go_on(self, clean: bool = False) -> None:
        with self._lock:
            if self._is_owner and self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, args=(clean,), name="compaction", daemon=True
                )
                self._thread.start()

    def _work(self, clean: bool) -> None:
        try:
            if clean:
                self.clean()
            while self._compact_next():
                pass
        except (OSError, BadInputError):
            # Nothing is lost, and nobody waits for it: it is tried again with the next segment.
            self._thread = None

    def _compact_next(self) -> bool:
        """Make the next segment that is due; False, and this thread's end, if there is none."""
        with self._lock:
            if not self._chunks or self._is_closing:
                self._thread = None
                return False
            first, last = self._chunks[0]
        make_segment(self.store, first, last, self._own)
        self._remove(range(first, last + 1))
        for number in range(first, last + 1):
            self._own.pop(number, None)
        self._chunks.popleft()
        return True

    def clean(self) -> None:
        """Remove what an owner that was killed has left: loose records that are in a segment."""
        # A later driver may have written more, and what of that is an epoch nobody here can tell.
        known = self._known
        self._remove([n for n in list_records(self.store).leftovers() if n < known])

    def _remove(self, numbers: range | list[int]) -> None:
        self.store.delete_many(loose_key(n) for n in numbers if n not in self._epochs)


def make_segment(store: Store, first: int, last: int, known: Mapping[int, bytes]) -> None:
    """Create the segment of these records, unless it is there. They are loose, and in the ledger; those that
    are not `known` are read."""
    key = segment_key(first, last)
    if any(part.key == key for part in list_segments(store)):
        return

    def content(number: int) -> bytes:
        return known[number] if number in known else store.read(loose_key(number))

    with ThreadPoolExecutor(READ_THREADS) as threads:
        records = list(threads.map(content, range(first, last + 1)))
    try:
        store.create(key, b"".join(record + b"\n" for record in records))
    except PreconditionFailedError:
        return  # of the same bytes, by another driver or by this one's own first try
