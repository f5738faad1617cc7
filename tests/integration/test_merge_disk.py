"""`darwin merge` where the disk is full or read-only, or a parent is cut: an error that says what to do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.child_writer import MANIFEST
from tests.campaigns import run_darwin
from tests.checkpoint_files import files_of, weight_files, write_checkpoint

SHARDS = 3
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [
        write_parent(tmp_path_factory.mktemp("parents") / name, seed)
        for seed, name in enumerate("ab")
    ]


def write_parent(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    shards = [
        {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(300, 300, generator=generator)}
        for n in range(SHARDS)
    ]
    return write_checkpoint(folder, *shards, files={"tokenizer.json": b"{}"})


def write_recipe(folder: Path, parents: list[Path]) -> str:
    file = folder / "recipe.yaml"
    given = [{"name": path.name, "path": str(path)} for path in parents]
    file.write_text(yaml.safe_dump({"parents": given, "rules": [{"method": "linear",
                    "parameters": {"weight": 0.5}}]}))  # fmt: skip
    return str(file)


@pytest.fixture(scope="module")
def undisturbed(family: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_darwin("merge", write_recipe(folder, family), str(folder / "child"))
    return files_of(folder / "child")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if mount("-t", "tmpfs", "-o", "size=64m", "darwin-test", str(place)):
        pytest.skip("only root may mount a file system")
    yield place
    mount_again = subprocess.run(["umount", "-l", str(place)], capture_output=True)
    assert mount_again.returncode == 0


def mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode


def resize(disk: Path, size: int) -> None:
    assert mount("-o", f"remount,size={size}", str(disk)) == 0


def refused(recipe: str, target: Path, expect: int) -> str:
    result: dict[str, Any] = run_darwin("merge", recipe, str(target), expect=expect)
    message: str = result["error"]
    return message


@pytest.mark.parametrize("room", ["for one file and a half", "for the weights and two small files"])
def test_a_full_disk(
    room: str, disk: Path, family: list[Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Once there is room again the same command finishes the child, with what it had written."""
    recipe, target = write_recipe(tmp_path, family), disk / "child"
    pages = [-(-file.stat().st_size // PAGE) for file in weight_files(family[0])]
    whole = room == "for the weights and two small files"
    resize(disk, PAGE * (sum(pages) + 2 if whole else pages[0] * 3 // 2))
    message = refused(recipe, target, expect=1)
    assert str(target) in message
    assert "No space left on device" in message
    assert "make room on that disk" in message
    assert not any((target / name).exists() for name in undisturbed)
    assert (target / MANIFEST).exists() == whole
    begun = {file.stat().st_ino for file in target.glob(".model-*")}
    # What could not all be begun does not go on filling the disk.
    assert len(begun) == (SHARDS if whole else 0)
    resize(disk, 64 << 20)
    run_darwin("merge", recipe, str(target))
    assert files_of(target) == undisturbed
    if whole:
        assert {file.stat().st_ino for file in weight_files(target)} == begun


def test_a_place_that_cannot_be_written_to(
    disk: Path, family: list[Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    recipe, target = write_recipe(tmp_path, family), disk / "child"
    assert mount("-o", "remount,ro", str(disk)) == 0
    message = refused(recipe, target, expect=1)
    assert str(target) in message
    assert "Read-only file system" in message
    assert "choose another place" in message
    assert mount("-o", "remount,rw", str(disk)) == 0
    run_darwin("merge", recipe, str(target))
    assert files_of(target) == undisturbed


def test_a_file_in_the_way_of_the_folder(family: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of somebody else")
    recipe = write_recipe(tmp_path, family)
    message = refused(recipe, tmp_path / "file" / "child", expect=1)
    assert str(tmp_path / "file" / "child") in message
    assert "Not a directory" in message
    assert "choose another place" in message
    assert (tmp_path / "file").read_text() == "of somebody else"


def test_a_parent_that_is_cut_short(family: list[Path], tmp_path: Path) -> None:
    cut = write_parent(tmp_path / "cut", 1)
    file = weight_files(cut)[1]
    os.truncate(file, file.stat().st_size - 1)
    message = refused(write_recipe(tmp_path, [family[0], cut]), tmp_path / "child", expect=2)
    assert str(file) in message
    assert "truncated" in message
    assert "fetch it again" in message
    assert not (tmp_path / "child").exists()
