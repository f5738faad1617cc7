"""Reading byte ranges and writing children: every byte right, and nothing half done to be seen."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint_files import (
    INDEX,
    RemoteStore,
    assert_same_bits,
    entry,
    file_bytes,
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
    CheckpointWriter,
    localize,
    open_checkpoint,
    publish_companions,
)
from workers.checkpoints import reader as reader_module
from workers.checkpoints.verify import verify_weights
from workers.errors import BadInputError
from workers.merging.child import write_weights
from workers.storage import Bytes, StorageError, Upload
from workers.storage.folder import FolderStore

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


def files_of(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file, but for the model card and the store's own lock."""
    skipped = {"README.md", ".darwin-lock"}
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in skipped}


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

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        if self.down:
            raise StorageError(f"{key}: 503")
        super().read_into(key, start, buffer)


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
    (tmp_path / "file").write_text("in the way")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadInputError, match=f"{cache}.*DARWIN_CACHE"):
            localize(open_remote(sharded[0]), cache)


# Children


def test_the_child_has_the_layout_of_the_father(sharded: list[Path], tmp_path: Path) -> None:
    """The same files, the same headers byte by byte; the companions and the index are the father's."""
    _, father, mother = sharded
    merger = open_merger({"a": father, "b": mother})
    child = write_child(merger, recipe_for(merger, rule("linear", weight=0.5)), tmp_path / "child")
    assert files_of(child).keys() == files_of(father).keys()
    for name, content in files_of(child).items():
        if name.endswith(".safetensors"):
            header = len(safetensors_header(father / name))
            assert content[:header] == (father / name).read_bytes()[:header]
            assert content[header:] != (father / name).read_bytes()[header:]
            assert len(content) == (father / name).stat().st_size
        else:
            assert content == (father / name).read_bytes()
    with safetensors.safe_open(weight_files(child)[0], "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def safetensors_header(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def test_the_layout_of_the_mother_does_not_matter(sharded: list[Path], tmp_path: Path) -> None:
    _, father, mother = sharded
    tensors = read_tensors(mother)
    single = write_checkpoint(
        tmp_path / "single", tensors, config=json.loads((mother / "config.json").read_text())
    )
    children = []
    for number, other in enumerate((mother, single)):
        merger = open_merger({"a": father, "b": other})
        recipe = recipe_for(merger, rule("linear", weight=0.5))
        children.append(read_tensors(write_child(merger, recipe, tmp_path / f"child{number}")))
    assert_same_bits(*children)


def test_companions_are_carried_and_may_be_replaced(sharded: list[Path], tmp_path: Path) -> None:
    father = open_checkpoint(str(sharded[0]))
    target = FolderStore(tmp_path / "child")
    publish_companions(father, target, {"lineage.json": b"{}", "generation_config.json": b"{}"})
    published = files_of(tmp_path / "child")
    assert set(published) == {*father.companions, "lineage.json", INDEX}
    assert published["generation_config.json"] == published["lineage.json"] == b"{}"
    assert published["tokenizer.json"] == (sharded[0] / "tokenizer.json").read_bytes()


class WatchedStore(FolderStore):
    """Looks at the folder, as a reader would, after every single thing that is published there.

    Raises `StorageError` instead of publishing once `allowed` objects have been.
    """

    def __init__(self, root: Path, allowed: int = 1000) -> None:
        super().__init__(root)
        self.root = root
        self.allowed = allowed
        self.published: list[str] = []
        self.readable: list[bool] = []

    def create(self, key: str, data: Bytes) -> str:
        self._count()
        version = super().create(key, data)
        self._look(key)
        return version

    def open_upload(self, key: str) -> Upload:
        self._look_only()
        return WatchedUpload(super().open_upload(key), self, key)

    def _count(self) -> None:
        if len(self.published) >= self.allowed:
            raise StorageError("the store is gone")

    def _look(self, key: str) -> None:
        self.published.append(key)
        self._look_only()

    def _look_only(self) -> None:
        try:
            open_checkpoint(str(self.root))
            self.readable.append(True)
        except BadInputError:
            self.readable.append(False)


class WatchedUpload(Upload):
    def __init__(self, upload: Upload, store: WatchedStore, key: str) -> None:
        self.upload, self.store, self.key = upload, store, key

    def write(self, data: Bytes) -> None:
        self.upload.write(data)
        self.store._look_only()

    def commit(self) -> None:
        try:
            self.store._count()
        except StorageError:
            self.upload.abort()
            raise
        self.upload.commit()
        self.store._look(self.key)

    def abort(self) -> None:
        self.upload.abort()


def publish(store: WatchedStore, sharded: list[Path]) -> None:
    _, father, mother = sharded
    merger = open_merger({"a": father, "b": mother})
    recipe = recipe_for(merger, rule("linear", weight={"a": 0.25, "b": 0.75}))
    write_weights(merger, recipe, store, 1)
    publish_companions(merger.parents["a"], store, {"lineage.json": b"{}"})


def test_a_reader_never_sees_half_a_child(sharded: list[Path], tmp_path: Path) -> None:
    store = WatchedStore(tmp_path / "child")
    publish(store, sharded)
    assert store.published[-2:] == [INDEX, "config.json"]
    assert store.readable == [False] * (len(store.readable) - 1) + [True]
    assert len(store.readable) > len(store.published)


def test_a_writer_that_dies_anywhere_leaves_no_checkpoint_and_can_be_repeated(
    sharded: list[Path], tmp_path: Path
) -> None:
    whole = WatchedStore(tmp_path / "whole")
    publish(whole, sharded)
    for allowed in range(len(whole.published)):
        folder = tmp_path / f"child{allowed}"
        with pytest.raises(StorageError, match="gone"):
            publish(WatchedStore(folder, allowed), sharded)
        with pytest.raises(BadInputError):
            open_checkpoint(str(folder))
        assert not list(folder.glob(".*unfinished"))
        publish(WatchedStore(folder), sharded)  # the second try takes up what the first one left
        assert files_of(folder) == files_of(tmp_path / "whole")


def test_an_aborted_writer_leaves_nothing(sharded: list[Path], tmp_path: Path) -> None:
    father = open_checkpoint(str(sharded[0]))
    reader = CheckpointReader(father)
    writer = CheckpointWriter(father, FolderStore(tmp_path / "child"))
    name, found = next(iter(father.tensors.items()))
    writer.write(name, reader.read(name, 0, found.stop - found.start))
    writer.abort()
    writer.abort()  # as often as one likes
    assert files_of(tmp_path / "child") == {}


def copied_by_hand(father: Checkpoint, target: FolderStore) -> Iterator[CheckpointWriter]:
    """The writer after each of the father's tensors was written in two pieces."""
    reader, writer = CheckpointReader(father), CheckpointWriter(father, target)
    for name, found in father.tensors.items():
        size = found.stop - found.start
        writer.write(name, reader.read(name, 0, size // 2))
        if size:
            writer.write(name, reader.read(name, size // 2, size))
        yield writer


def test_tensors_may_be_written_in_pieces(sharded: list[Path], mixed: Path, tmp_path: Path) -> None:
    for folder in (sharded[0], mixed):
        father, target = open_checkpoint(str(folder)), tmp_path / folder.name
        for writer in copied_by_hand(father, FolderStore(target)):
            last = writer
        last.finish()
        publish_companions(father, FolderStore(target), {})
        assert files_of(target) == files_of(folder)


def test_a_child_that_lacks_tensors_is_not_finished(sharded: list[Path], tmp_path: Path) -> None:
    father = open_checkpoint(str(sharded[0]))
    writer = next(copied_by_hand(father, FolderStore(tmp_path / "child")))
    with pytest.raises(AssertionError, match="missing"):
        writer.finish()


def test_tensors_out_of_order_or_too_long_are_not_written(
    sharded: list[Path], tmp_path: Path
) -> None:
    father = open_checkpoint(str(sharded[0]))
    first, second, *_ = father.tensors.values()
    with pytest.raises(AssertionError, match="out of order"):
        CheckpointWriter(father, FolderStore(tmp_path / "a")).write(second.name, b"")
    with pytest.raises(AssertionError, match="more bytes"):
        CheckpointWriter(father, FolderStore(tmp_path / "b")).write(
            first.name, bytes(first.stop - first.start + 1)
        )


@pytest.mark.parametrize("same_size", [True, False])
def test_another_weight_file_in_the_way_is_refused(
    sharded: list[Path], tmp_path: Path, same_size: bool
) -> None:
    """One of equal size could be the work of an earlier try, so it is only found by reading it."""
    _, father, mother = sharded
    merger = open_merger({"a": father, "b": mother})
    second = weight_files(father)[1]
    target = FolderStore(tmp_path / "child")
    (tmp_path / "child").mkdir()
    foreign = second.read_bytes() if same_size else b"foreign"
    (tmp_path / "child" / second.name).write_bytes(foreign)
    problem = "is not what was written" if same_size else "in the way"
    with pytest.raises(StorageError, match=f"{target.uri}/{second.name}.*{problem}"):
        write_weights(merger, recipe_for(merger, rule("passthrough", source="b")), target, 1)
    assert (tmp_path / "child" / second.name).read_bytes() == foreign


@pytest.mark.parametrize("name", ["tokenizer.json", INDEX, "config.json"])
def test_another_small_file_in_the_way_is_refused(
    sharded: list[Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / name).write_text("foreign")
    target = FolderStore(tmp_path / "child")
    with pytest.raises(StorageError, match=f"{target.uri}/{name}"):
        publish_companions(open_checkpoint(str(sharded[0])), target, {"lineage.json": b"{}"})
    assert (tmp_path / "child" / name).read_text() == "foreign"


def test_what_is_told_of_a_child_may_be_told_anew(sharded: list[Path], tmp_path: Path) -> None:
    """A campaign that went on and chose the same child writes its card and lineage again."""
    father, target = open_checkpoint(str(sharded[0])), FolderStore(tmp_path / "child")
    for lineage in (b"{}", b"[]", b"[]"):
        publish_companions(father, target, {"lineage.json": lineage})
        assert (tmp_path / "child" / "lineage.json").read_bytes() == lineage


def digests_of(checkpoint: Checkpoint) -> dict[str, str]:
    reader = CheckpointReader(checkpoint)
    return {
        name: hashlib.sha256(reader.read(name, 0, found.stop - found.start)).hexdigest()
        for name, found in checkpoint.tensors.items()
    }


def test_the_health_check_reads_everything_back(sharded: list[Path], tmp_path: Path) -> None:
    """One bit that changed after it was written, in any tensor or header, is found and named."""
    father = open_checkpoint(str(sharded[0]))
    copy = Path(shutil.copytree(sharded[0], tmp_path / "copy"))
    digests = digests_of(father)
    verify_weights(father, FolderStore(copy), digests)
    for name, found in list(father.tensors.items())[::7]:
        file = copy / father.file_of[name]
        healthy = bytearray(file.read_bytes())
        broken = bytearray(healthy)
        broken[found.stop - 1] ^= 1
        file.write_bytes(broken)
        with pytest.raises(StorageError, match=f"{file}.*{name}"):
            verify_weights(father, FolderStore(copy), digests)
        file.write_bytes(healthy)
    first = weight_files(copy)[0]
    content = first.read_bytes()
    first.write_bytes(content.replace(b'"format":"pt"', b'"format":"tp"'))
    with pytest.raises(StorageError, match=f"{first}.*header"):
        verify_weights(father, FolderStore(copy), digests)
    first.write_bytes(content + b"x")
    with pytest.raises(StorageError, match=f"{first}.*size"):
        verify_weights(father, FolderStore(copy), digests)
    first.unlink()
    with pytest.raises(StorageError, match=first.name):
        verify_weights(father, FolderStore(copy), digests)
