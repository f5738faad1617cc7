"""Rows of a source's splits: JSON Lines and Parquet files, wherever they lie, and data sets of the hub."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, Protocol

from workers.errors import BadInputError
from workers.evaluation.keys import Keys
from workers.storage import ObjectNotFoundError, open_store

Row = dict[str, Any]


class Rows(Protocol):
    """A source whose splits are tables."""

    origin: str
    """What the rows are of, for the record."""

    def read(self, split: str) -> Iterator[tuple[str, Row]]:
        """(where it stands, the row) of each row of a split, in order."""


class FileRows:
    """Files by split: `*.parquet`, or JSON Lines."""

    def __init__(self, task: str, files: Keys) -> None:
        self.task = task
        self.origin = "files"
        self._files = {split: _places(files, split) for split in files.data}

    def read(self, split: str) -> Iterator[tuple[str, Row]]:
        """See `Rows`. Raises `BadInputError` naming the task, the file and the line."""
        if split not in self._files:
            raise BadInputError(f"task {self.task}: source.files has no {split!r}")
        for location in self._files[split]:
            content = read_bytes(self.task, location)
            if location.endswith(".parquet"):
                yield from _parquet(self.task, location, content)
            else:
                yield from json_lines(self.task, location, content)


def _places(files: Keys, split: str) -> tuple[str, ...]:
    value = files.data[split]
    return files.texts(split) if isinstance(value, list) and value else (files.text(split),)


def read_bytes(task: str, location: str) -> bytes:
    """The content of a file, plain or in a bucket. Raises `BadInputError` naming task and file."""
    folder, slash, file = location.rpartition("/")
    try:
        return open_store(folder or slash or ".").read(file)
    except ObjectNotFoundError as error:
        raise BadInputError(f"task {task}: there is no item file {location}") from error
    except BadInputError as error:
        raise BadInputError(f"task {task}: item file {location}: {error}") from error


def json_lines(task: str, location: str, content: bytes) -> Iterator[tuple[str, Any]]:
    """(place, value) of every line that is not blank."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise BadInputError(f"task {task}: {location} is not UTF-8 text ({error})") from error
    # Not splitlines: it would also cut at separators that JSON texts may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{location} line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInputError(f"task {task}: {where}: not JSON ({error!r:.200})") from error


def _parquet(task: str, location: str, content: bytes) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInputError(f"task {task}: {location} is not a Parquet file ({error})") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{location} row {number}", row
