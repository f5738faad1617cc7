"""A store that is a folder of this machine, or of a file system that several machines mount."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from workers.errors import BadInputError
from workers.storage.files import (
    UNFINISHED_NAME,
    allocate,
    check_unchanged,
    check_version,
    is_own_name,
    is_stale,
    locked_folder,
    make_folder,
    open_unfinished,
    publish_new,
    read_errors,
    read_exactly,
    remove_file,
    rename_as_newer,
    stamp_and_sync,
    status_of,
    sync_folder,
    temporary_file,
    temporary_name,
    version_of,
    write_durably,
    write_errors,
)
from workers.storage.parts import check_part, check_whole, receipt_of
from workers.storage.store import (
    Bytes,
    ObjectInfo,
    ObjectNotFoundError,
    PreconditionFailedError,
    Store,
    check_key,
    check_prefix,
)
from workers.storage.traffic import TRAFFIC


class FolderStore(Store):
    """Objects as the files under the folder `root`, which need not exist yet.

    Files that were put there by other means are objects like any other. Links are followed while
    they stay inside the folder; those that leave it are refused, except into the `blobs` folder of
    a Hugging Face cache whose snapshot the store is in.
    """

    def __init__(self, root: str | os.PathLike[str], uri: str | None = None) -> None:
        """`uri`: the name that other machines know the folder by; None: its absolute path."""
        self._root = os.path.abspath(root)
        if os.path.isfile(self._root):
            raise BadInputError(f"{self._root} is a file: a store is the folder that holds it")
        self.uri = uri or self._root
        real_root = os.path.realpath(self._root)
        self._allowed = [real_root, *_hugging_face_blobs(real_root)]

    def read(self, key: str) -> bytes:
        return self.read_with_version(key)[0]

    def read_with_version(self, key: str) -> tuple[bytes, str]:
        path = self._path(key)
        with read_errors(path), open(path, "rb", buffering=0) as file:
            # A published file is never written to again: these bytes are of this version.
            data, version = file.read(), version_of(os.fstat(file.fileno()))
        TRAFFIC.count_read(len(data))
        return data, version

    def read_into(
        self, key: str, start: int, buffer: memoryview, version: str | None = None
    ) -> None:
        path = self._path(key)
        with read_errors(path), open(path, "rb", buffering=0) as file:
            check_unchanged(file.fileno(), path, version)
            read_exactly(file.fileno(), path, start, buffer.cast("B"))
            check_unchanged(file.fileno(), path, version)  # Files of others may be written to.
        TRAFFIC.count_read(buffer.nbytes)

    def info(self, key: str) -> ObjectInfo:
        status = status_of(self._path(key))
        return ObjectInfo(key, status.st_size, version_of(status))

    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for key in self._walk(prefix):
            if not is_own_name(os.path.basename(key)):
                # Files may vanish while one lists, and links that leave are not of this store.
                with suppress(ObjectNotFoundError, BadInputError):
                    yield self.info(key)

    def list_folders(self) -> Iterator[str]:
        try:
            with read_errors(self._root), os.scandir(self._root) as scan:
                names = sorted(entry.name for entry in scan if entry.is_dir(follow_symlinks=False))
        except ObjectNotFoundError:
            return
        for name in names:
            if next(self.list_objects(f"{name}/"), None) is not None:
                yield name

    def write(self, key: str, data: Bytes) -> str:
        return self._put(key, data)

    def create(self, key: str, data: Bytes) -> str:
        path = self._path(key)
        with write_errors(path), temporary_file(path, data) as temporary:
            version = version_of(os.stat(temporary))
            publish_new(temporary, path)
        TRAFFIC.count_written(memoryview(data).nbytes)
        return version

    def replace(self, key: str, data: Bytes, version: str) -> str:
        check_version(self._path(key), version)  # Most losers end here and cost the disk nothing.
        return self._put(key, data, version)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(ObjectNotFoundError):
            status_of(path)
            with read_errors(path), locked_folder(os.path.dirname(path)):
                os.unlink(path)
                sync_folder(os.path.dirname(path))

    def delete_many(self, keys: Iterable[str]) -> None:
        # One sync for all of a folder's: each takes as long as a hundred removals.
        folders: dict[str, list[str]] = {}
        for path in map(self._path, keys):
            folders.setdefault(os.path.dirname(path), []).append(path)
        for folder, paths in folders.items():
            with suppress(ObjectNotFoundError), read_errors(folder), locked_folder(folder):
                for path in paths:
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                sync_folder(folder)

    def delete_folder(self, folder: str) -> None:
        path = self._path(folder)
        with write_errors(path), suppress(FileNotFoundError):
            shutil.rmtree(path)
            sync_folder(os.path.dirname(path))

    def forget(self, key: str) -> None:
        path = self._path(key)
        with read_errors(path), open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def begin_parts(self, key: str, size: int) -> str:
        path = self._path(key)
        temporary = temporary_name(path, "upload")
        with write_errors(path):
            make_folder(os.path.dirname(path))
            allocate(path, temporary, size)
        return os.path.basename(temporary)

    def write_part(self, key: str, upload_id: str, number: int, start: int, data: Bytes) -> str:
        path, temporary = self._path(key), self._unfinished(key, upload_id)
        view = memoryview(data).cast("B")
        with write_errors(path), open_unfinished(temporary, path, fcntl.LOCK_SH) as file:
            check_part(path, number, start, len(view), os.fstat(file).st_size)
            if os.path.exists(path):  # Perhaps as this very file, and that must not change now.
                raise PreconditionFailedError(f"{path} exists already")
            write_durably(file, start, view)
        TRAFFIC.count_written(len(view))
        return receipt_of(start, len(view))

    def finish_parts(self, key: str, upload_id: str, receipts: dict[int, str]) -> None:
        path, temporary = self._path(key), self._unfinished(key, upload_id)
        with write_errors(path), open_unfinished(temporary, path, fcntl.LOCK_EX) as file:
            check_whole(path, receipts, os.fstat(file).st_size)
            stamp_and_sync(file)
            try:
                publish_new(temporary, path)
            except PreconditionFailedError:
                remove_file(temporary)
                raise
            remove_file(temporary)

    def abandon_parts(self, key: str, upload_id: str) -> None:
        with suppress(OSError, BadInputError):
            remove_file(self._unfinished(key, upload_id))

    def parts_exist(self, key: str, upload_id: str) -> bool:
        return os.path.exists(self._unfinished(key, upload_id))

    def discard_unfinished(self, prefix: str) -> int:
        uploads = 0
        for key in self._walk(prefix):
            folder, slash, name = key.rpartition("/")
            unfinished = UNFINISHED_NAME.fullmatch(name)
            if unfinished and f"{folder}{slash}{unfinished['name']}".startswith(prefix):
                path = os.path.join(self._root, key)
                with write_errors(path):
                    if unfinished["kind"] == "upload":
                        uploads += remove_file(path)
                    elif is_stale(path):
                        remove_file(path)
        return uploads

    def local_path(self, key: str) -> Path | None:
        return Path(self._path(key))

    def substore(self, prefix: str) -> FolderStore:
        prefix = prefix.removesuffix("/")
        return FolderStore(self._path(prefix), f"{self.uri.rstrip('/')}/{prefix}")

    def _path(self, key: str) -> str:
        """The file of `key`. Raises `BadInputError` where that is not an object of this store."""
        check_key(key)
        path = os.path.join(self._root, key)
        if is_own_name(os.path.basename(path)):
            raise BadInputError(
                f"storage key {key!r} ends in a name that the store keeps for itself: choose another"
            )
        if self._passes_link(key):
            real_path = os.path.realpath(path)
            if not any(_is_inside(real_path, folder) for folder in self._allowed):
                raise BadInputError(
                    f"{path} is or passes through a link that leaves the folder, to {real_path}: "
                    "put the file itself there, or name the folder it lies in as the location"
                )
        return path

    def _passes_link(self, key: str) -> bool:
        path = self._root
        for part in key.split("/"):
            path = os.path.join(path, part)
            if os.path.islink(path):
                return True
        return False

    def _unfinished(self, key: str, upload_id: str) -> str:
        """The file of an upload. Raises `BadInputError` if the id is of no upload of this key."""
        folder, name = os.path.split(self._path(key))
        unfinished = UNFINISHED_NAME.fullmatch(upload_id)
        if not unfinished or (unfinished["name"], unfinished["kind"]) != (name, "upload"):
            raise BadInputError(f"{self.uri}/{key}: {upload_id!r} is no upload of it")
        return os.path.join(folder, upload_id)

    def _put(self, key: str, data: Bytes, expected_version: str | None = None) -> str:
        """Write or, with an expected version, compare and swap."""
        path = self._path(key)
        folder = os.path.dirname(path)
        with write_errors(path), temporary_file(path, data) as temporary:
            with locked_folder(folder):
                if expected_version is not None:
                    check_version(path, expected_version)
                version = rename_as_newer(temporary, path)
            sync_folder(folder)
        TRAFFIC.count_written(memoryview(data).nbytes)
        return version

    def _walk(self, prefix: str) -> Iterator[str]:
        """The files whose key starts with `prefix`, ordered; and all of ours in their folders."""
        folder, slash, start = check_prefix(prefix).rpartition("/")
        yield from _walk_folder(self._root, folder + slash, start)


def _hugging_face_blobs(real_root: str) -> list[str]:
    """The folder that the files of a Hugging Face cache's snapshot are links into, if it is one.

    The layout is `models--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH`.
    """
    root = Path(real_root)
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            return [str(folder.parent.parent / "blobs")]
    return []


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _walk_folder(root: str, folder: str, start: str) -> Iterator[str]:
    path = os.path.join(root, folder)
    try:
        with read_errors(path), os.scandir(path) as scan:
            entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in scan]
    except ObjectNotFoundError:
        return
    # Whole keys are ordered, so a folder stands where its name with the slash does.
    for name in sorted(name + "/" * is_folder for name, is_folder in entries):
        if name.endswith("/"):
            if name.startswith(start):
                yield from _walk_folder(root, folder + name, "")
        elif name.startswith(start) or is_own_name(name):
            yield folder + name
