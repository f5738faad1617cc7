"""The folder store: the contract, and what is particular to files."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from workers.errors import BadInputError
from workers.storage import (
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    Store,
)
from workers.storage import files as files_module
from workers.storage.conformance import StoreConformance
from workers.storage.conformance_parts import put_in_parts
from workers.storage.files import LOCK_NAME, STALE_PUT_SECONDS
from workers.storage.folder import FolderStore

PROCESSES = 4


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "root")


class TestFolderStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return FolderStore(tmp_path / "root")


def run_in_processes(program: str, *arguments: str) -> list[str]:
    """What each of several processes prints that run `program` at once."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES
    return answers


def test_of_many_processes_that_create_one_wins(store: FolderStore) -> None:
    program = """
import sys
from workers.storage import PreconditionFailedError
from workers.storage.folder import FolderStore
store, number = FolderStore(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
wins = 0
for key in range(50):
    try:
        store.create(f"race/{key}", number.encode())
        wins += 1
    except PreconditionFailedError:
        pass
print(wins)
"""
    wins = [int(answer) for answer in run_in_processes(program, store.uri)]
    assert sum(wins) == 50
    winners = [int(store.read(info.key)) for info in store.list_objects("race/")]
    assert [winners.count(number) for number in range(PROCESSES)] == wins


def test_a_counter_between_processes_loses_nothing(store: FolderStore) -> None:
    program = """
import sys
from workers.storage.conformance_tools import add_one
from workers.storage.folder import FolderStore
store = FolderStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(sum(add_one(store, "counter") for _ in range(60)))
"""
    store.create("counter", b"0")
    wins = sum(int(answer) for answer in run_in_processes(program, store.uri))
    assert wins > 0
    assert int(store.read("counter")) == wins


def test_a_killed_writer_leaves_an_upload_that_is_discarded(store: FolderStore) -> None:
    program = """
import os, signal, sys
from workers.storage.folder import FolderStore
store = FolderStore(sys.argv[1])
store.write_part("run/shard", store.begin_parts("run/shard", 100_000), 1, 0, b"x" * 100_000)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program, store.uri], check=False)
    assert killed.returncode == -9
    assert list(store.list_objects()) == []
    assert store.discard_unfinished("run/") == 1
    assert os.listdir(f"{store.uri}/run") == []


def test_writes_leave_no_temporary_files(store: FolderStore) -> None:
    version = store.create("object", b"first")
    version = store.replace("object", b"second", version)
    store.write("object", b"third")
    with pytest.raises(PreconditionFailedError):
        store.create("object", b"fourth")
    with pytest.raises(PreconditionFailedError):
        store.replace("object", b"fourth", version)
    put_in_parts(store, "other", b"bytes")
    assert sorted(os.listdir(store.uri)) == [LOCK_NAME, "object", "other"]


def test_what_a_failed_write_left_is_cleaned_up(store: FolderStore) -> None:
    with pytest.raises(StorageError, match="File name too long"):
        store.write("x" * 250, b"bytes")
    store.write("file", b"bytes")
    with pytest.raises(StorageError, match=f"{store.uri}/file/below"):
        store.create("file/below", b"bytes")
    assert sorted(os.listdir(store.uri)) == [LOCK_NAME, "file"]


def test_only_stale_puts_are_discarded_and_none_is_counted(store: FolderStore) -> None:
    root = Path(store.uri)
    root.mkdir()
    left = root / ".object.0123456789abcdef.put-unfinished"
    running = root / ".object.fedcba9876543210.put-unfinished"
    for file in (left, running):
        file.write_bytes(b"half")
    long_ago = time.time() - STALE_PUT_SECONDS - 1
    os.utime(left, (long_ago, long_ago))
    assert list(store.list_objects()) == []
    assert store.discard_unfinished("") == 0
    assert os.listdir(root) == [running.name]


def test_names_of_the_stores_own_are_no_keys(store: FolderStore) -> None:
    store.write("object", b"bytes")
    for key in (LOCK_NAME, f"folder/{LOCK_NAME}", ".a.0123456789abcdef.upload-unfinished"):
        with pytest.raises(BadInputError, match="keeps for itself"):
            store.read(key)


def test_a_version_is_not_used_again_when_the_inode_is(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)  # A clock that stands.
    versions = [store.write("object", b"%03d" % number) for number in range(50)]
    assert len(set(versions)) == 50
    inodes = {version.split("-")[0] for version in versions}
    assert len({version.split("-")[1] for version in versions}) == 50, inodes


def test_deleting_and_creating_again_gives_another_version(store: FolderStore) -> None:
    versions = set()
    for number in range(50):
        versions.add(store.create("object", b"%03d" % number))
        store.delete("object")
    assert len(versions) == 50


def test_a_publishing_link_does_not_change_the_version(store: FolderStore) -> None:
    version = store.create("object", b"bytes")
    os.link(f"{store.uri}/object", f"{store.uri}/second name")
    assert store.info("object").version == version


def test_a_lock_that_is_never_given_back_is_an_error(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("object", b"first")
    monkeypatch.setattr(files_module, "LOCK_WAIT_SECONDS", 0.05)
    with (
        files_module.locked_folder(store.uri),
        pytest.raises(StorageError, match=rf"{LOCK_NAME} was held by another process"),
    ):
        store.write("object", b"second")
    assert store.read("object") == b"first"
    store.write("object", b"third")


def test_a_writer_waits_for_the_lock(store: FolderStore) -> None:
    store.write("object", b"first")
    writer = threading.Thread(target=store.write, args=("object", b"second"))
    with files_module.locked_folder(store.uri):
        writer.start()
        writer.join(0.05)
        assert writer.is_alive()
        assert store.read("object") == b"first"
    writer.join(10)
    assert store.read("object") == b"second"


def test_a_short_read_names_file_offset_and_sizes(store: FolderStore) -> None:
    store.write("object", b"0123456789")
    with pytest.raises(StorageError, match=rf"{store.uri}/object: wanted 8 .* byte 5 on, got 5"):
        store.read_into("object", 5, memoryview(bytearray(8)))


def test_links_that_leave_the_folder_are_refused(store: FolderStore, tmp_path: Path) -> None:
    root = Path(store.uri)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    store.write("object", b"bytes")
    (root / "link").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    for key in ("link", "folder/secret", "folder/new"):
        with pytest.raises(BadInputError, match="leaves the folder"):
            store.read(key)
        with pytest.raises(BadInputError, match="leaves the folder"):
            store.write(key, b"overwritten")
    with pytest.raises(BadInputError, match="leaves the folder"):
        store.substore("folder")
    assert [info.key for info in store.list_objects()] == ["object"]
    assert sorted(os.listdir(outside)) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_folder_whose_name_begins_like_the_root_is_outside(tmp_path: Path) -> None:
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "object").write_bytes(b"bytes")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "root-2" / "object")
    with pytest.raises(BadInputError):
        FolderStore(tmp_path / "root").read("link")


def test_links_inside_the_folder_are_followed(store: FolderStore) -> None:
    store.write("object", b"bytes")
    (Path(store.uri) / "link").symlink_to("object")
    assert store.read("link") == b"bytes"
    assert [info.key for info in store.list_objects()] == ["link", "object"]


def test_a_root_that_is_a_link_is_a_root(tmp_path: Path) -> None:
    FolderStore(tmp_path / "real").write("object", b"bytes")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = FolderStore(tmp_path / "link")
    assert store.read("object") == b"bytes"
    assert store.uri == str(tmp_path / "link")


def test_a_snapshot_of_a_hugging_face_cache_reads_its_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "abc").write_bytes(b"weights")
    snapshot = cache / "snapshots" / "revision"
    (snapshot / "folder").mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "folder" / "file").symlink_to("../../../blobs/abc")
    (tmp_path / "secret").write_bytes(b"secret")
    (snapshot / "escape").symlink_to("../../../secret")
    store = FolderStore(snapshot)
    assert store.read("model.safetensors") == b"weights"
    assert store.substore("folder").read("file") == b"weights"
    assert [info.key for info in store.list_objects()] == ["folder/file", "model.safetensors"]
    with pytest.raises(BadInputError):
        store.read("escape")


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"bytes")
    with pytest.raises(BadInputError, match=r"model\.safetensors is a file"):
        FolderStore(tmp_path / "model.safetensors")


def test_reading_creates_no_folder(store: FolderStore) -> None:
    with pytest.raises(ObjectNotFoundError):
        store.read("a/b")
    store.delete("a/b")
    with pytest.raises(PreconditionFailedError):
        store.replace("a/b", b"bytes", "version")
    assert list(store.list_objects()) == []
    assert store.discard_unfinished("") == 0
    assert not Path(store.uri).exists()


def test_a_full_disk_is_a_storage_error(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    upload_id = store.begin_parts("upload", 5)
    receipt = store.write_part("upload", upload_id, 1, 0, b"bytes")
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match=rf"{store.uri}/upload: No space left"):
            store.finish_parts("upload", upload_id, {1: receipt})
        with pytest.raises(StorageError, match=rf"{store.uri}/object: No space left"):
            store.create("object", b"bytes")
    assert os.listdir(store.uri) == [upload_id]
    store.finish_parts("upload", upload_id, {1: receipt})
    assert store.read("upload") == b"bytes"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 1 MiB: a file system of its own, or files limited to that size."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if (
        os.geteuid() == 0
        and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    ):
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_without_room_is_noticed_at_the_beginning(small_disk: Path) -> None:
    store = FolderStore(small_disk)
    with pytest.raises(StorageError, match=rf"{store.uri}/object: .* room for its {2**21} bytes"):
        store.begin_parts("object", 2**21)
    assert os.listdir(small_disk) == []
    put_in_parts(store, "object", bytes(2**19))


def test_the_room_of_an_upload_is_taken_when_it_begins(store: FolderStore) -> None:
    upload_id = store.begin_parts("object", 10 * 2**20)
    assert os.stat(f"{store.uri}/{upload_id}").st_blocks * 512 >= 10 * 2**20


def test_a_publisher_killed_at_the_last_step_has_published(store: FolderStore) -> None:
    program = """
import os, signal, sys
from workers.storage.folder import FolderStore
store = FolderStore(sys.argv[1])
upload_id = store.begin_parts("object", 5)
receipt = store.write_part("object", upload_id, 1, 0, b"bytes")
print(upload_id, receipt, sep="\\n", flush=True)
os.unlink = lambda path: os.kill(os.getpid(), signal.SIGKILL)
store.finish_parts("object", upload_id, {1: receipt})
"""
    killed = subprocess.run(
        [sys.executable, "-c", program, store.uri], check=False, capture_output=True, text=True
    )
    assert killed.returncode == -9
    upload_id, receipt = killed.stdout.splitlines()
    published = store.read_with_version("object")
    assert published[0] == b"bytes"
    assert sorted(os.listdir(store.uri)) == sorted([upload_id, "object"])
    with pytest.raises(PreconditionFailedError):
        store.write_part("object", upload_id, 1, 0, b"BYTES")
    assert store.read_with_version("object") == published
    store.finish_parts("object", upload_id, {1: receipt})
    assert store.read("object") == b"bytes"
    assert os.listdir(store.uri) == ["object"]


def test_nothing_is_published_while_a_part_is_being_written(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id = store.begin_parts("object", 5)
    receipt = store.write_part("object", upload_id, 1, 0, b"bytes")
    monkeypatch.setattr(files_module, "LOCK_WAIT_SECONDS", 0.05)
    with open(f"{store.uri}/{upload_id}", "rb+") as another:
        fcntl.flock(another, fcntl.LOCK_SH)
        store.write_part("object", upload_id, 1, 0, b"bytes")
        with pytest.raises(StorageError, match="was held by another process"):
            store.finish_parts("object", upload_id, {1: receipt})
    assert list(store.list_objects()) == []
    store.finish_parts("object", upload_id, {1: receipt})


def test_a_writer_that_was_thought_dead_does_not_change_what_was_published(
    store: FolderStore,
) -> None:
    upload_id = store.begin_parts("object", 5)
    temporary = Path(store.uri) / upload_id
    with ThreadPoolExecutor(1) as threads, temporary.open("rb+") as publisher:
        fcntl.flock(publisher, fcntl.LOCK_EX)
        writing = threads.submit(store.write_part, "object", upload_id, 1, 0, b"ghost")
        while times_open(temporary) < 2:
            assert not writing.done()
            time.sleep(0.001)
        publisher.write(b"bytes")
        publisher.flush()
        temporary.rename(f"{store.uri}/object")
        published = store.read_with_version("object")
        fcntl.flock(publisher, fcntl.LOCK_UN)
        with pytest.raises(PreconditionFailedError, match=f"{store.uri}/object exists already"):
            writing.result(10)
    assert store.read_with_version("object") == published


def times_open(path: Path) -> int:
    """How often this process has the file open."""
    opened = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            opened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return opened.count(str(path.resolve()))


def test_an_upload_of_another_key_is_refused(store: FolderStore) -> None:
    upload_id = store.begin_parts("object", 5)
    store.write("put", b"bytes")
    put = upload_id.replace(".upload-", ".put-")
    for key, refused in (("other", upload_id), ("object", put), ("object", f"a/{upload_id}")):
        with pytest.raises(BadInputError, match="is no upload of it"):
            store.write_part(key, refused, 1, 0, b"bytes")


def test_a_file_that_is_written_to_while_it_is_read_is_noticed(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = store.write("object", b"first")
    read = os.preadv

    def read_and_be_overtaken(file: int, buffers: list[memoryview], start: int) -> int:
        count = read(file, buffers, start)
        Path(store.uri, "object").write_bytes(b"again")
        return count

    monkeypatch.setattr(os, "preadv", read_and_be_overtaken)
    with pytest.raises(StorageError, match=f"{store.uri}/object was changed since it was opened"):
        store.read_into("object", 0, memoryview(bytearray(5)), version)


def test_a_file_system_without_hard_links_is_named_as_the_cause(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="refuses hard links"):
        store.create("object", b"bytes")
    assert os.listdir(store.uri) == []
