"""Compaction: no record is lost or changed, whoever is killed, stale, or reading meanwhile."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ledger import compaction
from orchestrator.ledger.ledger import LeaseLostError, Ledger, Record, read_records
from orchestrator.ledger.records import list_records, loose_key
from tests.duckdb_rows import rows_of
from workers.errors import BadInputError
from workers.storage import ObjectInfo, StorageError, Store
from workers.storage.folder import FolderStore

LENGTH = 8


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "SEGMENT_RECORDS", LENGTH)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "campaign")


def owned(store: Store, epoch: int) -> Ledger:
    ledger = Ledger(store)
    ledger.open_epoch(epoch)
    return ledger


def write(ledger: Ledger, count: int) -> None:
    for number in range(count):
        ledger.append("scored", n=number, text="a\nb\u2028ä", items={"t": [{"id": "1"}]})


def compacted(store: Store, epoch: int, count: int) -> Ledger:
    """A ledger to which so many records were added, and which is compacted."""
    ledger = owned(store, epoch)
    write(ledger, count)
    ledger.close()
    return ledger


def loose(store: Store) -> list[int]:
    return sorted(list_records(store).loose)


def segments(store: Store) -> list[tuple[int, int]]:
    return [(part.first, part.last) for part in list_records(store).segments]


def stored(store: Store) -> list[Record]:
    return list(read_records(store))


def keys(store: Store) -> list[str]:
    return [info.key for info in store.list_objects()]


class CountingStore(FolderStore):
    """Knows which loose records were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.was_read: list[str] = []

    def read(self, key: str) -> bytes:
        self.was_read.append(key)
        return super().read(key)


def test_only_what_another_driver_wrote_is_read_again(tmp_path: Path) -> None:
    counting = CountingStore(tmp_path / "campaign")
    compacted(counting, 1, LENGTH + 3)
    assert segments(counting) == [(0, 7)]
    assert counting.was_read == []
    compacted(counting, 2, LENGTH)
    assert segments(counting) == [(0, 7), (8, 15)]
    assert sorted(counting.was_read) == [loose_key(n) for n in range(8, 12)], "12 is the new epoch"
    assert [record.get("n") for record in stored(counting)] == [None, *range(11), None, *range(8)]


def test_records_are_the_same_before_and_after(store: FolderStore) -> None:
    ledger = compacted(store, 1, 3 * LENGTH + 2)
    assert segments(store) == [(0, 7), (8, 15), (16, 23)]
    assert loose(store) == [0, 24, 25, 26], "epochs stay, and what fills no segment yet"
    assert stored(store) == ledger.records
    assert [record.get("n") for record in stored(store)] == [None, *range(26)]
    for start in (0, 5, 8, 23, 24, 26, 27):
        assert list(read_records(store, start)) == ledger.records[start:]
    assert Ledger(store).last("scored") == ledger.records[-1]


def test_a_segment_has_the_bytes_of_its_records(store: FolderStore) -> None:
    ledger = owned(store, 1)
    write(ledger, LENGTH - 2)
    bytes_of = [store.read(loose_key(number)) for number in range(LENGTH - 1)]
    write(ledger, 1)
    ledger.close()
    lines = store.read("ledger/segments/00000000-00000007.jsonl").splitlines()
    assert lines[:-1] == bytes_of
    counts = rows_of(
        f"select kind, count(*) from '{store.uri}/ledger/segments/*.jsonl' group by kind order by kind"
    )
    assert counts == [("epoch", 1), ("scored", LENGTH - 1)]


def test_large_records_make_short_segments(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "SEGMENT_BYTES", 1000)
    ledger = owned(store, 1)
    for _ in range(4):
        ledger.append("scored", text="x" * 600)
    ledger.close()
    assert segments(store) == [(0, 2), (3, 4)]
    assert stored(store) == ledger.records


# -- fencing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "since"), [(0, 0), (3, 2 * LENGTH), (LENGTH - 2, 4), (LENGTH + 3, 0)]
)
def test_a_stale_driver_cannot_append_whatever_is_compacted(
    store: FolderStore, written: int, since: int
) -> None:
    stale = owned(store, 1)
    write(stale, written)
    new = owned(store, 2)
    write(new, since)
    new.close()
    compacted(store, 3, LENGTH)
    before = stored(store)
    for _ in range(2):
        with pytest.raises(LeaseLostError):
            stale.append("scored", n="stale")
    stale.close()
    assert stored(store) == before


@pytest.mark.parametrize("seen", [1, 3, LENGTH + 1])
def test_a_driver_that_comes_to_write_after_all_it_knew_was_compacted_is_refused(
    store: FolderStore, seen: int
) -> None:
    """It read the ledger while an older driver was writing, and wakes much later. The number that it takes
    for the next one is free in the store by then."""
    first = owned(store, 1)
    write(first, seen - 1)
    late = Ledger(store)
    write(first, 2 * LENGTH - seen + 1)
    first.close()
    compacted(store, 3, LENGTH)
    before, objects = stored(store), keys(store)
    assert loose_key(seen) not in objects, "or the store itself refuses it"
    with pytest.raises(LeaseLostError, match="later driver"):
        late.open_epoch(2)
    assert stored(store) == before
    assert keys(store) == objects


def test_of_a_late_driver_that_is_killed_at_the_worst_moment_nothing_is_read(
    store: FolderStore,
) -> None:
    """It has created a record under a number that was compacted, and not looked yet."""
    compacted(store, 1, 2 * LENGTH)
    before = stored(store)
    store.create(loose_key(5), json.dumps({"kind": "epoch", "epoch": 1}).encode())
    assert stored(store) == before
    ledger = owned(store, 3)
    ledger.close()
    assert loose_key(5) not in keys(store), "the next owner cleans up"
    assert stored(store) == ledger.records == [*before, ledger.records[-1]]


def test_a_driver_that_cleans_up_when_it_was_replaced_leaves_what_fences_it_off(
    store: FolderStore,
) -> None:
    """It has taken the ledger over, and comes to remove leftovers when a later driver has compacted."""
    stale = compacted(store, 1, LENGTH + 1)
    compacted(store, 2, 2 * LENGTH)
    before = stored(store)
    stale._compaction.clean()
    with pytest.raises(LeaseLostError):
        stale.append("scored", n="stale")
    assert stored(store) == before


class AnswersLost(FolderStore):
    """The answer to one request is lost; its retry comes when somebody else has been at work."""

    meanwhile: Any = None

    def create(self, key: str, data: bytes | bytearray | memoryview) -> str:
        version = super().create(key, data)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is None:
            return version
        meanwhile()
        return super().create(key, data)


def test_a_record_that_was_compacted_before_its_retry_counts_once(tmp_path: Path) -> None:
    store = AnswersLost(tmp_path)
    stale = owned(store, 1)
    write(stale, 2)
    store.meanwhile = lambda: compacted(FolderStore(tmp_path), 2, 2 * LENGTH)
    stale.append("scored", n="once")
    with pytest.raises(LeaseLostError):
        stale.append("scored", n="never")
    stale.close()
    assert [r["n"] for r in stored(store) if r.get("n") in ("once", "never")] == ["once"]


def test_an_epoch_that_was_compacted_before_its_driver_looked_stays(tmp_path: Path) -> None:
    store = AnswersLost(tmp_path)
    stale = owned(store, 1)
    write(stale, 2)
    slow = Ledger(store)
    store.meanwhile = lambda: compacted(FolderStore(tmp_path), 3, 2 * LENGTH)
    with pytest.raises(LeaseLostError, match="later driver"):
        slow.open_epoch(2)
    before = stored(store)
    assert [record["epoch"] for record in before[:5]] == [1, 1, 1, 2, 3]
    with pytest.raises(LeaseLostError):
        stale.append("scored", n="stale")
    assert stored(store) == before


# -- killed ------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class KilledAt(FolderStore):
    """A driver that dies at its so many-th request that changes something."""

    left = 0

    def _count(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1

    def create(self, key: str, data: bytes | bytearray | memoryview) -> str:
        self._count()
        return super().create(key, data)

    def delete_many(self, keys: Any) -> None:
        for key in keys:
            self._count()
            self.delete(key)


def test_killed_anywhere_while_compacting_nothing_is_lost(
    store: FolderStore, tmp_path: Path
) -> None:
    ledger = owned(store, 1)
    ledger._compaction._is_owner = False  # so that nothing is compacted yet
    write(ledger, 2 * LENGTH + 3)
    wanted = stored(store)
    step, done = 0, False
    while not done:
        folder = FolderStore(shutil.copytree(store.uri, tmp_path / str(step)))
        killed = KilledAt(folder.uri)
        killed.left = step
        driver = Ledger(killed)
        driver._compaction._is_owner = True
        try:
            driver._compaction.clean()
            while driver._compaction._compact_next():
                pass
            done = True
        except Killed:
            assert stored(folder) == wanted, step
        next_one = owned(folder, 2)
        next_one.close()
        assert stored(folder) == next_one.records == [*wanted, next_one.records[-1]], step
        assert segments(folder) == [(0, 7), (8, 15)], step
        assert loose(folder) == [0, *range(16, 21)], step
        step += 1
    assert step > 2 * LENGTH, "each segment, each removal"


def test_a_store_that_fails_delays_compaction_and_nothing_else(tmp_path: Path) -> None:
    class Failing(FolderStore):
        fails = True

        def create(self, key: str, data: bytes | bytearray | memoryview) -> str:
            if self.fails and "segments" in key:
                raise StorageError("503")
            return super().create(key, data)

    store = Failing(tmp_path)
    ledger = owned(store, 1)
    write(ledger, 2 * LENGTH)
    ledger.close()
    assert segments(store) == []
    store.fails = False
    ledger = owned(store, 2)
    ledger.close()
    assert segments(store) == [(0, 7), (8, 15)]
    assert stored(store) == ledger.records


# -- read meanwhile ----------------------------------------------------------------------------


def test_who_reads_while_the_owner_compacts_sees_every_record(store: FolderStore) -> None:
    records = 12 * LENGTH
    ledger = owned(store, 1)
    seen: list[int] = []
    errors: list[BaseException] = []
    is_over = threading.Event()

    def read() -> None:
        try:
            while not is_over.is_set():
                numbers = [record.get("n", -1) for record in read_records(store)]
                assert numbers == list(range(-1, len(numbers) - 1))
                seen.append(len(numbers))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(records):
        ledger.append("scored", n=number)
    ledger.close()
    is_over.set()
    thread.join()
    assert not errors, errors[0]
    assert seen == sorted(seen), "what was seen once is seen again"
    assert segments(store)


class ListsLate(FolderStore):
    """Something happens between what is listed and what is read."""

    meanwhile: Any = None

    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = list(super().list_objects(prefix))
        if prefix.endswith("segments/") and self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return iter(found)


def test_records_that_are_compacted_after_they_were_listed_are_read(tmp_path: Path) -> None:
    store = ListsLate(tmp_path)
    ledger = owned(store, 1)
    ledger._compaction._is_owner = False
    write(ledger, 2 * LENGTH)
    other = FolderStore(tmp_path)

    def compact_and_put_a_stray() -> None:
        compacted(other, 2, 1)
        other.create(loose_key(3), json.dumps({"kind": "stray", "epoch": 1}).encode())

    store.meanwhile = compact_and_put_a_stray
    assert list(read_records(store))[: 2 * LENGTH + 1] == ledger.records


# -- damage ------------------------------------------------------------------------------------


def damaged(store: FolderStore, change: Any) -> str:
    compacted(store, 1, 2 * LENGTH)
    key = "ledger/segments/00000008-00000015.jsonl"
    store.write(key, change(store.read(key)))
    return f"{store.uri}/{key}"


@pytest.mark.parametrize(
    "line", [b"", b'{"kind": "x", "ep', b"[]", b'{"kind": "x"}', b'{"kind": "x", "epoch": 1},', b"[" * 99_999]
)  # fmt: skip
def test_a_damaged_line_is_named(store: FolderStore, line: bytes) -> None:
    def change(data: bytes) -> bytes:
        lines = data.splitlines()
        return b"\n".join([*lines[:2], line, *lines[3:]]) + b"\n"

    place = damaged(store, change)
    with pytest.raises(BadInputError) as caught:
        Ledger(store)
    assert str(caught.value).startswith(f"{place}, line 3: not a ledger record")


def test_a_segment_that_was_cut_is_named(store: FolderStore) -> None:
    place = damaged(store, lambda data: data[: len(data) // 2])
    with pytest.raises(BadInputError, match="was cut or changed") as caught:
        Ledger(store)
    assert str(caught.value).startswith(place)


def test_a_missing_segment_is_a_gap(store: FolderStore) -> None:
    compacted(store, 1, 3 * LENGTH)
    store.delete("ledger/segments/00000008-00000015.jsonl")
    with pytest.raises(BadInputError, match=r"gap before ledger/segments/00000016-00000023\.jsonl"):
        Ledger(store)


@pytest.mark.parametrize("name", ["notes.txt", "00000009-00000002.jsonl", "1-2.jsonl"])
def test_a_foreign_file_among_the_segments_is_named(store: FolderStore, name: str) -> None:
    compacted(store, 1, LENGTH)
    store.write(f"ledger/segments/{name}", b"hello")
    with pytest.raises(BadInputError, match=name):
        Ledger(store)
