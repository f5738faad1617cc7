"""Parents that change while they are read: an error that names the file, never a wrong child."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoint_files import (
    open_merger,
    open_remote,
    recipe_for,
    rule,
    write_checkpoint,
    write_weights,
)
from workers.checkpoints import CheckpointReader, open_checkpoint
from workers.checkpoints import reader as reader_module
from workers.merging.executor import Merger
from workers.storage import StorageError
from workers.storage.folder import FolderStore

NAME = "model.layers.0.mlp.up_proj.weight"


def write(folder: Path, seed: int, rows: int = 300) -> Path:
    values = torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed))
    return write_checkpoint(folder, {NAME: values.bfloat16()})


def change(folder: Path, how: str) -> None:
    """As careless tools do: in place, by another file, or shorter."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    if how == "in place":
        data[-1] ^= 1
        with file.open("r+b") as opened:
            opened.write(data)
    elif how == "another file":
        other = folder / "other"
        other.write_bytes(data)
        other.rename(file)
    else:
        os.truncate(file, len(data) // 2)


@pytest.mark.parametrize("how", ["in place", "another file", "shorter"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_shard_that_changed_after_it_was_opened_is_not_merged(
    how: str, remote: bool, tmp_path: Path
) -> None:
    folders = {name: write(tmp_path / name, seed) for seed, name in enumerate("ab")}
    opened = {n: open_remote(f) if remote else open_checkpoint(str(f)) for n, f in folders.items()}
    merger = Merger(opened)
    recipe = recipe_for(merger, rule("linear", weight=0.5))
    change(folders["b"], how)
    with pytest.raises(StorageError, match=f"{folders['b']}.*changed"):
        write_weights(merger, recipe, FolderStore(tmp_path / "child"))
    assert not (tmp_path / "child" / "model.safetensors").exists()


@pytest.mark.parametrize("how", ["in place", "shorter"])
def test_a_mapped_file_that_changes_is_noticed(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "LOOK_SECONDS", -1.0)
    folder = write(tmp_path / "a", 1)
    reader = CheckpointReader(open_checkpoint(str(folder)))
    before = bytes(reader.read(NAME, 0, 80))
    assert bytes(reader.read(NAME, 0, 80)) == before
    change(folder, how)
    with pytest.raises(StorageError, match=f"{folder}.*changed"):
        reader.read(NAME, 0, 80)


def test_a_shard_that_is_cut_in_the_middle_of_a_merge_ends_it_with_an_error(tmp_path: Path) -> None:
    """Not with a signal: what lies behind the end of a mapped file must not be touched."""
    for seed, name in enumerate("ab"):
        write(tmp_path / name, seed, rows=20_000)
    program = f"""
import os, sys
from pathlib import Path
from tests.checkpoint_files import *
from workers.merging import plan
from workers.merging.executor import Run
folder = Path({str(tmp_path)!r})
plan.CHUNK_ELEMENTS = plan.UNIT_BYTES = 40_000
from workers.checkpoints import reader
reader.LOOK_SECONDS = -1.0
calls, fill = [], Run.fill
def fill_then_cut(self, unit, values):
    fill(self, unit, values)
    calls.append(1)
    if len(calls) == 3:
        os.truncate(folder / "b" / "model.safetensors", 300_000)
Run.fill = fill_then_cut
merger = open_merger({{name: folder / name for name in "ab"}})
try:
    write_weights(merger, recipe_for(merger, rule("linear", weight=0.5)), FolderStore(folder / "child"))
except OSError as error:
    assert "changed" in str(error), error
    sys.exit(7)
"""
    found = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    assert found.returncode == 7


def test_a_parent_that_rests_is_merged(tmp_path: Path) -> None:
    merger = open_merger({name: write(tmp_path / name, seed) for seed, name in enumerate("ab")})
    write_weights(
        merger, recipe_for(merger, rule("linear", weight=0.5)), FolderStore(tmp_path / "c")
    )
    assert (tmp_path / "c" / "model.safetensors").exists()
