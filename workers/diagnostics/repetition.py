"""Generated text that goes round in circles."""

from __future__ import annotations

LEAST_REPEATS = 3
LEAST_CHARACTERS = 6
LEAST_SHARE = 0.5


def repeats_itself(text: str) -> bool:
    """Whether the text ends in one piece written over and over.

    The repetition is three times the piece or more, six characters or more, and half of the text or
    more. A piece may be a single character. A text without any character counts too: a model that wrote
    until its limit, and nothing but special tokens or white space, is in a loop.
    """
    text = text.strip()
    if not text:
        return True
    least = max(LEAST_CHARACTERS, LEAST_SHARE * len(text))
    for period in range(1, len(text) // LEAST_REPEATS + 1):
        length = period
        while length < len(text) and text[-1 - length] == text[-1 - length + period]:
            length += 1
        if length >= max(LEAST_REPEATS * period, least):
            return True
    return False
