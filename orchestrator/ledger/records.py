"""How records lie in a store, and how they are read: loose ones, and segments of many.

A loose record is one object, `ledger/00000042.json`. A segment, `ledger/segments/00000000-00000511.jsonl`, is
the same bytes of many records, one a line; `orchestrator.ledger.compaction` makes it, and removes most of the
loose records that it holds. Where both are there, the segment is the truth.

A reader never waits for an owner who compacts. It lists loose records first, then segments, and an owner
makes a segment before it removes anything: what the first listing misses the second one has. What is gone, or
another one, when it is read is found by listing again.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from workers.errors import BadInputError
from workers.storage import ObjectNotFoundError, StorageError, Store
from workers.storage.documents import parse_json

FOLDER = "ledger"
SEGMENTS = f"{FOLDER}/segments"
READ_THREADS = 16
"""So many objects are read at once, and no more are held."""
LISTINGS = 3
"""So often records are listed before one that is missing is called missing."""

Record = dict[str, Any]
"""`kind` says what happened; `epoch` who wrote it, and `time` when, in seconds since 1970 by that driver's
clock, for people alone: nothing is decided by it. The rest depends on the kind."""

_LOOSE_KEY = re.compile(rf"{FOLDER}/(\d{{8,}})\.json")
_SEGMENT_KEY = re.compile(rf"{SEGMENTS}/(\d{{8,}})-(\d{{8,}})\.jsonl")


@dataclass(frozen=True, slots=True)
class Part:
    """An object that holds the records from number `first` to `last`."""

    key: str
    version: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Listing:
    """The objects of a ledger, as they were at about one time."""

    loose: dict[int, Part]
    segments: list[Part]
    """In the order of their numbers."""

    def parts(self, start: int) -> tuple[list[Part], str | None]:
        """What holds the records from number `start` on without a gap; and the key behind the gap, if there
        is one."""
        found: list[Part] = []
        number, place = start, 0
        while True:
            while place < len(self.segments) and self.segments[place].last < number:
                place += 1
            if place < len(self.segments) and self.segments[place].first <= number:
                found.append(self.segments[place])
            elif number in self.loose:
                found.append(self.loose[number])
            else:
                break
            number = found[-1].last + 1
        beyond = [part for part in (*self.segments, *self.loose.values()) if part.last >= number]
        return found, min(beyond, key=lambda part: part.first).key if beyond else None

    def leftovers(self) -> list[int]:
        """The numbers of the loose records that a segment holds, too."""
        held = {n for part in self.segments for n in range(part.first, part.last + 1)}
        return sorted(held & self.loose.keys())


def loose_key(number: int) -> str:
    """Where a record lies by itself."""
    return f"{FOLDER}/{number:08d}.json"


def segment_key(first: int, last: int) -> str:
    """Where a segment lies."""
    return f"{SEGMENTS}/{first:08d}-{last:08d}.jsonl"


def list_records(store: Store) -> Listing:
    """What there is. Raises `BadInputError` for an object that does not belong there."""
    loose: dict[int, Part] = {}
    for info in store.list_objects(f"{FOLDER}/"):
        if info.key.startswith(f"{SEGMENTS}/"):
            continue
        named = _LOOSE_KEY.fullmatch(info.key)
        if named is None:
            raise _foreign(store, info.key)
        loose[int(named[1])] = Part(info.key, info.version, int(named[1]), int(named[1]))
    return Listing(loose, list_segments(store))


def list_segments(store: Store) -> list[Part]:
    """The segments, in the order of their numbers."""
    segments = []
    for info in store.list_objects(f"{SEGMENTS}/"):
        named = _SEGMENT_KEY.fullmatch(info.key)
        if named is None or int(named[1]) > int(named[2]):
            raise _foreign(store, info.key)
        segments.append(Part(info.key, info.version, int(named[1]), int(named[2])))
    return sorted(segments, key=lambda part: (part.first, part.last))


def read_records(store: Store, start: int = 0) -> Iterator[Record]:
    """The records from number `start` on, in order. Raises `BadInputError` for a damaged ledger."""
    return (record for record, _ in read_with_sizes(store, start))


def read_with_sizes(store: Store, start: int = 0) -> Iterator[tuple[Record, int | None]]:
    """The same, each with its size in bytes if it is loose, None if it is in a segment."""
    number, tries = start, 0
    while True:
        parts, behind_gap = list_records(store).parts(number)
        begun, lost = number, None
        for part, data in _contents(store, parts):
            if data is None:  # in a segment by now
                lost = part.key
                break
            is_loose = part.first == part.last and not part.key.startswith(SEGMENTS)
            if is_loose:
                yield _loose(store, part, data), len(data)
            else:
                for record in _segment(store, part, data, number):
                    yield record, None
            number = part.last + 1
        if lost is None and behind_gap is None:
            return
        tries = tries + 1 if number == begun else 0
        if tries == LISTINGS:
            if lost is not None:
                raise StorageError(f"{store.uri}/{lost}: is listed, and cannot be read")
            raise BadInputError(
                f"{store.uri}: the ledger has a gap before {behind_gap}: records were removed, so the "
                "campaign cannot be resumed"
            )


def _contents(store: Store, parts: Sequence[Part]) -> Iterator[tuple[Part, bytes | None]]:
    """The bytes of each part, in order; None if it is gone, or another one than was listed."""
    if len(parts) == 1:
        yield parts[0], _content(store, parts[0])
        return
    rest = iter(parts)
    with ThreadPoolExecutor(READ_THREADS) as threads:
        reading: deque[tuple[Part, Future[bytes | None]]] = deque()

        def read_on(count: int) -> None:
            for part in islice(rest, count):
                reading.append((part, threads.submit(_content, store, part)))

        read_on(READ_THREADS)
        while reading:
            part, content = reading.popleft()
            yield part, content.result()
            read_on(1)


def _content(store: Store, part: Part) -> bytes | None:
    try:
        data, version = store.read_with_version(part.key)
    except ObjectNotFoundError:
        return None
    return data if version == part.version else None


def _loose(store: Store, part: Part, data: bytes) -> Record:
    try:
        return parse_record(data)
    except ValueError as error:
        raise BadInputError(f"{store.uri}/{part.key}: not a ledger record ({error})") from error


def _segment(store: Store, part: Part, data: bytes, start: int) -> Iterator[Record]:
    """The records from number `start` on. One by one, so that each is taken in while it is in the processor's
    cache, and gone before the next is made."""
    lines = data.removesuffix(b"\n").split(b"\n")
    if len(lines) != part.last - part.first + 1:
        raise BadInputError(
            f"{store.uri}/{part.key}: has {len(lines)} lines, not {part.last - part.first + 1}: "
            "it was cut or changed, so the campaign cannot be resumed"
        )
    for place in range(start - part.first, len(lines)):
        try:
            record = parse_record(lines[place])
        except ValueError as error:
            where = f"{store.uri}/{part.key}, line {place + 1}"
            raise BadInputError(f"{where}: not a ledger record ({error})") from error
        yield record


def parse_record(data: bytes) -> Record:
    """The record. Raises `ValueError` if it is none."""
    return _checked(parse_json(data))


def _checked(record: Any) -> Record:
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("no kind in it")
    if type(record.get("epoch")) is not int:
        raise ValueError("no epoch in it")
    return record


def _foreign(store: Store, key: str) -> BadInputError:
    return BadInputError(
        f"{store.uri}/{key}: the ledger has a gap before {key}, or this is no part of it; remove what does "
        "not belong there"
    )
