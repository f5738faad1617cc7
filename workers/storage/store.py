"""The store interface: the few operations on bytes that everything above is built from.

A store is a folder-like space of objects under one location. Keys are relative paths with `/`
between their parts; a key that could leave the location is refused (`check_key`).

Three promises make the rest of Darwin safe, and `workers.storage.conformance` tests them:

* an object appears whole or not at all: a reader never sees half a write, nor parts of an object;
* `create` and `replace` are atomic between any number of writers on any number of machines;
* a read returns exactly the bytes asked for, or raises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from workers.errors import BadInputError

Bytes = bytes | bytearray | memoryview

LEAST_PART_BYTES = 5 * 2**20
"""Each part of an object but its last has at least so many bytes: S3's limit."""
MOST_PARTS = 10_000
"""An object has at most so many parts: S3's limit."""


class StorageError(OSError):
    """A store failed, and kept failing through the bounded retries."""


class ObjectNotFoundError(StorageError):
    """There is no object under this key."""


class PreconditionFailedError(StorageError):
    """A conditional write lost: the object exists already, or is not the version that was named."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object's key, its size in bytes, and an opaque version that changes with its bytes.

    Writing the very same bytes again may keep the version (on S3 it is a hash of them), so records
    that writers swap must differ: give each the name of its writer and a number.
    """

    key: str
    size: int
    version: str


class Store(ABC):
    """Objects under one location. Instances are safe to share between threads."""

    uri: str
    """The location, without a trailing slash, as `open_store` takes it on any machine: a plain
    absolute path, `s3://bucket/prefix`, `shipped:NAME` or `hf://org/name@COMMIT`."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. Raises `ObjectNotFoundError`."""

    @abstractmethod
    def read_with_version(self, key: str) -> tuple[bytes, str]:
        """The whole object and the version that these very bytes have."""

    @abstractmethod
    def read_into(
        self, key: str, start: int, buffer: memoryview, version: str | None = None
    ) -> None:
        """Fill `buffer` with the bytes from `start` on; fewer bytes than that is an error.

        With a `version`, bytes of any other version are an error (`StorageError`) too.
        """

    @abstractmethod
    def info(self, key: str) -> ObjectInfo:
        """Size and version without reading. Raises `ObjectNotFoundError`."""

    @abstractmethod
    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The finished objects whose key starts with `prefix`, in the order of their keys."""

    def list_folders(self) -> Iterator[str]:
        """The first part of every key that has more than one, once each."""
        keys = (info.key.partition("/") for info in self.list_objects())
        yield from dict.fromkeys(folder for folder, slash, _ in keys if slash)

    @abstractmethod
    def write(self, key: str, data: Bytes) -> str:
        """Put the object, whatever was there. Returns its version."""

    @abstractmethod
    def create(self, key: str, data: Bytes) -> str:
        """Put the object only if there is none. Returns its version.

        Raises `PreconditionFailedError` if there is one, whoever wrote it: also this very call, when
        an earlier try of it went through, only the answer was lost, and the store cannot tell.
        """

    @abstractmethod
    def replace(self, key: str, data: Bytes, version: str) -> str:
        """Put the object only if it is still at `version` (compare and swap); its new version.

        Raises `PreconditionFailedError` if it changed or is gone, and also in the case that
        `create` describes.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is no error."""

    def delete_many(self, keys: Iterable[str]) -> None:
        """Remove the objects. All are tried in their order; a failure leaves the rest."""
        for key in keys:
            self.delete(key)

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Remove every object under `folder`, and where folders exist, the folder itself."""

    def forget(self, key: str) -> None:  # noqa: B027 - most stores keep nothing
        """A hint: what was read of the object will not be read again soon, so no cache need keep it."""

    @abstractmethod
    def begin_parts(self, key: str, size: int) -> str:
        """Start an object of exactly `size` bytes that is written in parts; the upload's id.

        Any process on any machine that opens this store can go on with the id. Nothing is visible
        under the key before `finish_parts`. Raises `StorageError` if there is no room.
        """

    @abstractmethod
    def write_part(self, key: str, upload_id: str, number: int, start: int, data: Bytes) -> str:
        """Write part `number`, whose first byte is the object's byte `start`; its receipt.

        Parts are numbered from 1 to `MOST_PARTS` in the order of their bytes, without overlap; each
        but the last has at least `LEAST_PART_BYTES` (the folder takes smaller ones). They may be
        written in any order, at once and by any number of writers, and again, which makes earlier
        receipts of the part void. What has a receipt survives the loss of the writer's machine.
        Raises `StorageError`, also if the upload was finished or discarded by another owner.
        """

    @abstractmethod
    def finish_parts(self, key: str, upload_id: str, receipts: dict[int, str]) -> None:
        """Publish the object, given the receipt of each part by its number.

        Raises `PreconditionFailedError` if the key exists already: nothing of the upload remains
        then. Raises `StorageError` if parts are missing, and the upload goes on; or if the upload
        was discarded by another owner. Finishing once more what is finished is no error where the
        store can tell that the object is this upload's (S3), else `PreconditionFailedError`.
        """

    @abstractmethod
    def abandon_parts(self, key: str, upload_id: str) -> None:
        """Drop the upload and its parts. Never raises."""

    @abstractmethod
    def parts_exist(self, key: str, upload_id: str) -> bool:
        """Whether the upload was neither finished nor dropped: its parts can be gone on with."""

    @abstractmethod
    def discard_unfinished(self, prefix: str) -> int:
        """Abort every unfinished upload under `prefix`, whoever started it; how many there were.

        This is how a new owner both cleans up after a killed writer and fences one that still runs.
        """

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Where the object lies as a file on this machine, to be memory-mapped; None if remote."""

    @abstractmethod
    def substore(self, prefix: str) -> Store:
        """The same store seen from the folder `prefix`."""


def check_key(key: str) -> str:
    """`key` itself, if it names something inside the store; else `BadInputError`."""
    parts = key.split("/")
    if "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise BadInputError(
            f"storage key {key!r} is not a plain relative path: use names joined by '/', "
            "without '..', empty parts or backslashes"
        )
    return key


def check_prefix(prefix: str) -> str:
    """`prefix` itself, if keys can start with it; else `BadInputError`.

    It need not end at a `/`: its last part may be empty or the first letters of a name.
    """
    folder, _, start = prefix.rpartition("/")
    if folder:
        check_key(folder)
    elif prefix.startswith("/"):
        check_key(prefix)
    if start:
        check_key(f"{start}_")
    return prefix
