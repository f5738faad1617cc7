"""Files of texts for a model to read: prose in paragraphs, or JSON lines."""

from __future__ import annotations

import re

BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


def split_texts(content: str) -> list[str]:
    """The texts that blank lines part, without the white space around them; none is empty."""
    parted = BLANK_LINES.split(content.replace("\r\n", "\n"))
    return [text.strip() for text in parted if text.strip()]


def numbered_lines(content: str) -> list[tuple[int, str]]:
    """The lines of JSON lines, counted from 1, without the empty ones.

    Only newlines end them: JSON texts may hold other separators that Python would split at.
    """
    return [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
