"""Write a child in its father's layout, published in an order that no reader can catch half done."""

from __future__ import annotations

from workers.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from workers.checkpoints.safetensors_format import TensorEntry
from workers.storage import Bytes, PreconditionFailedError, StorageError, Store, Upload


class CheckpointWriter:
    """Streams a child with exactly the father's files, names, dtypes and byte order.

    Headers are the father's own bytes, so layout (shard names, fused or per-expert, tied weights,
    metadata) is preserved by construction. Files appear whole and only if there is none under their
    name yet; index and `config.json`, without which the folder is no checkpoint, come last.
    """

    def __init__(self, father: Checkpoint, target: Store) -> None:
        self.father = father
        self.target = target
        self._file_of = father.file_of
        self._files = {file.name: file for file in father.weight_files}
        self._expected = iter(father.tensors.values())
        self._current: TensorEntry | None = None
        self._written = 0
        self._upload: Upload | None = None
        self._upload_file = ""

    def write(self, tensor: str, data: Bytes) -> None:
        """Append bytes of `tensor`; tensors come in the father's order, each one whole."""
        if self._current is None:
            self._begin(tensor)
        assert self._current is not None and self._current.name == tensor, tensor
        assert self._upload is not None
        size = memoryview(data).nbytes
        self._upload.write(data)
        self._written += size
        length = self._current.stop - self._current.start
        assert self._written <= length, f"{tensor}: more bytes than the father's {length}"
        if self._written == length:
            self._current = None

    def _begin(self, tensor: str) -> None:
        entry = next(self._expected, None)
        assert entry is not None and entry.name == tensor, f"{tensor} is out of order"
        file = self._file_of[tensor]
        if file != self._upload_file:
            self._commit()
            self._upload = self.target.open_upload(file)
            self._upload_file = file
            self._upload.write(self._files[file].header.raw)
        self._current, self._written = entry, 0

    def _commit(self) -> None:
        if self._upload is None:
            return
        upload, self._upload = self._upload, None
        try:
            upload.commit()
        except PreconditionFailedError:
            # The target folder belongs to one recipe, whose bytes are always the same: an earlier try
            # of this merge got this far. Anything else of that name is not ours to replace.
            size = self._files[self._upload_file].size
            found = self.target.info(self._upload_file).size
            if found != size:
                raise StorageError(
                    f"{self.target.uri}/{self._upload_file}: a file of {found} bytes is in the way of "
                    f"one of {size}; remove the folder or choose another"
                ) from None

    def finish(self) -> None:
        """Commit the last weight file; every tensor of the father must have been written."""
        assert self._current is None and next(self._expected, None) is None, "tensors are missing"
        self._commit()

    def abort(self) -> None:
        """Drop the file being written. What is there stays no checkpoint, having no config."""
        if self._upload is not None:
            self._upload.abort()
            self._upload = None


def publish_companions(father: Checkpoint, target: Store, files: dict[str, bytes]) -> None:
    """Make finished weights a checkpoint: the father's small files, `files` over them, config last.

    A copy of a father's file that is there already must be the same, else `StorageError`; `files`
    (card, lineage) take the place of older ones, when a campaign went on and chose the same child.
    """
    assert "config.json" not in files, "config.json is the father's, and comes last"
    copies = {name: father.store.read(name) for name in father.companions if name not in files}
    if [file.name for file in father.weight_files] != [SINGLE_FILE]:
        copies[INDEX_FILE] = father.store.read(INDEX_FILE)
    last = [name for name in (INDEX_FILE, "config.json") if name in copies]
    for name, data in files.items():
        _create_or_update(target, name, data)
    for name in [name for name in copies if name not in last] + last:
        try:
            target.create(name, copies[name])
        except PreconditionFailedError:
            if target.read(name) != copies[name]:
                raise StorageError(
                    f"{target.uri}/{name}: another file of that name is in the way; remove the "
                    "folder or choose another"
                ) from None


def _create_or_update(target: Store, name: str, data: bytes) -> None:
    try:
        target.create(name, data)
    except PreconditionFailedError:
        present, version = target.read_with_version(name)
        if present != data:
            target.replace(name, data, version)
