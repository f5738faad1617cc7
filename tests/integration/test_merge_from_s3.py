"""Merges on one machine whose parents and child lie in a bucket."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.child_writer import ChildWriter
from orchestrator.pool.calls import LocalCalls
from tests.checkpoint_files import files_of, open_merger, rule, write_checkpoint, write_child
from workers.actors import MergeSpec, MergeWorker
from workers.checkpoints import open_checkpoint
from workers.merging import Recipe
from workers.merging import parts as parts_module
from workers.merging.executor import Merger
from workers.storage import open_store

PARTS = 24


def test_processes_of_a_merge_share_no_connection(
    s3_location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would read what another has asked for: a connection that was open stays open in a fork."""
    monkeypatch.setattr(parts_module, "PART_BYTES", 1)
    folders = {}
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"model.layers.{n}.mlp.up_proj.weight": torch.randn(64, 65, generator=generator)
            for n in range(PARTS)
        }
        folders[name] = write_checkpoint(tmp_path / name, tensors)
        store = open_store(f"{s3_location}/processes/{name}")
        for file in folders[name].iterdir():
            store.write(file.name, file.read_bytes())
    parents = {name: open_checkpoint(f"{s3_location}/processes/{name}") for name in "ab"}
    recipe = Recipe(Merger(parents).references, (rule("linear", weight=0.5),))
    worker = MergeWorker(MergeSpec({}, None, {}))
    worker.parents = parents
    target = open_store(str(tmp_path / "child"))
    writer = ChildWriter.create(recipe, parents, None, target)
    writer.write(LocalCalls(worker, 6))
    writer.publish({})
    assert len(writer.parts) == PARTS
    write_child(open_merger(folders), recipe, tmp_path / "expected")
    assert files_of(tmp_path / "child") == files_of(tmp_path / "expected")
