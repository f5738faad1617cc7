"""What a mergekit file says about the child's tokens: whose vocabulary, and the chat template."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from workers.checkpoints import Checkpoint
from workers.errors import BadInputError
from workers.storage import ObjectNotFoundError

TEMPLATE_FILE = "chat_template.jinja"
SHORTEST_TEMPLATE = 20
"""mergekit takes a shorter text for the misspelt name of a template."""


def vocabulary_source(data: dict[Any, Any]) -> Any:
    """ "union", "base", a model, or None if it is left to the father. Raises `BadInputError`."""
    source, block = data.get("tokenizer_source"), data.get("tokenizer")
    if block is None:
        return source
    if source is not None:
        raise BadInputError("tokenizer: tokenizer_source is given, too: leave out one of them")
    if not isinstance(block, dict):
        raise BadInputError(f"tokenizer: {block!r} is not a table with a source")
    for key, value in block.items():
        if key == "source":
            continue
        if key == "tokens" and isinstance(value, dict):
            for token in value:
                raise BadInputError(
                    f"tokenizer.tokens.{token}: embeddings chosen token by token are not supported"
                )
        elif value is not None or key not in ("tokens", "pad_to_multiple_of"):
            raise BadInputError(f"tokenizer.{key}: is not supported")
    return "union" if block.get("source") is None else block["source"]


def chat_template(given: Any, models: list[Checkpoint]) -> str | None:
    """The template's text; None leaves the father's.

    "auto" is the one that most of `models` have, the first of them in a tie. mergekit's own names of
    templates (chatml, llama3, ...) are not known here.
    """
    if given is None:
        return None
    if not isinstance(given, str):
        raise BadInputError(f"chat_template: {given!r} is not a text")
    if given == "auto":
        found = Counter(filter(None, map(_template_of, models))).most_common(1)
        return found[0][0] if found else None
    if "{" not in given or len(given) < SHORTEST_TEMPLATE:
        raise BadInputError(
            f"chat_template: {given!r} is neither auto nor a template's text; names of templates are "
            "not supported: give the text itself"
        )
    return given


def _template_of(model: Checkpoint) -> str | None:
    try:
        return model.store.read(TEMPLATE_FILE).decode().strip()
    except ObjectNotFoundError:
        pass
    except UnicodeDecodeError as error:
        raise BadInputError(f"{model.location}/{TEMPLATE_FILE}: not UTF-8") from error
    try:
        config = json.loads(model.store.read("tokenizer_config.json"))
    except (ObjectNotFoundError, ValueError, RecursionError):
        return None
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):
        named = {
            part.get("name"): part.get("template") for part in template if isinstance(part, dict)
        }
        template = named.get("default")
    return template.strip() if isinstance(template, str) else None
