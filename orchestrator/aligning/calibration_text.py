"""Calibration texts: what a model reads so that its activations can be looked at."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from orchestrator.texts import numbered_lines, split_texts
from workers.errors import BadInputError


@dataclass(frozen=True)
class Calibration:
    """Texts, and the hash of the file that they came from."""

    texts: tuple[str, ...]
    sha256: str


def read_calibration(file: str) -> Calibration:
    """Texts of a file: `text` or `prompt` of each line of a `.jsonl`, else what blank lines part."""
    try:
        data = Path(file).read_bytes()
        content = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{file}: cannot be read as a calibration text ({error})") from error
    if file.endswith(".jsonl"):
        texts = [_text_of(file, number, line) for number, line in numbered_lines(content)]
    else:
        texts = split_texts(content)
    if not texts:
        raise BadInputError(f"{file}: no calibration text in it")
    return Calibration(tuple(texts), hashlib.sha256(data).hexdigest())


def _text_of(file: str, number: int, line: str) -> str:
    try:
        found = json.loads(line)
        text = found.get("text", found.get("prompt"))
    except (ValueError, AttributeError):
        text = None
    if not isinstance(text, str):
        raise BadInputError(f"{file}: line {number} is no JSON object with a `text` or a `prompt`")
    return text
