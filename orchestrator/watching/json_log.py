"""The structured log: one JSON object a line for each thing that happens to a campaign.

The records of the ledger are its source, without answers, genomes and configurations: those are in the
ledger, and a log goes to places that are not as well kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from workers.errors import BadInputError
from workers.secrecy import hide

if TYPE_CHECKING:
    from orchestrator.campaign import Campaign

MOST_TEXT = 2000
"""Characters of a text, an error for instance, that a line holds."""

NAMES = {"recipe": "candidate", "recipe_id": "candidate"}
"""What a field of a record is called in the log, if not the same."""

KEPT = frozenset({"used", "reserved", "holdout_fitness", "gates"})
"""Fields that are kept though they have fields themselves."""


class JsonLog:
    """A watcher. A context manager, which says how the campaign ended.

    Nothing that is wrong with the log ends a campaign: when it cannot be written any more, it is left alone.
    """

    def __init__(self, stream: TextIO, own: bool = False) -> None:
        self._stream = stream
        self._own = own
        self._common: dict[str, Any] = {}
        self._broken = False
        self._status = "failed"

    @classmethod
    def to_file(cls, path: str) -> JsonLog:
        """Lines are added to the file. Raises `BadInputError` if it cannot be opened."""
        try:
            return cls(open(path, "a", encoding="utf-8"), own=True)
        except OSError as error:
            raise BadInputError(f"--log {path}: cannot be written ({error.strerror})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._write("info", "ended", {"status": self._status})
        elif isinstance(error, KeyboardInterrupt):
            self._write("warning", "ended", {"status": "interrupted"})
        else:
            told = {
                "status": "failed",
                "error": hide(str(error)),
                "error_type": type(error).__name__,
            }
            self._write("error", "ended", told)
        if self._own:
            with suppress(OSError):  # what could not be written is written once more
                self._stream.close()

    def begin(self, campaign: Campaign) -> None:
        """See `Watcher`."""
        self._common = {"campaign": campaign.config.name, "store": campaign.store.uri}
        budget = campaign.config.search.evaluations
        self._write("info", "begun", {"parents": list(campaign.inputs.parents), "budget": budget})

    def stage(self, name: str) -> None:
        """See `Watcher`."""
        self._write("info", "stage", {"message": hide(name)})

    def notify(self, campaign: Campaign) -> None:
        """Nothing: `happened` has said it."""

    def happened(self, campaign: Campaign, event: Mapping[str, Any]) -> None:
        """See `Watcher`."""
        kind = event["kind"]
        fields = fields_of(event)
        for name, recipe in campaign.parent_recipes.items():
            if fields.get("candidate") == recipe.id:
                fields["parent"] = name
        if kind in ("scored", "failed"):
            fields["node"] = campaign.meter.node(event["worker"])
        if kind in ("finished", "rejected"):
            self._status = "done" if kind == "finished" else kind
        self._write(level_of(event), kind, fields)

    def _write(self, level: str, event: str, fields: Mapping[str, Any]) -> None:
        if self._broken:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": level, "event": event, **self._common, **fields}
        try:
            self._stream.write(f"{json.dumps(line)}\n")
            self._stream.flush()
        except (OSError, ValueError):  # a full disk, a reader that is gone
            self._broken = True


def fields_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """What a line says of a record, or of a worker's event."""
    fields: dict[str, Any] = {}
    for key, value in event.items():
        if key in ("kind", "time"):
            continue
        if isinstance(value, str):
            text = hide(value) if key == "error" else value
            fields[NAMES.get(key, key)] = text[:MOST_TEXT]
        elif key in KEPT or not isinstance(value, dict | list):
            fields[NAMES.get(key, key)] = value
    if event["kind"] == "scored":
        fields["items"] = sum(map(len, event["items"].values()))
    if event["kind"] == "asked":
        fields["candidates"] = [candidate["recipe"] for candidate in event["candidates"]]
    return fields


def level_of(event: Mapping[str, Any]) -> str:
    """How much it should worry whoever reads it."""
    if event["kind"] == "failed":
        return "error" if event["given_up"] else "warning"
    if event["kind"] == "rejected" or event.get("state") in ("replaced", "not started"):
        return "warning"
    return "info"
