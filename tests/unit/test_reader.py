"""Reading byte ranges of checkpoints: every byte right, wherever they lie."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint_files import (
    RemoteStore,
    assert_same_bits,
    entry,
    file_bytes,
    files_of,
    open_merger,
    open_remote,
    read_tensors,
    recipe_for,
    rule,
    tensor_bytes,
    weight_files,
    write_checkpoint,
    write_child,
)
from tests.families import write_family
from workers.checkpoints import (
    Checkpoint,
    CheckpointReader,
    localize,
    open_checkpoint,
)
from workers.checkpoints import reader as reader_module
from workers.storage import StorageError

SHARD_SIZE = "20KB"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Base and two relatives, each in several shards, written by transformers."""
    folders = write_family(tmp_path_factory.mktemp("sharded"), "qwen3", max_shard_size=SHARD_SIZE)
    assert all(len(weight_files(folder)) > 2 for folder in folders)
    return folders


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose tensors do not lie at multiples of their element's size."""
    folder = write_checkpoint(tmp_path_factory.mktemp("mixed") / "m", {"a": torch.zeros(1)})
    header = {
        "bytes": entry("U8", [3], 0, 3),
        "halves": entry("BF16", [2, 4], 3, 19),
        "none": entry("F32", [0], 19, 19),
        "words": entry("F32", [5], 19, 39),
        "scalar": entry("F64", [], 39, 47),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + 1)  # so that the data begin at an odd byte
    (folder / "model.safetensors").write_bytes(file_bytes(text, bytes(range(60, 107))))
    return folder


def opened_both_ways(folder: Path) -> list[Checkpoint]:
    return [open_checkpoint(str(folder)), open_remote(folder)]


def test_whole_tensors_are_what_the_library_reads(sharded: list[Path], mixed: Path) -> None:
    for folder in (sharded[1], mixed):
        stored = read_tensors(folder)
        for checkpoint in opened_both_ways(folder):
            reader = CheckpointReader(checkpoint)
            assert checkpoint.tensors.keys() == stored.keys()
            for name, tensor in stored.items():
                assert reader.read(name, 0, tensor.nbytes) == tensor_bytes(tensor), name


@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_range_is_what_the_library_reads(
    data: st.DataObject, sharded: list[Path], mixed: Path
) -> None:
    folder = data.draw(st.sampled_from([sharded[1], mixed]))
    stored = read_tensors(folder)
    name = data.draw(st.sampled_from(sorted(stored)))
    whole = tensor_bytes(stored[name])
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    for checkpoint in opened_both_ways(folder):
        assert CheckpointReader(checkpoint).read(name, start, stop) == whole[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 13), (13, 13), (3, 2)])
def test_a_range_outside_the_tensor_is_refused(mixed: Path, start: int, stop: int) -> None:
    for checkpoint in opened_both_ways(mixed):
        with pytest.raises(ValueError, match="'words'" if stop > 20 else "'bytes'"):
            CheckpointReader(checkpoint).read("words" if stop > 20 else "bytes", start, stop)


def test_what_is_read_may_be_written_into_without_harm(mixed: Path) -> None:
    before = (mixed / "model.safetensors").read_bytes()
    for checkpoint in opened_both_ways(mixed):
        CheckpointReader(checkpoint).read("bytes", 0, 3)[0] = 7
    assert (mixed / "model.safetensors").read_bytes() == before


def test_unaligned_tensors_are_merged(mixed: Path, tmp_path: Path) -> None:
    merger = open_merger({"a": mixed, "b": mixed})
    child = write_child(
        merger, recipe_for(merger, rule("passthrough", source="b")), tmp_path / "child"
    )
    assert_same_bits(read_tensors(child), read_tensors(mixed))


# A local copy of a remote checkpoint


def test_a_local_checkpoint_is_used_where_it_is(sharded: list[Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(sharded[0]))
    assert localize(checkpoint, tmp_path / "cache") is checkpoint
    assert not (tmp_path / "cache").exists()


def test_a_remote_checkpoint_is_copied_whole(
    sharded: list[Path], mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "COPY_BYTES", 1000)  # so that files come in pieces
    for folder in (sharded[0], mixed):
        remote = open_remote(folder)
        copy = localize(remote, tmp_path / "cache")
        assert copy.fingerprint == remote.fingerprint
        assert copy.folder == tmp_path / "cache" / remote.fingerprint
        assert files_of(copy.folder) == files_of(folder)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_copy_is_made_once(
    sharded: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARWIN_CACHE", str(tmp_path / "cache"))
    first = localize(open_remote(sharded[0]))
    stamps = [file.stat().st_mtime_ns for file in weight_files(Path(first.location))]
    again = localize(open_remote(sharded[0]))
    assert again.location == first.location == str(tmp_path / "cache" / first.fingerprint)
    assert [file.stat().st_mtime_ns for file in weight_files(Path(again.location))] == stamps


def test_workers_that_copy_at_once_get_one_whole_copy(sharded: list[Path], tmp_path: Path) -> None:
    start = threading.Barrier(4)
    found: list[Checkpoint] = []

    def work() -> None:
        remote = open_remote(sharded[0])
        start.wait()
        found.append(localize(remote, tmp_path / "cache"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {copy.location for copy in found} == {str(tmp_path / "cache" / found[0].fingerprint)}
    assert len(found) == 4
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [found[0].fingerprint]
    assert_same_bits(read_tensors(Path(found[0].location)), read_tensors(sharded[0]))


class FailingStore(RemoteStore):
    """A store that answers no more once it is `down`."""

    down = False

    def read_into(
        self, key: str, start: int, buffer: memoryview, version: str | None = None
    ) -> None:
        if self.down:
            raise StorageError(f"{key}: 503")
        super().read_into(key, start, buffer, version)


def test_a_store_that_fails_is_not_taken_for_a_full_disk(
    sharded: list[Path], tmp_path: Path
) -> None:
    """The one is retried elsewhere, the other is for the user to mend."""
    store = FailingStore(sharded[0])
    remote = replace(open_remote(sharded[0]), store=store)
    assert remote.fingerprint  # which is asked for once, and then kept
    store.down = True
    with pytest.raises(StorageError, match="503"):
        localize(remote, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(sharded: list[Path], tmp_path: Path) -> None:
    """It is no fault of the input: on other machines there may be room."""
    (tmp_path / "file").write_text("in the way")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=f"{cache}.*DARWIN_CACHE"):
            localize(open_remote(sharded[0]), cache)
