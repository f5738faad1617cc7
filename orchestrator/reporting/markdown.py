"""Pieces of Markdown, as model cards are made of."""

from __future__ import annotations


def table(rows: list[list[str]]) -> str:
    """A table, its head first."""
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def _cell(text: str) -> str:
    """A table cell, whatever the text: licences and names were written by others."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def join(names: list[str]) -> str:
    """Names in a sentence."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
