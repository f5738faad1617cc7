"""Files that appear whole or not at all, and survive a power loss.

Everything is written to a hidden temporary file beside its target, made durable (fsync), and only
then given its name, in one step: by a hard link where the name must be new, else by a rename. The
file system must support hard links and timestamps of nanoseconds (ext4, xfs, btrfs, tmpfs and NFS
do).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from workers.storage.store import (
    Bytes,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
)

LOCK_NAME = ".darwin-lock"
LOCK_WAIT_SECONDS = 60.0
STALE_PUT_SECONDS = 600.0
"""A `put` takes milliseconds: the temporary file of an older one was left by a killed writer."""

UNFINISHED_NAME = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.(?P<kind>upload|put)-unfinished")
"""Two kinds: an upload of NAME in parts, and the `put` of a small object in one call."""

ADVICE = {
    errno.ENOSPC: "make room on that disk, then begin again",
    errno.EDQUOT: "make room on that disk, then begin again",
    errno.EROFS: "choose another place, or make this one writable",
    errno.ENOTDIR: "a file is in the way of a folder: choose another place",
    errno.EACCES: "check who may read and write there",
}
"""What to do about what the operating system says."""


def is_own_name(name: str) -> bool:
    """Whether a file of this name is no object, but serves the writing of some."""
    return name == LOCK_NAME or UNFINISHED_NAME.fullmatch(name) is not None


def version_of(status: os.stat_result) -> str:
    """What differs between any two contents that a path has had."""
    # An inode number is used again soon after its file is gone; the time, which this module sets
    # from a clock of nanoseconds, tells the two apart. The kernel's own stamps tick in milliseconds.
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def status_of(path: str) -> os.stat_result:
    """Of a regular file; anything else is an `ObjectNotFoundError`."""
    with read_errors(path):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ObjectNotFoundError(f"{path} is not a file")
    return status


def check_version(path: str, expected: str) -> None:
    """Raises `PreconditionFailedError` unless the file is there and at this version."""
    try:
        version = version_of(status_of(path))
    except ObjectNotFoundError as error:
        raise PreconditionFailedError(f"{path} is gone: cannot replace {expected}") from error
    if version != expected:
        raise PreconditionFailedError(f"{path} was changed: is at {version}, not at {expected}")


def check_unchanged(file: int, path: str, version: str | None) -> None:
    """Raises `StorageError` unless the open file is at `version`, if one is given."""
    if version is not None and version_of(os.fstat(file)) != version:
        raise StorageError(
            f"{path} was changed since it was opened: begin again, and leave it alone meanwhile"
        )


def read_exactly(file: int, path: str, start: int, buffer: memoryview) -> None:
    """Fill `buffer` from the open `file`; `path` is for the message if that is too short."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], start + done)
        if count == 0:
            raise StorageError(
                f"{path}: wanted {len(buffer)} bytes from byte {start} on, got {done}: "
                "the file ends there; it is cut short, or its index belongs to another file"
            )
        done += count


def temporary_name(path: str, kind: str) -> str:
    """A new name beside `path` that `UNFINISHED_NAME` recognizes."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{secrets.token_hex(8)}.{kind}-unfinished")


@contextmanager
def temporary_file(path: str, data: Bytes) -> Iterator[str]:
    """A durable file with `data` beside `path`, for as long as the block runs."""
    make_folder(os.path.dirname(path))
    temporary = temporary_name(path, "put")
    try:
        with open(temporary, "xb", buffering=0) as file:
            view = memoryview(data).cast("B")
            while view:
                view = view[file.write(view) :]
            stamp_and_sync(file.fileno())
        yield temporary
    finally:
        remove_file(temporary)


def stamp_and_sync(file: int) -> None:
    """Make the open file's bytes durable, with the time that its version takes."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))
    os.fsync(file)


def allocate(path: str, temporary: str, size: int) -> None:
    """Make the temporary file of `path`, with room on the disk for all of its `size` bytes."""
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if size:
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        remove_file(temporary)
        reason = _with_advice(error)
        raise StorageError(f"{path}: cannot make room for its {size} bytes: {reason}") from error
    finally:
        os.close(file)


@contextmanager
def open_unfinished(temporary: str, path: str, lock: int) -> Iterator[int]:
    """The allocated file of `path`, under a lock: `LOCK_SH` to write parts, `LOCK_EX` to publish.

    The lock keeps a writer that was thought dead from changing the file after it was published.
    """
    try:
        file = os.open(temporary, os.O_RDWR)
    except FileNotFoundError as error:
        raise _gone(path) from error
    try:
        _wait_for_lock(file, lock, temporary)
        yield file
    finally:
        os.close(file)


def _gone(path: str) -> StorageError:
    if os.path.exists(path):
        return PreconditionFailedError(f"{path} exists already")
    return StorageError(
        f"{path}: the unfinished file was discarded before it was published: "
        "another owner has taken over, or its folder was deleted"
    )


def write_durably(file: int, start: int, data: memoryview) -> None:
    """Write at `start` of the open file, so that the bytes survive a power loss.

    They do not stay in the page cache: the memory is worth more to what is read.
    """
    view, position = data, start
    while view:
        count = os.pwrite(file, view, position)
        view, position = view[count:], position + count
    os.fdatasync(file)
    os.posix_fadvise(file, start, len(data), os.POSIX_FADV_DONTNEED)


def publish_new(temporary: str, path: str) -> None:
    """Give the complete temporary file its name, which must be new."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        # It is this very file if whoever published it was killed before removing the old name, or
        # if a network file system lost its answer.
        if not os.path.samefile(temporary, path):
            raise PreconditionFailedError(f"{path} exists already") from error
    except FileNotFoundError as error:
        raise _gone(path) from error
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP):
            raise
        raise StorageError(
            f"{path}: the file system refuses hard links ({error.strerror}): "
            "use a folder on one that has them (ext4, xfs, btrfs, NFS)"
        ) from error
    sync_folder(os.path.dirname(path))


def rename_as_newer(temporary: str, path: str) -> str:
    """Put the temporary file in the place of `path`, with a later time than that; its version.

    To be called under the folder's lock.
    """
    now = time.time_ns()
    with suppress(FileNotFoundError):
        now = max(now, os.stat(path).st_mtime_ns + 1)  # The clock may have been set back.
    os.utime(temporary, ns=(now, now))
    version = version_of(os.stat(temporary))
    os.rename(temporary, path)
    return version


@contextmanager
def locked_folder(folder: str) -> Iterator[None]:
    """Hold the lock of `folder` against all threads and processes that change objects in it."""
    lock = os.open(os.path.join(folder, LOCK_NAME), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _wait_for_lock(lock, fcntl.LOCK_EX, f"{folder}/{LOCK_NAME}")
        yield
    finally:
        os.close(lock)


def _wait_for_lock(file: int, lock: int, path: str) -> None:
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, lock | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            # Not waiting in the kernel: a holder that was stopped must not stop us for ever.
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{path} was held by another process for {LOCK_WAIT_SECONDS:.0f} s: "
                    "find the one that hangs (fuser names it)"
                ) from None
            time.sleep(0.0005)


def make_folder(folder: str) -> None:
    """Make `folder` and those above it, durably, where they are missing."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    make_folder(parent)
    with suppress(FileExistsError):
        os.mkdir(folder)
    sync_folder(parent)


def sync_folder(folder: str) -> None:
    """Make the names in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_stale(path: str) -> bool:
    """Whether a `put`'s temporary file is so old that its writer must be gone."""
    with suppress(FileNotFoundError):
        return time.time() - os.stat(path).st_mtime > STALE_PUT_SECONDS
    return False


def remove_file(path: str) -> bool:
    """Remove the file; whether it was there."""
    try:
        os.unlink(path)
        return True
    except FileNotFoundError:
        return False


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Like `write_errors`, for those to whom a missing file is a missing object."""
    with write_errors(path):
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ObjectNotFoundError(f"{path} does not exist") from error


@contextmanager
def write_errors(path: str) -> Iterator[None]:
    """Make what the operating system says about `path` a `StorageError` that names it."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: {_with_advice(error)}") from error


def _with_advice(error: OSError) -> str:
    advice = ADVICE.get(error.errno or 0)
    return f"{error.strerror or error}" + (f": {advice}" if advice else "")
