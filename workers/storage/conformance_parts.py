"""The promises of `Store` about objects that are written in parts, as tests."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from workers.errors import BadInputError
from workers.storage.conformance_tools import THREADS, in_threads, keys_of, raises, succeeds
from workers.storage.store import (
    LEAST_PART_BYTES,
    MOST_PARTS,
    Bytes,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    Store,
)

PART = LEAST_PART_BYTES

_BEGIN_AND_WRITE_UNTIL_KILLED = """
import sys
from workers.storage import open_store
from workers.storage.conformance_parts import content_of, write_number
store, size = open_store(sys.argv[1]), int(sys.argv[2])
upload_id = store.begin_parts("run/object", size)
print(upload_id, flush=True)
print(write_number(store, "run/object", upload_id, content_of(size), 1), flush=True)
while True:
    write_number(store, "run/object", upload_id, content_of(size), 2)
    print("again", flush=True)
"""
_WRITE_SOME = """
import json, sys
from workers.storage import open_store
from workers.storage.conformance_parts import content_of, write_number
store, size, upload_id = open_store(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
print(json.dumps({
    number: write_number(store, "run/object", upload_id, content_of(size), int(number))
    for number in sys.argv[4].split(",")
}))
"""


def content_of(size: int) -> bytes:
    """Bytes that are the same in every process, and differ between parts."""
    block = random.Random(7).randbytes(2**20 + 1)
    return (block * (size // len(block) + 1))[:size]


def numbers_of(content: Bytes) -> range:
    return range(1, max(1, -(-len(content) // PART)) + 1)


def write_number(store: Store, key: str, upload_id: str, content: Bytes, number: int) -> str:
    """Write one part of `content`, which is cut after every `PART` bytes; the receipt."""
    start = (number - 1) * PART
    return store.write_part(key, upload_id, number, start, content[start : start + PART])


def write_all(store: Store, key: str, upload_id: str, content: Bytes) -> dict[int, str]:
    return {
        number: write_number(store, key, upload_id, content, number)
        for number in numbers_of(content)
    }


def put_in_parts(store: Store, key: str, content: Bytes) -> None:
    upload_id = store.begin_parts(key, len(content))
    store.finish_parts(key, upload_id, write_all(store, key, upload_id, content))


class PartsConformance:
    """Part of `StoreConformance`."""

    def test_parts_are_invisible_until_the_object_is_finished(self, store: Store) -> None:
        upload_id = store.begin_parts("folder/object", 10)
        assert store.parts_exist("folder/object", upload_id)
        receipt = store.write_part("folder/object", upload_id, 1, 0, b"some bytes")
        assert keys_of(store) == []
        with raises(ObjectNotFoundError):
            store.read("folder/object")
        store.finish_parts("folder/object", upload_id, {1: receipt})
        assert store.read("folder/object") == b"some bytes"
        assert keys_of(store) == ["folder/object"]
        assert not store.parts_exist("folder/object", upload_id)
        assert store.discard_unfinished("") == 0

    def test_threads_write_parts_in_any_order_and_readers_see_the_whole(self, store: Store) -> None:
        content = content_of((THREADS - 1) * PART + 12345)
        upload_id = store.begin_parts("object", len(content))
        order = random.Random(3).sample(numbers_of(content), THREADS)
        finished = threading.Event()

        def watch() -> bool:
            while not finished.wait(0.02):
                with suppress(ObjectNotFoundError):
                    return store.read("object") == content
            return store.read("object") == content

        with ThreadPoolExecutor(1) as threads:
            watching = threads.submit(watch)
            receipts = in_threads(
                lambda number: write_number(store, "object", upload_id, content, order[number])
            )
            store.finish_parts("object", upload_id, dict(zip(order, receipts, strict=True)))
            finished.set()
            assert watching.result()
        buffer = bytearray(2 * PART)
        store.read_into("object", PART // 2, memoryview(buffer))
        assert buffer == content[PART // 2 : PART // 2 + 2 * PART]

    def test_processes_go_on_with_the_parts_of_one_that_was_killed(self, store: Store) -> None:
        content = content_of(4 * PART + 1)
        arguments = [sys.executable, "-c", _BEGIN_AND_WRITE_UNTIL_KILLED]
        arguments += [store.uri, str(len(content))]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as killed:
            assert killed.stdout is not None
            upload_id = killed.stdout.readline().strip()
            receipts = {1: killed.stdout.readline().strip()}
            assert killed.stdout.readline() == "again\n"
            killed.kill()  # In the middle of writing part 2, again.
        assert killed.returncode == -signal.SIGKILL
        assert keys_of(store) == []
        assert store.parts_exist("run/object", upload_id)
        with raises(StorageError, naming="are missing"):
            store.finish_parts("run/object", upload_id, receipts)
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", _WRITE_SOME, store.uri, str(len(content)), upload_id, some],
                stdout=subprocess.PIPE,
                text=True,
            )
            for some in ("5,2", "4,3")
        ]
        for writer in writers:
            answer = json.loads(writer.communicate(timeout=60)[0])
            receipts |= {int(number): receipt for number, receipt in answer.items()}
        store.finish_parts("run/object", upload_id, receipts)
        assert store.read("run/object") == content
        assert store.discard_unfinished("") == 0

    def test_every_kind_of_bytes_can_be_a_part(self, store: Store) -> None:
        content = content_of(2 * PART + 8)
        buffer = bytearray(content[:PART])
        upload_id = store.begin_parts("object", len(content))
        receipts = {1: store.write_part("object", upload_id, 1, 0, buffer)}
        buffer[:] = content[PART : 2 * PART]  # No part keeps a hold of its buffer.
        wide = memoryview(buffer).cast("I")
        receipts[2] = store.write_part("object", upload_id, 2, PART, wide)
        buffer[:] = bytes(PART)
        receipts[3] = store.write_part("object", upload_id, 3, 2 * PART, content[-8:])
        store.finish_parts("object", upload_id, receipts)
        assert store.read("object") == content

    def test_a_part_may_be_written_again(self, store: Store) -> None:
        content = content_of(PART + 100)
        upload_id = store.begin_parts("object", len(content))
        store.write_part("object", upload_id, 1, 0, bytes(PART))
        receipts = write_all(store, "object", upload_id, content)
        write_number(store, "object", upload_id, content, 2)  # The same bytes: as if never done.
        store.finish_parts("object", upload_id, receipts)
        assert store.read("object") == content

    def test_no_parts_or_an_empty_one_make_an_empty_object(self, store: Store) -> None:
        store.finish_parts("none", store.begin_parts("none", 0), {})
        put_in_parts(store, "empty", b"")
        assert store.info("none").size == store.info("empty").size == 0

    def test_an_object_with_parts_missing_is_not_published(self, store: Store) -> None:
        content = content_of(2 * PART + 10)
        upload_id = store.begin_parts("object", len(content))
        receipts = write_all(store, "object", upload_id, content)
        other = store.begin_parts("other", len(content) - 1)
        short = write_number(store, "other", other, content[:-1], 3)
        store.abandon_parts("other", other)
        broken: list[dict[int, str]] = [
            {},
            {1: receipts[1], 2: receipts[2]},
            {1: receipts[1], 3: receipts[3]},
            {2: receipts[2], 3: receipts[3]},
            {1: receipts[2], 2: receipts[1], 3: receipts[3]},
            {**receipts, 3: short},
            {**receipts, 4: short},
            {**receipts, 2: ""},
            {**receipts, 2: "[]"},
        ]
        for wrong in broken:
            with raises(StorageError, naming=f"{store.uri}/object"):
                store.finish_parts("object", upload_id, wrong)
            assert keys_of(store) == []
        assert store.parts_exist("object", upload_id)
        receipts[3] = write_number(store, "object", upload_id, content, 3)
        store.finish_parts("object", upload_id, receipts)
        assert store.read("object") == content

    def test_a_part_that_the_object_cannot_have_is_refused(self, store: Store) -> None:
        upload_id = store.begin_parts("object", 10)
        for number, start, size in (
            (0, 0, 10),
            (MOST_PARTS + 1, 0, 10),
            (1, 0, 11),
            (2, 10, 1),
            (1, -1, 5),
        ):
            with raises(StorageError, naming=f"{store.uri}/object: part {number}"):
                store.write_part("object", upload_id, number, start, bytes(size))
        receipt = store.write_part("object", upload_id, MOST_PARTS, 0, bytes(10))
        store.finish_parts("object", upload_id, {MOST_PARTS: receipt})

    def test_finishing_refuses_what_exists_by_then(self, store: Store) -> None:
        upload_id = store.begin_parts("object", 6)
        receipt = store.write_part("object", upload_id, 1, 0, b"upload")
        store.create("object", b"first")
        with raises(PreconditionFailedError, naming=f"{store.uri}/object"):
            store.finish_parts("object", upload_id, {1: receipt})
        assert store.read("object") == b"first"
        assert not store.parts_exist("object", upload_id)
        assert store.discard_unfinished("") == 0

    def test_finishing_once_more_changes_nothing(self, store: Store) -> None:
        upload_id = store.begin_parts("object", 5)
        receipts = {1: store.write_part("object", upload_id, 1, 0, b"bytes")}
        store.finish_parts("object", upload_id, receipts)
        version = store.info("object").version
        with suppress(PreconditionFailedError):
            store.finish_parts("object", upload_id, receipts)
        with raises(StorageError, naming=f"{store.uri}/object"):
            store.write_part("object", upload_id, 1, 0, b"BYTES")
        store.abandon_parts("object", upload_id)
        assert store.read_with_version("object") == (b"bytes", version)

    def test_of_many_uploads_one_is_published(self, store: Store) -> None:
        def race(racer: int) -> bool:
            return succeeds(lambda: put_in_parts(store, "object", b"%d" % racer))

        wins = in_threads(race)
        assert wins.count(True) == 1
        assert store.read("object") == b"%d" % wins.index(True)
        store.discard_unfinished("")  # of those who were refused while they wrote
        assert keys_of(store) == ["object"]

    def test_abandoned_parts_leave_nothing(self, store: Store) -> None:
        upload_id = store.begin_parts("object", 5)
        receipt = store.write_part("object", upload_id, 1, 0, b"bytes")
        for number in (upload_id, upload_id, "nonsense"):
            store.abandon_parts("object", number)
        assert not store.parts_exist("object", upload_id)
        with raises(StorageError):
            store.finish_parts("object", upload_id, {1: receipt})
        assert keys_of(store) == []
        assert store.discard_unfinished("") == 0

    def test_what_another_owner_discarded_cannot_be_gone_on_with(self, store: Store) -> None:
        content = content_of(PART + 1)
        upload_id = store.begin_parts("run/object", len(content))
        receipts = write_all(store, "run/object", upload_id, content)
        unwritten = store.begin_parts("run/other", 5)
        store.write("run/finished", b"stays")
        assert store.discard_unfinished("run/") == 2
        for key, gone in (("run/object", upload_id), ("run/other", unwritten)):
            assert not store.parts_exist(key, gone)
        with raises(StorageError, naming="discarded"):
            store.write_part("run/other", unwritten, 1, 0, b"bytes")
        with raises(StorageError, naming="discarded") as caught:
            store.finish_parts("run/object", upload_id, receipts)
        assert not isinstance(caught[0], PreconditionFailedError)
        assert keys_of(store) == ["run/finished"]
        assert store.discard_unfinished("run/") == 0

    def test_discarding_is_for_the_prefix_only(self, store: Store) -> None:
        keys = ("run/1/a", "run/10", "run/2", "other")
        uploads = {key: store.begin_parts(key, 5) for key in keys}
        receipts = {key: store.write_part(key, uploads[key], 1, 0, b"bytes") for key in keys}
        assert store.discard_unfinished("run/1/") == 1
        assert store.discard_unfinished("no/such/") == 0
        assert store.discard_unfinished("run/1") == 1
        store.finish_parts("run/2", uploads["run/2"], {1: receipts["run/2"]})
        assert store.discard_unfinished("") == 1
        assert keys_of(store) == ["run/2"]

    def test_a_key_can_be_begun_again_after_a_discard(self, store: Store) -> None:
        zombie = store.begin_parts("object", 6)
        receipt = store.write_part("object", zombie, 1, 0, b"zombie")
        store.discard_unfinished("object")
        put_in_parts(store, "object", b"owner")
        with raises(StorageError):
            store.write_part("object", zombie, 1, 0, b"zombie")
        with raises(StorageError):
            store.finish_parts("object", zombie, {1: receipt})
        assert store.read("object") == b"owner"

    def test_what_is_no_upload_is_refused(self, store: Store) -> None:
        for nonsense in ("", "x", "1.2", "../object", "/etc/passwd", "-1.token.id", "..", "1..id"):
            with raises(BadInputError, naming=f"{store.uri}/object"):
                store.write_part("object", nonsense, 1, 0, b"")
            with raises(BadInputError):
                store.finish_parts("object", nonsense, {})
            with raises(BadInputError):
                store.parts_exist("object", nonsense)
