"""Where a child ends up: whole in one place or aside in the other, wherever its driver is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import HealthConfig
from orchestrator.ending import Ending, WrittenChild
from orchestrator.gates import Gate
from orchestrator.pool.calls import LocalCalls
from tests.checkpoint_files import open_merger, recipe_for, rule, write_checkpoint
from workers.actors import MergeSpec, MergeWorker
from workers.checkpoints import open_checkpoint
from workers.errors import BadInputError
from workers.merging.executor import Merger
from workers.storage import Bytes, StorageError
from workers.storage.folder import FolderStore

PASSED, FAILED = (Gate("layers", passed, "as measured", "a bound") for passed in (True, False))


class FailingStore(FolderStore):
    """Raises `StorageError` instead of doing the next thing, once `left` is used up."""

    def __init__(self, root: Path, left: list[int], done: list[str] | None = None) -> None:
        super().__init__(root)
        self.root = root
        self.left = left
        self.done: list[str] = [] if done is None else done

    def substore(self, prefix: str) -> FailingStore:
        return FailingStore(self.root / prefix, self.left, self.done)

    def create(self, key: str, data: Bytes) -> str:
        self._count(f"create {key}")
        return super().create(key, data)

    def begin_parts(self, key: str, size: int) -> str:
        self._count(f"begin {key}")
        return super().begin_parts(key, size)

    def write_part(self, key: str, upload_id: str, number: int, start: int, data: Bytes) -> str:
        self._count(f"write {key}")
        return super().write_part(key, upload_id, number, start, data)

    def finish_parts(self, key: str, upload_id: str, receipts: dict[int, str]) -> None:
        self._count(f"finish {key}")
        super().finish_parts(key, upload_id, receipts)

    def discard_unfinished(self, prefix: str) -> int:
        self._count(f"discard {prefix}")
        return super().discard_unfinished(prefix)

    def delete_folder(self, folder: str) -> None:
        self._count(f"delete {folder}")
        super().delete_folder(folder)

    def _count(self, what: str) -> None:
        if self.left[0] <= 0:
            raise StorageError("the store is gone")
        self.left[0] -= 1
        self.done.append(what)


@pytest.fixture
def merger(tmp_path: Path) -> Merger:
    """Two parents of two files each."""
    for number, name in enumerate(("a", "b")):
        one, two = (
            {f"model.layers.{layer}.mlp.up_proj.weight": torch.full((8, 8), 1.0 + number + layer)}
            for layer in range(2)
        )
        write_checkpoint(tmp_path / name, one, two)
    return open_merger({"a": tmp_path / "a", "b": tmp_path / "b"})


def make(
    merger: Merger,
    store: FolderStore,
    folders: list[str],
    how: str = "linear",
    gates: list[Gate] | None = None,
    health: HealthConfig | None = None,
) -> WrittenChild:
    """Write and publish the child, as a campaign does; `folders` is what its ledger has of it."""
    parameters: dict[str, Any] = {"weight": 1.0} if how == "linear" else {"source": "b"}
    recipe = recipe_for(merger, rule(how, **parameters))
    worker = MergeWorker(MergeSpec({}, None, {}))
    worker.parents, worker.base = merger.parents, merger.base
    root = Path(store.uri)
    worker.store = lambda location: store.substore(str(Path(location).relative_to(root)))
    ending = Ending(store, recipe, merger.parents, merger.base, health or HealthConfig())
    written = ending.write(
        LocalCalls(worker), gates or [PASSED], folders.append, folders[-1] if folders else None
    )
    lineage = {"recipe_id": recipe.id, **written.weights.to_dict()}
    written.writer.publish({"lineage.json": json.dumps(lineage).encode()})
    return written


def content(folder: Path) -> dict[str, bytes]:
    """Every file there is, locks and unfinished ones too."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def children(store: Path) -> list[str]:
    """The folders that hold anything."""
    return sorted({str(Path(name).parent) for name in content(store)})


def test_a_worker_that_has_written_computes_with_the_threads_that_it_had(
    merger: Merger, tmp_path: Path
) -> None:
    """Else it would score otherwise than it has said."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        make(merger, FolderStore(tmp_path), [])
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


def test_a_good_child_has_its_own_folder(merger: Merger, tmp_path: Path) -> None:
    folders: list[str] = []
    written = make(merger, FolderStore(tmp_path / "store"), folders)
    assert written.folder.startswith("child-")
    assert folders == [written.folder]
    assert children(tmp_path / "store") == [written.folder]
    assert [gate.name for gate in written.gates] == ["finite", "different", "changed", "layers"]


def test_what_the_live_model_fails_is_never_begun_elsewhere(merger: Merger, tmp_path: Path) -> None:
    folders: list[str] = []
    written = make(merger, FolderStore(tmp_path / "store"), folders, gates=[FAILED])
    assert written.folder.startswith("rejected/child-")
    assert folders == [written.folder]
    assert children(tmp_path / "store") == [written.folder]


def test_what_only_the_bytes_tell_leaves_nothing_in_the_good_folder(
    merger: Merger, tmp_path: Path
) -> None:
    folders: list[str] = []
    written = make(merger, FolderStore(tmp_path / "store"), folders, how="passthrough")
    assert [folder.partition("child-")[0] for folder in folders] == ["", "rejected/"]
    assert children(tmp_path / "store") == [written.folder]
    child = open_checkpoint(str(tmp_path / "store" / written.folder))
    assert len(child.weight_files) == 2


def test_an_allowed_failure_changes_nothing(merger: Merger, tmp_path: Path) -> None:
    lax = HealthConfig(allow=["different", "layers"])
    store = FolderStore(tmp_path / "store")
    written = make(merger, store, [], how="passthrough", gates=[FAILED], health=lax)
    assert written.folder.startswith("child-")


@pytest.mark.parametrize(
    ("how", "gates"),
    [("linear", [PASSED]), ("linear", [FAILED]), ("passthrough", [PASSED])],
    ids=["good", "live", "bytes"],
)
def test_killed_anywhere_it_ends_in_the_same_place(
    how: str, gates: list[Gate], merger: Merger, tmp_path: Path
) -> None:
    """And no reader meets a checkpoint in the folder of the good before the end."""
    whole = FailingStore(tmp_path / "whole", [10_000])
    written = make(merger, whole, [], how, gates)
    assert len(whole.done) > 8
    good = written.folder.removeprefix("rejected/")
    for allowed in range(len(whole.done)):
        root = tmp_path / f"store{allowed}"
        folders: list[str] = []
        with pytest.raises(StorageError, match="gone"):
            make(merger, FailingStore(root, [allowed]), folders, how, gates)
        if good != written.folder:
            with pytest.raises(BadInputError):
                open_checkpoint(str(root / good))
            assert not list((root / good).glob("model*.safetensors"))
        again = make(merger, FolderStore(root), folders, how, gates)
        assert again.folder == folders[-1] == written.folder
        assert content(root) == content(tmp_path / "whole")


def test_a_child_that_was_published_stays_when_bounds_become_tighter(
    merger: Merger, tmp_path: Path
) -> None:
    store = FolderStore(tmp_path / "store")
    first = make(merger, store, [])
    before = content(tmp_path / "store" / first.folder)
    second = make(merger, store, [], gates=[FAILED])
    assert content(tmp_path / "store" / first.folder) == before
    assert children(tmp_path / "store") == [first.folder, second.folder]
    assert make(merger, store, []).folder == first.folder
