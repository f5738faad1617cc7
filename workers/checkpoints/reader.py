"""Read any byte range of any tensor: memory-mapped where the file is local, ranged reads elsewhere."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path

from workers.checkpoints.adapter import WEIGHTS_FILE, open_adapter
from workers.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, open_folder
from workers.storage import StorageError
from workers.storage.files import check_unchanged, read_errors

COPY_BYTES = 32 << 20

LOOK_SECONDS = 0.01
"""How long a mapped file is trusted to be unchanged."""


class CheckpointReader:
    """Tensor bytes of one checkpoint, as it was when it was opened. Safe to be read by many threads.

    Local files are mapped once, on first use. Raises `StorageError` if a file has changed since.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._versions = {file.name: file.version for file in checkpoint.weight_files}
        self._maps: dict[str, _MappedFile | None] = {}

    def read(self, tensor: str, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of a stored tensor.

        A view of the mapped file (no copy) or a new buffer. The mapping is private: writing into it
        would not reach the file.
        """
        entry = self.checkpoint.tensors[tensor]
        if not 0 <= start <= stop <= entry.stop - entry.start:
            raise ValueError(f"bytes {start}..{stop} are not inside tensor {tensor!r}")
        file = self.checkpoint.file_of[tensor]
        mapped = self._map(file)
        if mapped is not None:
            return mapped.view(entry.start + start, entry.start + stop)
        buffer = memoryview(bytearray(stop - start))
        self.checkpoint.store.read_into(file, entry.start + start, buffer, self._versions[file])
        return buffer

    def _map(self, file: str) -> _MappedFile | None:
        if file not in self._maps:
            path = self.checkpoint.store.local_path(file)
            mapped = None if path is None else _MappedFile(str(path), self._versions[file])
            self._maps[file] = mapped
        return self._maps[file]


class _MappedFile:
    """A file in memory, looked at now and then: one that was cut would end the process when touched."""

    def __init__(self, path: str, version: str | None) -> None:
        self._path, self._version = path, version
        with read_errors(path):
            self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._look()
        self._bytes = memoryview(mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY))

    def view(self, start: int, stop: int) -> memoryview:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
        return self._bytes[start:stop]

    def _look(self) -> None:
        if self._version is not None:
            check_unchanged(self._file, self._path, self._version)
        self._looked = time.monotonic()


def localize(checkpoint: Checkpoint, cache: Path | None = None) -> Checkpoint:
    """The same checkpoint on this machine's disk: itself if local, else a cached copy.

    Copies are kept under `DARWIN_CACHE` (default `~/.cache/darwin`) by fingerprint, so that all workers
    of a node share one and it outlives them. A copy appears whole, by a rename.
    """
    if cache is None:
        cache = Path(os.environ.get("DARWIN_CACHE") or Path.home() / ".cache" / "darwin")
    if checkpoint.adapter is not None:
        base = localize(replace(checkpoint, adapter=None), cache)
        if checkpoint.adapter.weights.folder is not None:
            return replace(base, adapter=checkpoint.adapter)
        return replace(base, adapter=open_adapter(_local_copy(checkpoint.adapter.weights, cache)))
    return (
        checkpoint if checkpoint.folder is not None else open_folder(_local_copy(checkpoint, cache))
    )


def _local_copy(checkpoint: Checkpoint, cache: Path) -> str:
    target = cache / checkpoint.fingerprint
    try:
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _put_copy(checkpoint, target)
    except StorageError:
        raise  # an OSError too, but of the store that is read, not of this disk
    except OSError as error:
        # Of this machine, and no fault of the input: other machines may have room.
        raise StorageError(
            f"{checkpoint.location}: cannot keep a local copy in {cache} ({error}); make room "
            "there, or point DARWIN_CACHE to a larger disk"
        ) from error
    return str(target)


def _put_copy(checkpoint: Checkpoint, target: Path) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        _copy_files(checkpoint, partial)
        partial.rename(target)
    except OSError:
        # Another worker of this node may have put the same copy there first.
        if not target.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_files(checkpoint: Checkpoint, folder: Path) -> None:
    buffer = memoryview(bytearray(COPY_BYTES))
    for file in checkpoint.weight_files:
        with (folder / file.name).open("wb") as opened:
            for start in range(0, file.size, COPY_BYTES):
                part = buffer[: min(COPY_BYTES, file.size - start)]
                checkpoint.store.read_into(file.name, start, part, file.version)
                opened.write(part)
    names = list(checkpoint.companions)
    single = checkpoint.weight_files[0].name in (SINGLE_FILE, WEIGHTS_FILE)
    if len(checkpoint.weight_files) > 1 or not single:
        names.append(INDEX_FILE)
    for name in names:
        (folder / name).write_bytes(checkpoint.store.read(name))
