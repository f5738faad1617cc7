"""The ledger: one order of records, one writer at a time, nothing lost and nothing twice."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from orchestrator.ledger.ledger import LeaseLostError, Ledger, Record, read_records
from workers.errors import BadInputError
from workers.storage import PreconditionFailedError
from workers.storage.folder import FolderStore

ROUNDS = 25


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "campaign")


def owned(store: FolderStore, epoch: int) -> Ledger:
    ledger = Ledger(store)
    ledger.open_epoch(epoch)
    return ledger


def stored(store: FolderStore) -> list[Record]:
    return list(read_records(store))


def put(store: FolderStore, number: int, content: bytes) -> Path:
    """A record's file, written past the ledger."""
    path = store.local_path(f"ledger/{number:08d}.json")
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def put_records(store: FolderStore, count: int) -> None:
    for number in range(count):
        put(store, number, json.dumps({"kind": "x", "epoch": 1, "n": number}).encode())


def epochs(records: list[Record]) -> list[int]:
    return [record["epoch"] for record in records]


# -- one order -------------------------------------------------------------------------------


def test_records_come_back_in_the_order_in_which_they_were_appended(store: FolderStore) -> None:
    assert stored(store) == []
    ledger = owned(store, 1)
    before = time.time()
    written = [ledger.append("scored", n=n, text="ä☃", items={"t": [0.1, None]}) for n in range(12)]
    first = stored(store)[0]
    assert stored(store) == ledger.records == [first, *written]
    assert first == {"kind": "epoch", "epoch": 1, "time": first["time"]}
    assert first["time"] - 0.001 <= before <= 0.001 + written[3]["time"] <= time.time() + 0.001
    assert written[3] == {
        "kind": "scored",
        "epoch": 1,
        "time": written[3]["time"],
        "n": 3,
        "text": "ä☃",
        "items": {"t": [0.1, None]},
    }
    assert Ledger(store).records == ledger.records


def test_a_new_owner_appends_behind_the_old_records(store: FolderStore) -> None:
    owned(store, 1).append("asked", n=1)
    second = owned(store, 2)
    second.append("asked", n=2)
    assert [(r["kind"], r["epoch"]) for r in stored(store)] == [
        ("epoch", 1), ("asked", 1), ("epoch", 2), ("asked", 2),
    ]  # fmt: skip
    assert [record["n"] for record in second.of_kind("asked")] == [1, 2]
    newest = second.last("asked")
    assert newest is not None
    assert newest["n"] == 2
    assert second.last("child") is None


def test_reading_starts_where_it_is_told(store: FolderStore) -> None:
    put_records(store, 5)
    assert [record["n"] for record in read_records(store, start=3)] == [3, 4]
    assert list(read_records(store, start=5)) == []


def test_thousands_of_records_are_read_in_order(store: FolderStore) -> None:
    put_records(store, 2000)
    assert [record["n"] for record in Ledger(store).records] == list(range(2000))


def test_what_json_cannot_say_is_refused_and_not_written(store: FolderStore) -> None:
    ledger = owned(store, 1)
    with pytest.raises(ValueError, match="JSON"):
        ledger.append("scored", value=float("nan"))
    ledger.append("scored", value=0.0)
    assert [record["kind"] for record in stored(store)] == ["epoch", "scored"]


# -- one writer ------------------------------------------------------------------------------


def test_a_stale_driver_cannot_append(store: FolderStore) -> None:
    stale = owned(store, 1)
    owned(store, 2)
    before = stored(store)
    for _ in range(2):
        with pytest.raises(LeaseLostError, match="another driver"):
            stale.append("scored", n=1)
    assert stored(store) == before
    assert epochs(stale.records) == [1]


def test_what_a_stale_driver_wrote_before_the_new_epoch_counts(store: FolderStore) -> None:
    stale = owned(store, 1)
    new = Ledger(store)
    stale.append("scored", n=1)
    stale.append("scored", n=2)
    new.open_epoch(2)
    assert epochs(new.records) == [1, 1, 1, 2]
    assert new.records == stored(store)
    with pytest.raises(LeaseLostError):
        stale.append("scored", n=3)
    assert new.append("scored", n=4)["epoch"] == 2


@pytest.mark.parametrize("read_first", [True, False], ids=["read before", "read after"])
def test_a_driver_that_comes_to_write_after_its_successor_is_refused(
    store: FolderStore, read_first: bool
) -> None:
    """It took the lease, was stopped for long, and wakes when another one owns the campaign."""
    early = Ledger(store)
    successor = owned(store, 2)
    late = early if read_first else Ledger(store)
    with pytest.raises(LeaseLostError, match="later driver"):
        late.open_epoch(1)
    assert epochs(stored(store)) == [2]
    successor.append("scored", n=1)


def test_of_two_writers_of_one_number_exactly_one_wins(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        store = FolderStore(tmp_path / str(number))
        old = owned(store, 1)
        new = Ledger(store)
        start = threading.Barrier(2)
        refused: list[LeaseLostError] = []

        def append(
            old: Ledger = old, start: threading.Barrier = start, refused: list = refused
        ) -> None:
            start.wait()
            try:
                old.append("scored", n=1)
            except LeaseLostError as error:
                refused.append(error)

        thread = threading.Thread(target=append)
        thread.start()
        start.wait()
        new.open_epoch(2)
        thread.join()
        assert stored(store) == new.records
        assert epochs(new.records) == ([1, 2] if refused else [1, 1, 2])


def test_many_drivers_at_once_leave_one_sequence(store: FolderStore) -> None:
    drivers = 6
    start = threading.Barrier(drivers)
    kept: list[Record] = []

    def drive(epoch: int) -> None:
        ledger = Ledger(store)
        start.wait()
        try:
            ledger.open_epoch(epoch)
            for number in range(8):
                kept.append(ledger.append("scored", n=number))
        except LeaseLostError:
            return

    threads = [threading.Thread(target=drive, args=(epoch,)) for epoch in range(1, drivers + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = stored(store)
    assert epochs(records) == sorted(epochs(records)), "nothing older behind anything newer"
    scored = [record for record in records if record["kind"] == "scored"]
    assert sorted(map(json.dumps, scored)) == sorted(map(json.dumps, kept)), (
        "refused or recorded once"
    )
    newest = records[-1]
    assert (newest["epoch"], newest.get("n")) == (drivers, 7), "the newest got to its end"


# -- lost answers ----------------------------------------------------------------------------


class AnswersLost(FolderStore):
    """Each request goes through, its answer is lost, and the client's own retry is refused."""

    def create(self, key: str, data: bytes | bytearray | memoryview) -> str:
        super().create(key, data)
        return super().create(key, data)


def test_a_record_whose_answer_was_lost_counts_once(tmp_path: Path) -> None:
    store = AnswersLost(tmp_path)
    with pytest.raises(PreconditionFailedError):
        store.create("probe", b"")
    ledger = owned(store, 1)
    for number in range(3):
        ledger.append("scored", n=number)
    assert stored(store) == ledger.records
    assert [record["n"] for record in ledger.of_kind("scored")] == [0, 1, 2]


def test_a_lost_answer_is_not_taken_for_another_drivers_record(tmp_path: Path) -> None:
    store = AnswersLost(tmp_path)
    stale = owned(store, 1)
    owned(store, 2)
    with pytest.raises(LeaseLostError):
        stale.append("epoch")
    assert epochs(stored(store)) == [1, 2]


# -- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("missing", "named"), [(0, 1), (2, 3), (3, 4)])
def test_a_gap_is_named(store: FolderStore, missing: int, named: int) -> None:
    put_records(store, 5)
    store.delete(f"ledger/{missing:08d}.json")
    with pytest.raises(BadInputError, match=rf"gap before ledger/{named:08d}\.json"):
        Ledger(store)


def test_a_foreign_file_among_the_records_is_named(store: FolderStore) -> None:
    put_records(store, 2)
    store.write("ledger/notes.txt", b"hello")
    with pytest.raises(BadInputError, match=r"notes\.txt"):
        Ledger(store)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"kind": "x", "ep',
        b"\xff\xfe",
        b"[]",
        b"5",
        b'"text"',
        b"{}",
        b'{"kind": "x"}',
        b'{"epoch": 1}',
        b'{"kind": 1, "epoch": 1}',
        b'{"kind": "x", "epoch": "1"}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_record_is_named(store: FolderStore, content: bytes) -> None:
    put_records(store, 4)
    path = put(store, 2, content)
    with pytest.raises(BadInputError) as caught:
        Ledger(store)
    assert str(caught.value).startswith(f"{path}: not a ledger record")
