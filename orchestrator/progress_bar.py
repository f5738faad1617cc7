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
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to be called with each number of bytes done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{title}: {total_bytes:,} bytes", highlight=False)
        yield lambda done: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total_bytes)
        yield lambda done: progress.advance(task, done)


@contextmanager
def steps_bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives a function to be called with each number of steps done, of a work whose steps are called
    `unit`."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{title}: {total} {unit}", highlight=False)
        yield lambda done: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)
