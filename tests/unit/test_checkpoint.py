"""Opening a checkpoint: what is damaged or contradictory is refused by name; and its fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_files import (
    CONFIG,
    INDEX,
    entry,
    file_bytes,
    open_remote,
    read_tensors,
    write_checkpoint,
)
from workers.checkpoints import checkpoint as checkpoint_module
from workers.checkpoints import open_checkpoint
from workers.errors import BadInputError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ONE = {"model.embed_tokens.weight": torch.arange(8.0), "model.norm.weight": torch.ones(2)}
TWO = {"lm_head.weight": torch.arange(6.0).bfloat16().reshape(2, 3)}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", ONE, TWO, files={"tokenizer.json": b"{}"})


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "single", ONE | TWO)


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(BadInputError) as caught:
        open_checkpoint(str(folder))
    for word in (str(folder), *words):
        assert word in str(caught.value)


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_sharded_checkpoint_is_opened(sharded: Path) -> None:
    opened = open_checkpoint(str(sharded))
    assert opened.config == CONFIG
    assert opened.location == str(sharded)
    assert opened.folder == sharded
    assert [file.name for file in opened.weight_files] == [FIRST, SECOND]
    assert opened.file_of == dict.fromkeys(ONE, FIRST) | dict.fromkeys(TWO, SECOND)
    assert opened.companions == ("config.json", "tokenizer.json")
    stored = read_tensors(sharded)
    assert opened.tensors.keys() == stored.keys()
    assert {name: found.shape for name, found in opened.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    assert opened.total_bytes == sum(tensor.nbytes for tensor in stored.values()) == 52


def test_tensors_come_in_the_order_of_files_and_bytes(sharded: Path) -> None:
    opened = open_checkpoint(str(sharded))
    places = [(opened.file_of[name], found.start) for name, found in opened.tensors.items()]
    assert places == sorted(places)


def test_companions_are_small_data_files_and_never_code(single: Path) -> None:
    """Nor what speaks of weights that are not read: a child would point to files that it has not."""
    for name in (
        "modeling.py",
        "README.md",
        "pytorch_model.bin",
        "chat_template.jinja",
        "vocab.txt",
        "adapter_config.json",
        "pytorch_model.bin.index.json",
    ):
        (single / name).write_text("x")
    (single / "folder").mkdir()
    (single / "folder" / "inside.json").write_text("{}")
    assert open_checkpoint(str(single)).companions == (
        "chat_template.jinja",
        "config.json",
        "vocab.txt",
    )


def test_a_companion_is_read_as_json(sharded: Path) -> None:
    opened = open_checkpoint(str(sharded))
    assert opened.read_json("tokenizer.json") == {}
    assert opened.read_json("generation_config.json") is None


def test_a_remote_checkpoint_has_no_folder(sharded: Path) -> None:
    assert open_remote(sharded).folder is None


def test_a_long_header_is_read_whole(tmp_path: Path) -> None:
    tensors = {f"model.layers.{number}.{'x' * 40}": torch.ones(1) for number in range(1500)}
    opened = open_checkpoint(str(write_checkpoint(tmp_path / "long", tensors)))
    assert len(opened.weight_files[0].header.raw) > 2 * checkpoint_module.FIRST_READ
    assert set(opened.tensors) == set(tensors)


def test_a_place_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "not there")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "empty")


def test_no_config_is_refused(single: Path) -> None:
    (single / "config.json").unlink()
    refuse(single, "config.json")


HUGE_NUMBER = b'{"num_hidden_layers": 1' + b"0" * 5000 + b"}"


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b"null", b"\xff{}", b"[" * 100_000, HUGE_NUMBER]
)
def test_a_config_that_is_no_json_object_is_refused(single: Path, text: bytes) -> None:
    (single / "config.json").write_bytes(text)
    refuse(single, "config.json")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}']
)
def test_an_index_without_a_map_is_refused(sharded: Path, text: bytes) -> None:
    (sharded / INDEX).write_bytes(text)
    refuse(sharded, INDEX)


@pytest.mark.parametrize(
    "name",
    ["../x", "../other/model.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "..", ".", ".hidden",
     ".hidden.safetensors", "/", 1, None, [FIRST], {}],
)  # fmt: skip
def test_an_index_may_not_leave_its_folder(sharded: Path, name: Any) -> None:
    shutil.copy(sharded / FIRST, sharded / ".hidden.safetensors")
    shutil.copy(sharded / FIRST, sharded.parent / "x")
    edit_index(sharded, lambda map: map.update({"lm_head.weight": name}))
    refuse(sharded, INDEX, "'lm_head.weight'", repr(name))


@pytest.mark.parametrize(
    "name", ["", "\0", "other.safetensors", "MODEL-00001-of-00002.safetensors"]
)
def test_an_index_that_names_a_file_which_is_not_there_is_refused(sharded: Path, name: str) -> None:
    edit_index(sharded, lambda map: map.update({"lm_head.weight": name}))
    refuse(sharded, INDEX, f"/{name}: missing")


def test_an_index_that_names_a_file_of_another_kind_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda map: map.update({"lm_head.weight": "tokenizer.json"}))
    refuse(sharded, "tokenizer.json")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    refuse(sharded, f"{SECOND}: missing")


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).write_bytes((sharded / SECOND).read_bytes()[:-1])
    refuse(sharded, f"/{SECOND}", "'lm_head.weight'", "truncated")
    (sharded / SECOND).write_bytes(b"")
    refuse(sharded, f"/{SECOND}", "too short")


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda map: map.update({"more.weight": SECOND}))
    refuse(sharded, f"/{SECOND}", "'more.weight' is missing")


def test_a_tensor_that_lies_in_another_shard_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda map: map.update({"model.norm.weight": SECOND}))
    refuse(sharded, f"/{SECOND}", "'model.norm.weight' is missing")


def test_a_tensor_that_the_index_lacks_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda map: map.pop("model.norm.weight"))
    refuse(sharded, f"/{FIRST}", "'model.norm.weight' is not in", INDEX)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "twice", ONE, ONE | TWO)
    edit_index(folder, lambda map: map.update({"model.norm.weight": FIRST}))
    refuse(folder, "'model.embed_tokens.weight'", FIRST, SECOND)


def test_a_single_file_beside_an_index_is_refused(sharded: Path) -> None:
    shutil.copy(sharded / FIRST, sharded / "model.safetensors")
    refuse(sharded, "model.safetensors", INDEX)


def test_a_folder_without_weights_is_refused(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refuse(single, "model.safetensors")


def test_a_file_without_tensors_is_refused(single: Path) -> None:
    (single / "model.safetensors").write_bytes(file_bytes({}))
    refuse(single, "model.safetensors", "no tensor")


def copy(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.parent / name))


def fingerprint(folder: Path) -> str:
    return open_checkpoint(str(folder)).fingerprint


def test_a_copy_elsewhere_has_the_same_fingerprint(sharded: Path) -> None:
    other = copy(sharded, "other")
    (other / "README.md").write_text("a model card is not the model")
    assert fingerprint(other) == fingerprint(sharded) == open_remote(sharded).fingerprint
    assert len(fingerprint(sharded)) == 64


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_changed_companion_changes_the_fingerprint(sharded: Path, name: str) -> None:
    other = copy(sharded, "other")
    (other / name).write_text((other / name).read_text() + " ")
    assert fingerprint(other) != fingerprint(sharded)


def test_a_companion_more_or_under_another_name_changes_the_fingerprint(sharded: Path) -> None:
    more, renamed = copy(sharded, "more"), copy(sharded, "renamed")
    (more / "added.json").write_text("")
    (renamed / "tokenizer.json").rename(renamed / "vocab.json")
    assert len({fingerprint(folder) for folder in (sharded, more, renamed)}) == 3


def test_a_changed_header_changes_the_fingerprint(tmp_path: Path) -> None:
    """The same bytes under another name, dtype or shape are another model."""
    headers = [
        {"a": entry("U8", [4], 0, 4)},
        {"b": entry("U8", [4], 0, 4)},
        {"a": entry("I8", [4], 0, 4)},
        {"a": entry("U8", [2, 2], 0, 4)},
        {"a": entry("U8", [4], 0, 4), "__metadata__": {}},
    ]
    found = set()
    for number, header in enumerate(headers):
        folder = write_checkpoint(tmp_path / str(number), ONE)
        (folder / "model.safetensors").write_bytes(file_bytes(header, bytes(4)))
        found.add(fingerprint(folder))
    assert len(found) == len(headers)


def flip(file: Path, place: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 1]))


def test_every_byte_of_a_small_file_is_in_the_fingerprint(single: Path) -> None:
    file = single / "model.safetensors"
    seen = {fingerprint(single)}
    start = len(open_checkpoint(str(single)).weight_files[0].header.raw)
    for place in range(start, file.stat().st_size):
        flip(file, place)
        seen.add(fingerprint(single))
        flip(file, place)
    assert len(seen) == 1 + file.stat().st_size - start


def test_the_blocks_of_a_large_file_are_in_the_fingerprint(tmp_path: Path) -> None:
    """16 blocks of 64 KiB, evenly spaced from the first byte of the data to the last."""
    folder = write_checkpoint(tmp_path / "large", {"t": torch.zeros(5 << 20, dtype=torch.uint8)})
    file = folder / "model.safetensors"
    size = file.stat().st_size
    start = len(open_checkpoint(str(folder)).weight_files[0].header.raw)
    seen = {fingerprint(folder)}
    step = ((5 << 20) - (1 << 16)) // 15
    for block in range(16):
        for place in (start + block * step, start + block * step + (1 << 16) - 1):
            flip(file, place)
            seen.add(fingerprint(folder))
            flip(file, place)
    assert len(seen) == 33
    assert start + 15 * step + (1 << 16) > size - 16
