"""What commands print: a text for people, or with `--json` one JSON object on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, TextIO

import typer

PIPE_WIDTH = 1000

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

_json_output: TextIO | None = None
"""Where the JSON object goes, and nothing else."""


@contextmanager
def json_alone() -> Iterator[None]:
    """Standard output is for the JSON object: whatever else is printed goes to standard error."""
    global _json_output
    _json_output = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _json_output = None


_errors_are_logged = False
"""Whether standard error is a log of JSON lines, in which errors are already."""


def leave_errors_to_log() -> None:
    """From now on `complain` says nothing: standard error is a log, which says it."""
    global _errors_are_logged
    _errors_are_logged = True


def complain(message: str) -> None:
    """Say what ended the command, in a line on standard error."""
    if not _errors_are_logged:
        print(f"darwin: {message}", file=sys.stderr)


def print_json(data: dict[str, Any]) -> None:
    """Print a command's one JSON object."""
    # All ASCII, whatever the terminal can show.
    print(json.dumps(data), file=_json_output or sys.stdout, flush=True)


def say(text: Any) -> None:
    """Print a text, or anything that rich can render."""
    from rich.console import Console

    # No markup: paths and tensor names may hold anything. A file or a pipe has no width to fit into.
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(markup=False, emoji=False, width=width).print(text, highlight=False, soft_wrap=True)
