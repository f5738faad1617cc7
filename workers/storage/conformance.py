"""The promises of `Store` as tests. A new kind of store inherits them all:

class TestMyStore(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return MyStore(...)  # Empty, and this test's own.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from workers.errors import BadInputError
from workers.storage.conformance_parts import PartsConformance
from workers.storage.conformance_tools import add_one, in_threads, keys_of, raises, succeeds
from workers.storage.self_check import check_store
from workers.storage.store import (
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    Store,
)

REFUSED_KEYS = ("", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a\\b", "a\0b")


class StoreConformance(PartsConformance):
    """Inherit it in a test module, and give a `store` fixture."""

    def test_a_written_object_is_read_back(self, store: Store) -> None:
        store.write("folder/object", b"some bytes")
        assert store.read("folder/object") == b"some bytes"

    def test_every_kind_of_bytes_can_be_written(self, store: Store) -> None:
        for kind in (bytes, bytearray, memoryview):
            store.write("object", kind(b"bytes"))
            assert store.read("object") == b"bytes"

    def test_wide_memory_is_written_byte_by_byte(self, store: Store) -> None:
        wide = memoryview(bytes(range(16))).cast("I")
        store.write("object", wide)
        assert store.read("object") == bytes(range(16))

    def test_an_empty_object_is_an_object(self, store: Store) -> None:
        store.create("empty", b"")
        assert store.read("empty") == b""
        assert store.info("empty").size == 0
        assert keys_of(store) == ["empty"]
        store.read_into("empty", 0, memoryview(bytearray()))

    def test_write_replaces_whatever_is_there(self, store: Store) -> None:
        store.write("object", b"a long first content")
        store.write("object", b"second")
        assert store.read("object") == b"second"

    def test_what_is_missing_is_reported_with_its_location(self, store: Store) -> None:
        reads: list[Callable[[], object]] = [
            lambda: store.read("no/such"),
            lambda: store.read_with_version("no/such"),
            lambda: store.read_into("no/such", 0, memoryview(bytearray(1))),
            lambda: store.read_into("no/such", 0, memoryview(bytearray())),
            lambda: store.info("no/such"),
        ]
        for read in reads:
            with raises(ObjectNotFoundError, naming=f"{store.uri}/no/such"):
                read()

    def test_a_folder_is_not_an_object(self, store: Store) -> None:
        store.write("folder/object", b"bytes")
        with raises(ObjectNotFoundError):
            store.read("folder")
        with raises(ObjectNotFoundError):
            store.info("folder")
        with raises(ObjectNotFoundError):
            store.read("folder/object/below")

    def test_all_ways_to_learn_a_version_agree(self, store: Store) -> None:
        created = store.create("object", b"first")
        assert store.info("object").version == created
        assert store.read_with_version("object") == (b"first", created)
        assert [found.version for found in store.list_objects()] == [created]
        replaced = store.replace("object", b"second", created)
        assert store.read_with_version("object") == (b"second", replaced)
        written = store.write("object", b"third")
        assert store.info("object").version == written
        assert len({created, replaced, written}) == 3

    def test_versions_differ_when_size_is_the_same(self, store: Store) -> None:
        versions = [store.write("object", b"%04d" % number) for number in range(20)]
        assert len(set(versions)) == len(versions)

    def test_info_gives_key_and_size(self, store: Store) -> None:
        store.write("folder/object", b"12345")
        info = store.info("folder/object")
        assert (info.key, info.size) == ("folder/object", 5)

    def test_ranges_are_exact(self, store: Store) -> None:
        content = random.Random(1).randbytes(3 * 2**20 + 17)
        store.write("object", content)
        for start, size in ((0, 1), (0, len(content)), (5, 2**20), (len(content) - 3, 3)):
            buffer = bytearray(b"\xaa" * (size + 2))
            store.read_into("object", start, memoryview(buffer)[1:-1])
            assert buffer == b"\xaa" + content[start : start + size] + b"\xaa"

    def test_a_range_is_read_into_wide_memory(self, store: Store) -> None:
        store.write("object", bytes(range(20)))
        buffer = bytearray(16)
        store.read_into("object", 4, memoryview(buffer).cast("I"))
        assert buffer == bytes(range(4, 20))

    def test_a_range_past_the_end_is_an_error(self, store: Store) -> None:
        store.write("object", b"0123456789")
        for start, size in ((0, 11), (9, 2), (10, 1), (100, 5)):
            with raises(StorageError, naming=f"{store.uri}/object"):
                store.read_into("object", start, memoryview(bytearray(size)))

    def test_a_range_is_of_the_version_asked_for(self, store: Store) -> None:
        first = store.create("object", b"first")
        buffer = bytearray(5)
        for start, size in ((0, 5), (2, 3), (0, 0)):
            store.read_into("object", start, memoryview(buffer)[:size], first)
        second = store.replace("object", b"again", first)
        for start, size in ((0, 5), (2, 3), (3, 5), (0, 0)):
            with raises(StorageError, naming=f"{store.uri}/object was changed"):
                store.read_into("object", start, memoryview(buffer)[:size], first)
        store.read_into("object", 0, memoryview(buffer), second)
        assert buffer == b"again"
        store.delete("object")
        with raises(ObjectNotFoundError):
            store.read_into("object", 0, memoryview(buffer), second)

    def test_objects_are_listed_in_the_order_of_theirkeys_of(self, store: Store) -> None:
        keys = ["b", "a/b/c", "a-b", "a.b", "ab", "a/b-c", "a/b.c", ".hidden", "Z", "é", "a b"]
        for key in keys:
            store.write(key, key.encode())
        found = list(store.list_objects())
        assert [info.key for info in found] == sorted(keys)
        assert [info.size for info in found] == [len(key.encode()) for key in sorted(keys)]

    def test_folders_are_the_first_parts_of_longer_keys(self, store: Store) -> None:
        assert list(store.list_folders()) == []
        for key in ("b/1", "a/b/c", "a-b/x", "a/d", "file", "a.b/y/z"):
            store.write(key, b"x")
        assert sorted(store.list_folders()) == ["a", "a-b", "a.b", "b"]
        assert list(store.substore("a").list_folders()) == ["b"]
        assert list(store.substore("nothing").list_folders()) == []

    def test_a_prefix_selects_by_the_first_letters_of_the_key(self, store: Store) -> None:
        for key in ("run/1/a", "run/1/b", "run/10", "run/2", "running", "other"):
            store.write(key, b"x")
        assert keys_of(store, "run/") == ["run/1/a", "run/1/b", "run/10", "run/2"]
        assert keys_of(store, "run/1") == ["run/1/a", "run/1/b", "run/10"]
        assert keys_of(store, "run/1/") == ["run/1/a", "run/1/b"]
        assert keys_of(store, "run/1/a") == ["run/1/a"]
        assert keys_of(store, "no/such/") == []

    def test_an_empty_store_lists_nothing(self, store: Store) -> None:
        assert keys_of(store) == []

    def test_create_refuses_what_exists(self, store: Store) -> None:
        store.create("object", b"first")
        with raises(PreconditionFailedError, naming=f"{store.uri}/object"):
            store.create("object", b"second")
        assert store.read("object") == b"first"

    def test_replace_refuses_a_stale_version(self, store: Store) -> None:
        first = store.create("object", b"first")
        store.replace("object", b"second", first)
        with raises(PreconditionFailedError, naming=f"{store.uri}/object"):
            store.replace("object", b"third", first)
        assert store.read("object") == b"second"

    def test_replace_refuses_what_is_gone(self, store: Store) -> None:
        version = store.create("object", b"first")
        store.delete("object")
        with raises(PreconditionFailedError):
            store.replace("object", b"second", version)
        assert keys_of(store) == []

    def test_delete_is_for_all_and_twice_is_no_error(self, store: Store) -> None:
        store.write("folder/object", b"bytes")
        store.delete("folder/object")
        store.delete("folder/object")
        store.delete("never/was")
        assert keys_of(store) == []
        for key in ("folder/a", "folder/b", "folder/c", "other/a"):
            store.write(key, b"bytes")
        store.delete_many(key for key in ("folder/a", "never/was", "folder/c", "other/a"))
        assert keys_of(store) == ["folder/b"]
        store.delete("folder/b")
        store.create("folder/object", b"again")

    def test_a_folder_is_deleted_with_all_that_is_in_it(self, store: Store) -> None:
        for key in ("folder/one", "folder/below/two", "folder2/three", "four"):
            store.write(key, b"bytes")
        store.delete_folder("folder")
        store.delete_folder("folder")
        store.delete_folder("never")
        assert keys_of(store) == ["folder2/three", "four"]

    def test_of_many_that_create_one_wins(self, store: Store) -> None:
        for key in ("races/1", "races/2"):

            def race(racer: int, key: str = key) -> bool:
                return succeeds(lambda: store.create(key, b"%d" % racer))

            wins = in_threads(race)
            assert wins.count(True) == 1
            assert store.read(key) == b"%d" % wins.index(True)

    def test_of_many_that_replace_one_version_one_wins(self, store: Store) -> None:
        version = store.create("object", b"start")
        wins = in_threads(
            lambda racer: succeeds(lambda: store.replace("object", b"%d" % racer, version))
        )
        assert wins.count(True) == 1
        assert store.read("object") == b"%d" % wins.index(True)

    def test_a_counter_of_compare_and_swaps_loses_nothing(self, store: Store) -> None:
        store.create("counter", b"0")

        def count(racer: int) -> int:
            return sum(add_one(store, "counter") for _ in range(10))

        wins = sum(in_threads(count))
        assert wins > 0
        assert int(store.read("counter")) == wins

    def test_a_reader_sees_whole_objects_only(self, store: Store) -> None:
        contents = [bytes([letter]) * 300_000 for letter in b"abcdef"]
        store.write("object", contents[0])
        done = threading.Event()

        def read_until_done(reader: int) -> int:
            reads = 0
            while not done.is_set() or not reads:
                assert store.read("object") in contents
                reads += 1
            return reads

        with ThreadPoolExecutor(2) as readers:
            reading = [readers.submit(read_until_done, reader) for reader in range(2)]
            for content in contents * 4:
                store.write("object", content)
            done.set()
            assert all(reads.result() > 0 for reads in reading)

    def test_keys_that_could_leave_the_store_are_refused(self, store: Store) -> None:
        operations: list[Callable[[str], object]] = [
            store.read,
            store.read_with_version,
            lambda key: store.read_into(key, 0, memoryview(bytearray(1))),
            lambda key: store.read_into(key, 0, memoryview(bytearray())),
            store.info,
            lambda key: store.write(key, b""),
            lambda key: store.create(key, b""),
            lambda key: store.replace(key, b"", "version"),
            store.delete,
            lambda key: store.begin_parts(key, 1),
            store.local_path,
        ]
        for key in REFUSED_KEYS:
            for operation in operations:
                with raises(BadInputError):
                    operation(key)
        for prefix in ("/", "../", "../a", "a/../", "a//b", "a\\"):
            with raises(BadInputError):
                keys_of(store, prefix)
            with raises(BadInputError):
                store.discard_unfinished(prefix)
        for prefix in ("..", "a/../b", "/a"):
            with raises(BadInputError):
                store.substore(prefix)

    def test_a_substore_is_the_folder_seen_from_within(self, store: Store) -> None:
        store.write("a/b/object", b"bytes")
        store.write("a/other", b"bytes")
        for substore in (store.substore("a").substore("b"), store.substore("a/b/")):
            assert substore.uri == f"{store.uri}/a/b"
            assert keys_of(substore) == ["object"]
            assert substore.read("object") == b"bytes"
        substore = store.substore("a/b")
        version = substore.create("new", b"from within")
        assert store.info("a/b/new").version == version
        upload_id = substore.begin_parts("uploaded", 1)
        assert store.parts_exist("a/b/uploaded", upload_id)
        assert store.discard_unfinished("a/") == 1
        assert not substore.parts_exist("uploaded", upload_id)

    def test_a_local_path_holds_the_object(self, store: Store) -> None:
        store.write("folder/object", b"bytes")
        path = store.local_path("folder/object")
        assert path is None or path.read_bytes() == b"bytes"

    def test_the_store_passes_the_check_before_a_campaign(self, store: Store) -> None:
        check_store(store)
        assert keys_of(store) == []
