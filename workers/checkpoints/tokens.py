"""A checkpoint's tokens as `tokenizer.json` lists them, and what each of them stands for.

Two tokenizers may spell one text differently (`Ġhello` of byte-level BPE, `▁hello` of SentencePiece),
and one spelling may stand for different texts. So tokens of different tokenizers are compared by the
bytes of the text that they stand for, never by id, and by their spelling only where both spell alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workers.checkpoints.checkpoint import Checkpoint
from workers.errors import BadInputError

TOKENIZER_FILE = "tokenizer.json"
OLDER_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

MOST_TOKENS = 1 << 24
"""An id from here on is taken for damage: the largest vocabularies have less than 2^19 tokens."""

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, slots=True)
class Token:
    """One entry of a vocabulary."""

    id: int
    content: str
    """As tokenizer.json spells it."""
    text: bytes
    """What it stands for, in UTF-8; a byte-level token may be a part of a character."""
    flags: dict[str, bool] | None = None
    """How an added token is matched (`special`, `lstrip`, ...); None for one of the model's own."""
    fragment: str | None = None
    """Why the token is no text that could be looked for anywhere in another text; None if it is."""


@dataclass(frozen=True)
class Tokens:
    """The vocabulary of one checkpoint, in the order of the ids."""

    location: str
    entries: tuple[Token, ...]
    definition: dict[str, Any]
    """The parsed tokenizer.json."""

    @property
    def by_id(self) -> dict[int, Token]:
        return {token.id: token for token in self.entries}


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def has_tokens(checkpoint: Checkpoint) -> bool:
    """Whether there is a tokenizer.json."""
    return TOKENIZER_FILE in checkpoint.companions


def read_tokens(checkpoint: Checkpoint) -> Tokens:
    """The tokens of a checkpoint: the model's own and the added ones.

    Raises `BadInputError` if there is no tokenizer.json, or it is not what tokenizers writes.
    """
    where = f"{checkpoint.location}/{TOKENIZER_FILE}"
    data = checkpoint.read_json(TOKENIZER_FILE)
    if data is None:
        older = [name for name in OLDER_TOKENIZER_FILES if name in checkpoint.companions]
        found = f"only {older[0]}" if older else "no tokenizer at all"
        raise BadInputError(
            f"{where}: missing ({found}): tokens can be compared only by this file; write it with "
            "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        tokens = _model_tokens(data)
        for added in data.get("added_tokens") or []:
            content, flags = added["content"], {name: bool(added.get(name)) for name in FLAGS}
            tokens[added["id"]] = Token(
                added["id"], content, content.encode("utf-8", "surrogatepass"), flags
            )
        if not all(type(number) is int and 0 <= number < MOST_TOKENS for number in tokens):
            raise TypeError("a token's id is no small whole number")
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{where}: not of the form that tokenizers write ({error!r})"
        ) from error
    return Tokens(checkpoint.location, tuple(tokens[number] for number in sorted(tokens)), data)


def _model_tokens(data: Any) -> dict[int, Token]:
    model = data.get("model") or {}
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        numbered = vocabulary.items()
    elif isinstance(vocabulary, list):
        numbered = ((entry[0], number) for number, entry in enumerate(vocabulary))  # type: ignore[assignment]
    elif vocabulary is None:
        return {}
    else:
        raise TypeError("the vocabulary is neither an object nor a list")
    text_of, fragment_of = _spelling(data), _fragments(model)
    return {
        number: Token(number, content, text_of(content), None, fragment_of(content))
        for content, number in numbered
    }


def _spelling(data: dict[str, Any]) -> Callable[[str], bytes]:
    """How the tokenizer's own tokens are read as text."""
    parts = [
        part
        for key in ("normalizer", "pre_tokenizer", "decoder")
        for part in _flattened(data.get(key))
    ]
    if any(part.get("type") == "ByteLevel" for part in parts):
        return _byte_level_text
    if any(
        part.get("type") == "Metaspace"
        or (part.get("type") == "Replace" and "▁" in (part.get("content"), *_pattern(part)))
        for part in parts
    ):
        return lambda content: content.replace("▁", " ").encode("utf-8", "surrogatepass")
    return lambda content: content.encode("utf-8", "surrogatepass")


def _pattern(part: dict[str, Any]) -> tuple[Any, ...]:
    pattern = part.get("pattern")
    return tuple(pattern.values()) if isinstance(pattern, dict) else ()


def _flattened(part: Any) -> list[dict[str, Any]]:
    """A pipeline's parts without the sequences that hold them."""
    if part is None:
        return []
    for key in ("normalizers", "pretokenizers", "decoders"):
        if part.get("type") == "Sequence" and key in part:
            return [inner for entry in part[key] for inner in _flattened(entry)]
    return [part]


def _fragments(model: dict[str, Any]) -> Callable[[str], str | None]:
    """Which of the tokenizer's own tokens mean something only where its own model puts them."""
    prefix, suffix = (
        model.get(key) or None for key in ("continuing_subword_prefix", "end_of_word_suffix")
    )
    has_bytes = bool(model.get("byte_fallback"))

    def reason(content: str) -> str | None:
        if has_bytes and BYTE_TOKEN.fullmatch(content):
            return "it stands for a single byte"
        if prefix and content.startswith(prefix):
            return "it only continues words"
        if suffix and content.endswith(suffix):
            return "it only ends words"
        return None

    return reason


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable ones stand for themselves, the others for
    the code points from 256 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def _byte_level_text(content: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[character] for character in content])
    except KeyError:
        return content.encode("utf-8", "surrogatepass")
