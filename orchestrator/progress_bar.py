"""A bar for one long piece of work, on standard error; a plain line where that is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to be called with each number of bytes done."""
    counts = (DownloadColumn(), TransferSpeedColumn())
    with _bar(title, total_bytes, f"{total_bytes:,} bytes", counts) as notify:
        yield notify


@contextmanager
def steps_bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives a function to be called with each number of steps done, of a work whose steps are called
    `unit`."""
    counts = (MofNCompleteColumn(), TextColumn(unit))
    with _bar(title, total, f"{total} {unit}", counts) as notify:
        yield notify


@contextmanager
def _bar(
    title: str, total: int, amount: str, counts: tuple[ProgressColumn, ...]
) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{title}: {amount}", highlight=False)
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)
