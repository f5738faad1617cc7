"""What a tokenizer makes of a prompt, and how much of it a model gets to see."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from workers.errors import BadInputError

MOST_UNKNOWN = 0.5
"""Share of the characters that a tokenizer may not know: a model that sees less has not been asked."""


@dataclass(frozen=True)
class Reading:
    """One prompt."""

    ids: list[int]
    unknown: int
    """Characters that are no part of a token the tokenizer knows; spaces are not counted."""
    characters: int
    """All but spaces."""


def read_prompt(tokenizer: Any, text: str) -> Reading:
    """The prompt's token ids, and what of it is lost.

    A tokenizer may write its unknown token for what it does not know, or drop it without a trace; only where
    its tokens lie in the text tells of both. Of those that do not say where, unknown tokens are counted.
    """
    ids = tokenizer(text)["input_ids"]
    if not tokenizer.is_fast:
        return Reading(ids, ids.count(tokenizer.unk_token_id), len(ids))
    words = text.split()
    unknown = sum(len(word) - _count_known(tokenizer, word) for word in words)
    return Reading(ids, unknown, sum(map(len, words)))


def _count_known(tokenizer: Any, word: str) -> int:
    # Word by word: behind what is dropped, places are off by as much, so only their number can be believed.
    found = tokenizer(word, add_special_tokens=False, return_offsets_mapping=True)
    tokens = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return len(
        {
            place
            for number, (first, end) in tokens
            if number != tokenizer.unk_token_id
            for place in range(first, end)
        }
    )


def check_known(readings: Iterable[Reading], location: str, prompts: str, remedy: str) -> None:
    """Raise `BadInputError` if more than `MOST_UNKNOWN` of the prompts is unknown to the tokenizer."""
    unknown = total = 0
    for reading in readings:
        unknown += reading.unknown
        total += reading.characters
    if unknown > MOST_UNKNOWN * total:
        raise BadInputError(
            f"{location}: its tokenizer does not know {unknown:,} of the {total:,} characters of "
            f"{prompts}: {remedy}"
        )
