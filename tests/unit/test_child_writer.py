"""Writing children: every byte right, nothing half done to be seen, and no crash that is not made good."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors

from orchestrator.child_writer import PROGRESS, ChildWriter
from tests.checkpoint_files import (
    INDEX,
    assert_same_bits,
    files_of,
    local_calls,
    open_merger,
    read_tensors,
    recipe_for,
    rule,
    weight_files,
    write_checkpoint,
    write_child,
    write_weights,
)
from tests.families import write_family
from workers.checkpoints import open_checkpoint
from workers.checkpoints.layout import Layout
from workers.checkpoints.publishing import publish_companions
from workers.errors import BadInputError
from workers.merging import parts as parts_module
from workers.merging import plan as plan_module
from workers.storage import Bytes, StorageError
from workers.storage.folder import FolderStore

SHARD_SIZE = "20KB"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Base and two relatives, each in several shards, written by transformers."""
    folders = write_family(tmp_path_factory.mktemp("sharded"), "qwen3", max_shard_size=SHARD_SIZE)
    assert all(len(weight_files(folder)) > 2 for folder in folders)
    return folders


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even small shards have several parts."""
    monkeypatch.setattr(parts_module, "PART_BYTES", 5000)
    monkeypatch.setattr(plan_module, "CHUNK_ELEMENTS", 500)
    monkeypatch.setattr(plan_module, "UNIT_BYTES", 2000)


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
    publish_companions(
        father, layout_of(father), target, {"lineage.json": b"{}", "generation_config.json": b"{}"}
    )
    published = files_of(tmp_path / "child")
    assert set(published) == {*father.companions, "lineage.json", INDEX}
    assert published["generation_config.json"] == published["lineage.json"] == b"{}"
    assert published["tokenizer.json"] == (sharded[0] / "tokenizer.json").read_bytes()


def layout_of(father: Any) -> Layout:
    return Layout(father.weight_files, father.config, father.location, True)


class WatchedStore(FolderStore):
    """Looks at the folder, as a reader would, around every single thing that is done there.

    Raises `StorageError` instead of doing it once `allowed` things have been done.
    """

    def __init__(self, root: Path, allowed: int = 10_000) -> None:
        super().__init__(root)
        self.root = root
        self.allowed = allowed
        self.done: list[str] = []
        self.readable: list[bool] = []

    def create(self, key: str, data: Bytes) -> str:
        self._count(key)
        return super().create(key, data)

    def write(self, key: str, data: Bytes) -> str:
        self._count(key)
        return super().write(key, data)

    def begin_parts(self, key: str, size: int) -> str:
        self._count(key)
        return super().begin_parts(key, size)

    def write_part(self, key: str, upload_id: str, number: int, start: int, data: Bytes) -> str:
        self._count(f"{key} {number}")
        return super().write_part(key, upload_id, number, start, data)

    def finish_parts(self, key: str, upload_id: str, receipts: dict[int, str]) -> None:
        self._count(key)
        super().finish_parts(key, upload_id, receipts)

    def delete_folder(self, folder: str) -> None:
        self._count(folder)
        super().delete_folder(folder)

    def _count(self, key: str) -> None:
        try:
            open_checkpoint(str(self.root))
            self.readable.append(True)
        except BadInputError:
            self.readable.append(False)
        if len(self.done) >= self.allowed:
            raise StorageError("the store is gone")
        self.done.append(key)


def publish(store: WatchedStore, sharded: list[Path]) -> None:
    _, father, mother = sharded
    merger = open_merger({"a": father, "b": mother})
    recipe = recipe_for(merger, rule("linear", weight={"a": 0.25, "b": 0.75}))
    writer = ChildWriter.create(recipe, merger.parents, None, store)
    report = writer.write(local_calls(merger, store, 1))
    lineage = {"recipe_id": recipe.id, **report.to_dict()}
    writer.publish({"lineage.json": json.dumps(lineage).encode()})


def test_a_reader_never_sees_half_a_child(
    sharded: list[Path], tmp_path: Path, small_parts: None
) -> None:
    store = WatchedStore(tmp_path / "child")
    publish(store, sharded)
    assert store.done[-3:] == [INDEX, "config.json", PROGRESS]
    assert store.readable == [False] * (len(store.readable) - 1) + [True]
    files = len(weight_files(sharded[0]))
    assert len([key for key in store.done if " " in key]) > 2 * files


def test_a_writer_that_dies_anywhere_leaves_no_checkpoint_and_can_be_repeated(
    sharded: list[Path], tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by another process: what the second try goes by is in the store alone."""
    monkeypatch.setattr("orchestrator.child_writer.RECORD_BYTES", 15_000)
    whole = WatchedStore(tmp_path / "whole")
    publish(whole, sharded)
    for allowed in range(len(whole.done)):
        folder = tmp_path / f"child{allowed}"
        with pytest.raises(StorageError, match="gone"):
            publish(WatchedStore(folder, allowed), sharded)
        if allowed < len(whole.done) - 1:
            with pytest.raises(BadInputError):
                open_checkpoint(str(folder))
        second = WatchedStore(folder)
        publish(second, sharded)
        assert files_of(folder) == files_of(tmp_path / "whole")
        assert not list(folder.glob(".*unfinished"))
        if allowed > len(whole.done) * 0.8:
            assert len(second.done) < len(whole.done) / 2


def test_uploads_that_expire_between_two_crashes_are_written_anew(
    sharded: list[Path], tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of parts of an upload that is gone say nothing of the upload that took its place."""
    monkeypatch.setattr("orchestrator.child_writer.RECORD_BYTES", 15_000)
    whole = WatchedStore(tmp_path / "whole")
    publish(whole, sharded)
    folder = tmp_path / "child"
    with pytest.raises(StorageError, match="gone"):
        publish(WatchedStore(folder, len(whole.done) // 2), sharded)
    for upload in folder.glob(".*upload-unfinished"):
        upload.unlink()
    files = len(weight_files(sharded[0]))
    with pytest.raises(StorageError, match="gone"):
        publish(WatchedStore(folder, files + 3), sharded)
    publish(WatchedStore(folder), sharded)
    assert files_of(folder) == files_of(tmp_path / "whole")
    assert not list(folder.glob(".*unfinished"))


def test_parts_cover_every_file(sharded: list[Path], small_parts: None, tmp_path: Path) -> None:
    merger = open_merger({"a": sharded[1]})
    writer = ChildWriter.create(recipe_for(merger), merger.parents, None, FolderStore(tmp_path))
    for file in merger.parents["a"].weight_files:
        parts = [part for part in writer.parts if part.file == file.name]
        assert [part.number for part in parts] == list(range(1, len(parts) + 1))
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == file.size
        assert all(part.stop - part.start >= 5000 for part in parts[:-1])
    assert writer.total_bytes == sum(file.size for file in merger.parents["a"].weight_files)


def test_parts_change_nothing(
    sharded: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, father, mother = sharded
    merger = open_merger({"a": father, "b": mother}, sharded[0])
    recipe = recipe_for(merger, rule("ties", weight=0.7, density=0.4))
    write_child(merger, recipe, tmp_path / "whole")
    for number, size in enumerate((1, 3000, 40_000)):
        monkeypatch.setattr(parts_module, "PART_BYTES", size)
        write_child(merger, recipe, tmp_path / str(number), threads=3)
        assert files_of(tmp_path / str(number)) == files_of(tmp_path / "whole")


def test_the_unfinished_merge_of_another_recipe_is_not_gone_on_with(
    sharded: list[Path], tmp_path: Path
) -> None:
    store = WatchedStore(tmp_path / "child", allowed=8)
    with pytest.raises(StorageError):
        publish(store, sharded)
    merger = open_merger({"a": sharded[1]})
    with pytest.raises(BadInputError, match="unfinished merge of another recipe"):
        write_weights(merger, recipe_for(merger), FolderStore(tmp_path / "child"))


def test_bytes_that_change_after_they_were_written_are_found(
    sharded: list[Path], tmp_path: Path
) -> None:
    """The health check: each file is read back, and the part that is not what was merged is named."""

    class DamagingStore(FolderStore):
        def write_part(self, key: str, upload: str, number: int, start: int, data: Bytes) -> str:
            damaged = bytearray(data)
            damaged[-1] ^= 1
            return super().write_part(key, upload, number, start, damaged)

    merger = open_merger({"a": sharded[1]})
    store = DamagingStore(tmp_path / "child")
    before = threading.active_count()
    with pytest.raises(StorageError, match=r"model-.*bytes 0 to .*not what was written") as caught:
        write_weights(merger, recipe_for(merger), store)
    # The garbage collector might end a thread that is left while another one starts, and wait for ever.
    assert threading.active_count() == before, caught


class SmallDisk(FolderStore):
    """Has room for one file."""

    def begin_parts(self, key: str, size: int) -> str:
        if self.unfinished():
            raise StorageError(f"{key}: cannot make room")
        return super().begin_parts(key, size)

    def unfinished(self) -> list[Path]:
        return list(Path(self.uri).glob(".model-*"))


def test_files_that_could_not_all_be_begun_do_not_go_on_filling_the_disk(
    sharded: list[Path], tmp_path: Path
) -> None:
    merger = open_merger({"a": sharded[0], "b": sharded[1]})
    store = SmallDisk(tmp_path / "child")
    with pytest.raises(StorageError, match="cannot make room"):
        write_weights(merger, recipe_for(merger, rule("linear", weight=0.5)), store)
    assert not store.unfinished()


def test_the_report_holds_each_files_hash(sharded: list[Path], tmp_path: Path) -> None:
    merger = open_merger({"a": sharded[1]})
    report = write_weights(merger, recipe_for(merger), FolderStore(tmp_path / "child"))
    assert report.files == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in weight_files(sharded[1])
    }


def test_another_weight_file_in_the_way_is_refused(sharded: list[Path], tmp_path: Path) -> None:
    second = weight_files(sharded[1])[1]
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / second.name).write_bytes(b"foreign")
    merger = open_merger({"a": sharded[1], "b": sharded[2]})
    target = FolderStore(tmp_path / "child")
    with pytest.raises(StorageError, match=f"{target.uri}/{second.name}.*in the way"):
        write_weights(merger, recipe_for(merger, rule("passthrough", source="b")), target)
    assert (tmp_path / "child" / second.name).read_bytes() == b"foreign"


def test_a_child_that_is_there_is_not_written_again(sharded: list[Path], tmp_path: Path) -> None:
    """A campaign that went on may choose the same child; but it is read, and must be what it was."""
    merger = open_merger({"a": sharded[1], "b": sharded[2]})
    recipe = recipe_for(merger, rule("linear", weight=0.5))
    store = FolderStore(tmp_path / "child")
    writer = ChildWriter.create(recipe, merger.parents, None, store)
    report = writer.write(local_calls(merger, store))
    lineage = {"recipe_id": recipe.id, **report.to_dict()}
    writer.publish({"lineage.json": json.dumps(lineage).encode()})
    before = files_of(tmp_path / "child")
    watched = WatchedStore(tmp_path / "child", allowed=0)
    again = ChildWriter.create(recipe, merger.parents, None, watched)
    assert again.write(local_calls(merger, watched)) == report
    assert files_of(tmp_path / "child") == before
    other = ChildWriter.create(recipe_for(merger), merger.parents, None, store)
    with pytest.raises(BadInputError, match="child of another recipe"):
        other.write(local_calls(merger, store))
    file = weight_files(tmp_path / "child")[0]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match=f"{file.name}.*not what was written"):
        again.write(local_calls(merger, watched))


@pytest.mark.parametrize("name", ["tokenizer.json", INDEX, "config.json"])
def test_another_small_file_in_the_way_is_refused(
    sharded: list[Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / name).write_text("foreign")
    target, father = FolderStore(tmp_path / "child"), open_checkpoint(str(sharded[0]))
    with pytest.raises(StorageError, match=f"{target.uri}/{name}"):
        publish_companions(father, layout_of(father), target, {"lineage.json": b"{}"})
    assert (tmp_path / "child" / name).read_text() == "foreign"


def test_what_is_told_of_a_child_may_be_told_anew(sharded: list[Path], tmp_path: Path) -> None:
    """A campaign that went on and chose the same child writes its card and lineage again."""
    father, target = open_checkpoint(str(sharded[0])), FolderStore(tmp_path / "child")
    for lineage in (b"{}", b"[]", b"[]"):
        publish_companions(father, layout_of(father), target, {"lineage.json": lineage})
        assert (tmp_path / "child" / "lineage.json").read_bytes() == lineage


DRIVER = """
import os, pathlib, sys, time
from orchestrator.pool.calls import LocalCalls

class Worker:
    def work(self, number):
        pathlib.Path(sys.argv[1], str(number)).write_text(str(os.getpid()))
        time.sleep(600)

list(LocalCalls(Worker(), 2).each("work", [(0,), (1,)]))
"""


def test_processes_end_with_the_driver(tmp_path: Path) -> None:
    """Also if that is killed: they would wait for it for ever, with the parents' memory."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)])
    try:
        await_true(lambda: len([p for p in tmp_path.iterdir() if p.read_text()]) == 2)
    finally:
        driver.kill()
        driver.wait()
    processes = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert driver.pid not in processes
    await_true(lambda: not any(map(is_running, processes)))


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
