"""A checkpoint opened by its headers: which weight files it has, and which tensors lie where."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from workers.checkpoints.safetensors_format import (
    LENGTH_BYTES,
    Header,
    TensorEntry,
    header_length,
    parse_header,
)
from workers.errors import BadInputError
from workers.storage import ObjectInfo, ObjectNotFoundError, Store
from workers.storage.locations import find_store

if TYPE_CHECKING:
    from workers.checkpoints.adapter import Adapter

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COMPANION_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Small files that belong to a checkpoint: configuration, tokenizer, chat template. Code (`.py`) is
not among them: nothing that a checkpoint brings is executed."""
OF_OTHER_WEIGHTS = re.compile(r".*\.index\.json|adapter_config\.json")
"""Speaks of weights that are not read here: with peft installed, transformers would look for those of an
adapter in every child."""

FIRST_READ = 1 << 16
"""Bytes read at once from the start of a weight file: most headers come whole with it."""

FINGERPRINT_BLOCKS = 16
FINGERPRINT_BLOCK_BYTES = 1 << 16
FINGERPRINT_TENSORS = 256
FINGERPRINT_TENSOR_BYTES = 256
READ_THREADS = 16


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file of a checkpoint."""

    name: str
    size: int
    header: Header
    version: str | None = None
    """What the store calls these very bytes; None if they are yet to be written."""


class Stored(Protocol):
    """A checkpoint, or the layout of one that is yet to be written."""

    @property
    def location(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> dict[str, TensorEntry]: ...
    @property
    def weight_files(self) -> tuple[WeightFile, ...]: ...
    @property
    def adapter(self) -> Adapter | None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A model in a store, known by its headers and small files alone."""

    store: Store
    config: dict[str, Any]
    weight_files: tuple[WeightFile, ...]
    companions: tuple[str, ...]
    """Names of the small files that travel with the weights, `config.json` among them."""
    adapter: Adapter | None = None
    """What is added to the stored weights when they are read; layout and files are the base's."""

    @property
    def location(self) -> str:
        return f"{self.store.uri}+{self.adapter.location}" if self.adapter else self.store.uri

    @property
    def place(self) -> str:
        """Where its own files lie."""
        return self.store.uri

    @property
    def folder(self) -> Path | None:
        """The checkpoint as a folder of this machine; None if it is remote (see `localize`)."""
        path = self.store.local_path("config.json")
        return path.parent if path is not None else None

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every stored tensor by name, in the order of the files and of the bytes in them."""
        return {entry.name: entry for file in self.weight_files for entry in file.header.entries}

    @cached_property
    def file_of(self) -> dict[str, str]:
        """The weight file that holds each tensor."""
        return {
            entry.name: file.name for file in self.weight_files for entry in file.header.entries
        }

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.stop - entry.start for entry in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """What tells this checkpoint from another, wherever it lies: 64 hexadecimal digits.

        SHA-256 over the companion files, and for each weight file over header, size, 16 evenly spaced
        blocks of 64 KiB, and the beginning of up to 256 of its tensors. No proof of equality (a change
        between the samples escapes it), but cheap at any size, and training changes every tensor.
        An adapter's configuration and weights go in the same way.
        """
        digest = hashlib.sha256()
        for name in self.companions:
            _digest_part(digest, name.encode(), self.store.read(name))
        for file in self.weight_files:
            _digest_part(digest, file.name.encode(), file.header.raw, str(file.size).encode())
            for sample in self._read_samples(file):
                _digest_part(digest, sample)
        if self.adapter is not None:
            _digest_part(digest, b"adapter", self.adapter.weights.fingerprint.encode())
        return digest.hexdigest()

    def _read_samples(self, file: WeightFile) -> Iterator[bytes]:
        def read(sample: tuple[int, int]) -> bytes:
            start, length = sample
            buffer = bytearray(length)
            self.store.read_into(file.name, start, memoryview(buffer))
            return bytes(buffer)

        with ThreadPoolExecutor(READ_THREADS) as threads:
            yield from threads.map(read, _fingerprint_samples(file))

    def read_json(self, name: str) -> Any:
        """A companion file parsed, or None if the checkpoint has no such file."""
        return read_json(self.store, name) if name in self.companions else None


def open_folder(location: str) -> Checkpoint:
    """Open the checkpoint whose files lie at `location`; see `open_checkpoint`.

    Reads headers, index and `config.json`, no tensor. Raises `BadInputError` naming the file, and the
    tensor where there is one, for anything that is missing, damaged or contradictory.
    """
    return open_files(find_store(location))


def open_files(store: Store) -> Checkpoint:
    """Open the checkpoint that `store` holds; see `open_folder`."""
    found = {info.key: info for info in store.list_objects() if "/" not in info.key}
    if not found:
        raise BadInputError(f"{store.uri}: no checkpoint here: the folder is empty or not there")
    if "config.json" not in found:
        raise BadInputError(f"{store.uri}: no config.json: not a Hugging Face checkpoint")
    weight_map = _weight_map(store, found)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
    for name in names:
        if name not in found:
            raise BadInputError(f"{store.uri}/{name}: missing, though {INDEX_FILE} names it")
    with ThreadPoolExecutor(READ_THREADS) as threads:
        files = tuple(threads.map(lambda name: open_weight_file(store, found[name]), names))
    _check_names(store, files, weight_map)
    config = read_json(store, "config.json")
    if not isinstance(config, dict):
        raise BadInputError(f"{store.uri}/config.json: not a JSON object")
    companions = tuple(
        sorted(
            name
            for name in found
            if name.endswith(COMPANION_SUFFIXES) and not OF_OTHER_WEIGHTS.fullmatch(name)
        )
    )
    return Checkpoint(store, config, files, companions)


def _weight_map(store: Store, found: dict[str, ObjectInfo]) -> dict[str, str] | None:
    """Tensor name -> file name of the index; None for a checkpoint of a single file."""
    if INDEX_FILE not in found:
        if SINGLE_FILE not in found:
            raise BadInputError(
                f"{store.uri}: neither {SINGLE_FILE} nor {INDEX_FILE}: convert the checkpoint to "
                "safetensors first"
            )
        return None
    if SINGLE_FILE in found:
        raise BadInputError(
            f"{store.uri}: has both {SINGLE_FILE} and {INDEX_FILE}; remove the stale one"
        )
    index = read_json(store, INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(f"{store.uri}/{INDEX_FILE}: no weight_map in it")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or file.startswith("."):
            raise BadInputError(
                f"{store.uri}/{INDEX_FILE}: tensor {tensor!r} points to {file!r}, which is not the "
                "plain name of a file in this folder"
            )
    return weight_map


def open_weight_file(store: Store, info: ObjectInfo) -> WeightFile:
    """A safetensors file by its header. Raises `BadInputError` if that is damaged."""
    name, size = info.key, info.size
    file = f"{store.uri}/{name}"
    raw = bytearray(min(size, FIRST_READ))
    store.read_into(name, 0, memoryview(raw), info.version)
    total = LENGTH_BYTES + header_length(bytes(raw), file, size)
    if total > len(raw):
        rest = bytearray(total - len(raw))
        store.read_into(name, len(raw), memoryview(rest), info.version)
        raw += rest
    return WeightFile(name, size, parse_header(bytes(raw[:total]), file, size), info.version)


def _check_names(
    store: Store, files: tuple[WeightFile, ...], weight_map: dict[str, str] | None
) -> None:
    """Each tensor lies in exactly one file, the one that the index names."""
    found: dict[str, str] = {}
    for file in files:
        for entry in file.header.entries:
            if entry.name in found:
                raise BadInputError(
                    f"{store.uri}: tensor {entry.name!r} is in {found[entry.name]} and in {file.name}"
                )
            found[entry.name] = file.name
    if weight_map is None:
        if not found:
            raise BadInputError(f"{store.uri}/{SINGLE_FILE}: there is no tensor in it")
        return
    for tensor, name in weight_map.items():
        if found.get(tensor) != name:
            raise BadInputError(
                f"{store.uri}/{name}: tensor {tensor!r} is missing, though {INDEX_FILE} puts it here"
            )
    for tensor, name in found.items():
        if tensor not in weight_map:
            raise BadInputError(
                f"{store.uri}/{name}: tensor {tensor!r} is not in {INDEX_FILE}; rebuild the index"
            )


def read_json(store: Store, name: str) -> Any:
    """A file parsed as JSON. Raises `BadInputError` if it is missing or malformed."""
    try:
        return json.loads(store.read(name))
    except ObjectNotFoundError as error:
        raise BadInputError(f"{store.uri}/{name}: missing") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{store.uri}/{name}: not valid JSON ({error})") from error


def _fingerprint_samples(file: WeightFile) -> list[tuple[int, int]]:
    """(start, length) of the parts of a weight file whose bytes go into the fingerprint."""
    start = len(file.header.raw)
    span = file.size - start
    if span <= FINGERPRINT_BLOCKS * FINGERPRINT_BLOCK_BYTES:
        return [(start, span)]
    step = (span - FINGERPRINT_BLOCK_BYTES) // (FINGERPRINT_BLOCKS - 1)
    blocks = [
        (start + number * step, FINGERPRINT_BLOCK_BYTES) for number in range(FINGERPRINT_BLOCKS)
    ]
    entries = file.header.entries
    chosen = entries[:: -(-len(entries) // FINGERPRINT_TENSORS)]
    return blocks + [
        (entry.start, min(FINGERPRINT_TENSOR_BYTES, entry.stop - entry.start)) for entry in chosen
    ]


def _digest_part(digest: Any, *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
