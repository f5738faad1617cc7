"""What `darwin status --watch` shows: a live view in a terminal, plain lines elsewhere, or JSON lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from orchestrator.console import print_json, say
from orchestrator.overview import render_overview
from orchestrator.watching.following import follow

LINE_SECONDS = 20.0
"""Plain lines come at most so often."""

DRIVERS = {
    "running": "running",
    "gone": "none: the campaign was stopped; `darwin run` or `darwin resume` goes on with it",
    "silent": "silent: it hangs, or its machine is gone or cut off from the store",
}


def watch_status(place: str, as_json: bool, wait: Callable[[float], None] = time.sleep) -> None:
    """Show the campaign's status until it has come to its end."""
    if as_json:
        for overview, is_news in follow(place, wait):
            if is_news:
                print_json(overview)
        return
    show = _show_live if sys.stdout.isatty() else _print_lines
    say(render_overview(show(place, wait)))


def _show_live(place: str, wait: Callable[[float], None]) -> dict[str, Any]:
    overview: dict[str, Any] = {}
    with Live(console=Console(emoji=False), auto_refresh=False, transient=True) as live:
        for overview, _ in follow(place, wait):
            live.update(render_status(overview), refresh=True)
    return overview


def _print_lines(place: str, wait: Callable[[float], None]) -> dict[str, Any]:
    printed = float("-inf")
    overview: dict[str, Any] = {}
    for overview, is_news in follow(place, wait):
        if is_news and time.monotonic() - printed >= LINE_SECONDS:
            printed = time.monotonic()
            print(status_line(overview), flush=True)
    return overview


def status_line(overview: dict[str, Any]) -> str:
    """One line for a log."""
    best = overview["best"]
    parts = [
        overview["stage"],
        f"{overview['evaluations']}/{overview['budget']} evaluations",
        f"best {best['fitness']:.3f}" if best else "no candidate yet",
        *pace_parts(overview),
        f"{overview['failures']} failures",
    ]
    if overview["driver"] in ("gone", "silent"):
        parts.append(f"driver {overview['driver']}")
    return " · ".join(parts)


def pace_parts(overview: dict[str, Any]) -> list[str]:
    """Rates and the time left, as far as they are known."""
    if overview["items_per_second"] is None:
        return []
    parts = [
        f"{overview['candidates_per_hour']:,.0f} candidates/h",
        f"{overview['items_per_second']:,.1f} items/s",
    ]
    if overview["seconds_left"]:
        parts.append(f"about {clock(overview['seconds_left'])} left")
    return parts


def render_status(overview: dict[str, Any]) -> RenderableType:
    """The live view."""
    bar = Table.grid(padding=(0, 1))
    budget, done = overview["budget"], overview["evaluations"]
    bar.add_row(ProgressBar(total=budget, completed=done, width=50), f"{done}/{budget} evaluations")
    table = render_overview(overview)
    table.add_row("stage", overview["stage"])
    if parts := pace_parts(overview):
        table.add_row("pace", ", ".join(parts))
    if overview["driver"] is not None:
        table.add_row("driver", DRIVERS[overview["driver"]])
    if overview["newest_record"] is not None:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(overview["newest_record"]))
        table.add_row("last record", f"{written}, by the driver's clock")
    return Group(table, bar)


def clock(seconds: float) -> str:
    """Days, hours, minutes and seconds, the two largest that are not nothing."""
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {left:02d} s" if minutes else f"{left} s"
