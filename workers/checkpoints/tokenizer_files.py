"""The tokenizer and configuration files of a child whose vocabulary is not its father's."""

from __future__ import annotations

import json
import re
from typing import Any

from workers.checkpoints.checkpoint import Checkpoint
from workers.checkpoints.tokens import TOKENIZER_FILE, Token
from workers.errors import BadInputError

TOKENIZER_FILES = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|merges\.txt|vocab\.txt|chat_template\.jinja|.*\.(model|tiktoken)"
)
"""Names of the files that make a tokenizer."""

TOKEN_ID = re.compile(r".*_token_(id|ids|index)|(begin_)?suppress_tokens")
"""Keys of configurations whose values are token ids: one, or a list of them."""

NEEDED_EVERYWHERE = re.compile(r"(image|video|audio|vision|boi|eoi|boa|eoa)_.*")
"""Those that a model cannot do without: with another id it would take a word for a picture."""


def appended_files(
    father: Checkpoint, definition: dict[str, Any], appended: list[Token]
) -> dict[str, bytes]:
    """The father's tokenizer files with the new tokens behind its own."""
    # Without indentation: json writes that ten times faster, and there may be a million merges.
    whole = json.dumps(with_added(definition, appended), ensure_ascii=False)
    files = {TOKENIZER_FILE: whole.encode()}
    config = father.read_json("tokenizer_config.json")
    if isinstance(config, dict) and isinstance(config.get("added_tokens_decoder"), dict):
        more = {
            str(token.id): {"content": token.content} | (token.flags or {}) for token in appended
        }
        config["added_tokens_decoder"] = config["added_tokens_decoder"] | more
        files["tokenizer_config.json"] = json_bytes(config)
    added = father.read_json("added_tokens.json")
    if isinstance(added, dict):
        more_ids = {token.content: token.id for token in appended}
        files["added_tokens.json"] = json_bytes(added | more_ids)
    return files


def remapped_ids(
    config: dict[str, Any],
    new_ids: dict[int, int | None],
    defaults: dict[str, Any],
    where: str,
) -> dict[str, Any]:
    """A configuration with each token id replaced by that of the same token in another vocabulary.

    A token that is not there is replaced by what `defaults`, a flat configuration that speaks that
    vocabulary, has for the key; without one the value is None. Raises `BadInputError` where a model
    could not work without the token.
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            changed[key] = remapped_ids(value, new_ids, defaults, f"{where}: {key}")
        elif not TOKEN_ID.fullmatch(key) or value in (None, []):
            changed[key] = value
        else:
            ids = [
                new_ids.get(number) for number in (value if isinstance(value, list) else [value])
            ]
            kept = [number for number in ids if number is not None]
            fallback = defaults.get(key)
            if not kept and fallback is None and NEEDED_EVERYWHERE.fullmatch(key):
                raise BadInputError(
                    f"{where}: {key} is {value!r}, a token of the father that the chosen vocabulary "
                    "does not have: choose `vocabulary: union`, or the father's"
                )
            changed[key] = (kept if isinstance(value, list) else kept[0]) if kept else fallback
    return changed


def with_added(definition: dict[str, Any], appended: list[Token]) -> dict[str, Any]:
    added = [{"id": token.id, "content": token.content} | (token.flags or {}) for token in appended]
    return definition | {"added_tokens": [*(definition.get("added_tokens") or []), *added]}


def json_bytes(data: Any) -> bytes:
    return json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n"
