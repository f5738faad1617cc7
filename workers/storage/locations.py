"""Locations as users write them, and the stores that they name.

* a plain path, relative to the current folder; `~` is the home folder;
* `file:///absolute/path`, percent-encoded;
* `s3://bucket/prefix`;
* `shipped:NAME`: the folder NAME in `workers/families`, on whatever machine the package is on;
* `hf://org/name[@revision]`: a model of the Hugging Face hub (see `hub`), to be read only.

Where something is to be read (`find_store`), `org/name[@revision]` alone is a model of the hub too, if
there is neither a file or folder of that name here nor a folder `org`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

from workers.errors import BadInputError
from workers.storage.folder import FolderStore
from workers.storage.hub import HUB_SCHEME, is_hub_id, open_hub, pinned_location
from workers.storage.store import Store, check_key

SHIPPED_FOLDER = Path(__file__).resolve().parent.parent / "families"

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_HALF_A_SCHEME = re.compile(r"(s3|file|hf):(?!//)", re.IGNORECASE)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SUPPORTED = "a plain path, file:///path, s3://bucket/prefix, hf://org/name or shipped:NAME"


def open_store(location: str) -> Store:
    """The store at `location`, which need not exist yet (but for `shipped:` and `hf://`).

    Raises `BadInputError` if the location is none.
    """
    absolute = absolute_location(location)
    if absolute.startswith("s3://"):
        # boto3 takes half a second to import, and only those who use S3 should wait for it.
        from workers.storage.s3 import S3Store

        bucket, _, prefix = absolute.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix)
    if absolute.startswith("shipped:"):
        return FolderStore(SHIPPED_FOLDER / absolute.removeprefix("shipped:"), uri=absolute)
    if absolute.startswith(HUB_SCHEME):
        return open_hub(absolute)
    return FolderStore(absolute)


def find_store(location: str) -> Store:
    """The store at `location`, from which something is to be read."""
    return open_store(find_location(location))


def find_location(location: str) -> str:
    """`absolute_location` of a place to be read: an id that is no path here is the hub's."""
    if is_hub_id(location) and not os.path.lexists(location.split("/")[0]):
        location = f"{HUB_SCHEME}{location}"
    return absolute_location(location)


def absolute_location(location: str) -> str:
    """The same place, independent of the current folder, in the form of `Store.uri`.

    Raises `BadInputError` if `location` is none.
    """
    if not location or "\0" in location:
        raise BadInputError(f"location {location!r} names no place: give {_SUPPORTED}")
    if location.startswith("shipped:"):
        return _shipped(location)
    if _HALF_A_SCHEME.match(location):
        raise BadInputError(
            f"location {location!r}: two slashes must follow the colon "
            "(a file of such a name is written as ./NAME)"
        )
    scheme = _SCHEME.match(location)
    if scheme is None:
        return os.path.abspath(os.path.expanduser(location))
    rest = location[scheme.end() :]
    match scheme["scheme"].lower():
        case "file":
            return _file(location, rest)
        case "s3":
            return _s3(location, rest)
        case "hf":
            return pinned_location(f"{HUB_SCHEME}{rest}")
    raise BadInputError(
        f"location {location!r}: {scheme['scheme']}:// is not supported: give {_SUPPORTED}"
    )


def _file(location: str, rest: str) -> str:
    host, slash, path = rest.partition("/")
    if not slash or host not in ("", "localhost"):
        raise BadInputError(
            f"location {location!r}: {host!r} would be another machine: "
            "write file:///absolute/path, or a plain path"
        )
    decoded = os.fsdecode(unquote_to_bytes(path))
    if "\0" in decoded:
        raise BadInputError(f"location {location!r}: a path cannot hold a NUL byte")
    return os.path.abspath(f"/{decoded}")


def _s3(location: str, rest: str) -> str:
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise BadInputError(f"location {location!r}: {bucket!r} is no bucket: s3://bucket/prefix")
    prefix = prefix.removesuffix("/")
    return f"s3://{bucket}/{check_key(prefix)}" if prefix else f"s3://{bucket}"


def _shipped(location: str) -> str:
    name = location.removeprefix("shipped:").removesuffix("/")
    folder = (SHIPPED_FOLDER / check_key(name)).resolve()
    if not folder.is_dir() or not folder.is_relative_to(SHIPPED_FOLDER.resolve()):
        raise BadInputError(
            f"location {location!r}: nothing of this name comes with the package; "
            f"there is: {', '.join(_shipped_names()) or 'nothing'}"
        )
    return f"shipped:{name}"


def _shipped_names() -> list[str]:
    folders = {
        file.parent.relative_to(SHIPPED_FOLDER).as_posix()
        for file in SHIPPED_FOLDER.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    return sorted(f"shipped:{folder}" for folder in folders if folder != ".")
