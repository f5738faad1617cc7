"""Calibration sets: the prompts of a probe, in pairs.

A set is a JSONL file, one object a line: `{"id": ..., "conditioned": ..., "generic": ...}`. The
conditioned prompt asks for the capability that the set is named after; the generic one has about its
length, form and end, and asks for nothing of the kind.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import BadInputError

KEYS = ("id", "conditioned", "generic")


@dataclass(frozen=True, slots=True)
class PromptPair:
    """A prompt that asks for the capability, and its neutral counterpart."""

    id: str
    conditioned: str
    generic: str


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """The prompts for one capability."""

    name: str
    pairs: tuple[PromptPair, ...]
    sha256: str
    """Of the file that it was read from."""

    @property
    def summary(self) -> dict[str, Any]:
        """What a scan's result says of the set; `prompts` counts pairs."""
        return {"prompts": len(self.pairs), "sha256": self.sha256}


def read_calibration_set(file: Path, called: str | None = None) -> CalibrationSet:
    """The set of a JSONL file, named after it. Empty lines are passed over.

    `called` is what messages call the file. Raises `BadInputError` naming file and line.
    """
    called = called or str(file)
    try:
        content = file.read_bytes()
        lines = content.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{called}: not readable as UTF-8 text ({error})") from error
    pairs: list[PromptPair] = []
    first_use: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        pair = _parse(line, f"{called}, line {number}")
        if pair.id in first_use:
            raise BadInputError(
                f"{called}, line {number}: the id {pair.id!r} is that of line {first_use[pair.id]} too"
            )
        first_use[pair.id] = number
        pairs.append(pair)
    if not pairs:
        raise BadInputError(f"{called}: no prompts in it")
    return CalibrationSet(file.stem, tuple(pairs), hashlib.sha256(content).hexdigest())


def _parse(line: str, where: str) -> PromptPair:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise BadInputError(f"{where}: not a JSON object")
    for key in KEYS:
        if key not in data:
            raise BadInputError(f"{where}: the key {key!r} is missing")
        if not isinstance(data[key], str) or not data[key].strip():
            raise BadInputError(f"{where}: {key} must be a text that is not empty")
    for key in data:
        if key not in KEYS:
            raise BadInputError(f"{where}: unknown key {key!r}; a prompt has {', '.join(KEYS)}")
    return PromptPair(data["id"], data["conditioned"], data["generic"])
