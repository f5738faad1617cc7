"""What a person sees while a campaign runs: a live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.campaign import Campaign
from orchestrator.objectives import scalar_name
from orchestrator.racing.record import saved_text
from orchestrator.statistics import Score, score

RATE_SECONDS = 20.0
"""Items per second are those of this last while."""
REFRESH_PER_SECOND = 2


@dataclass(frozen=True)
class Figures:
    """Where the campaign stands, for the live view."""

    begun: str
    items: str
    busy: str
    failures: str
    raced: str
    left: str
    done: int
    budget: int
    scores: Table


class ProgressView:
    """Follows one campaign on standard error. A context manager.

    The live view is drawn by a thread of its own. What it shows of the campaign the main thread has looked up
    before: to ask the state for its standing changes what the search goes by.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.campaign: Campaign | None = None
        self.stage_name = "starting"
        self.started = time.monotonic()
        self._live: Live | None = None
        self._figures: Figures | None = None
        self._looked = -math.inf
        self._printed = (-1, 0.0)
        self._items_shown = 0
        self._history: deque[tuple[float, int, int]] = deque()
        """(when, items scored, candidates evaluated), for rates."""

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._render,
                console=self.console,
                refresh_per_second=REFRESH_PER_SECOND,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
        scores = self._scores() if self.campaign is not None else Table()
        if scores.row_count:
            self.console.print(scores)

    # -- what the campaign calls ---------------------------------------------------------------

    def begin(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self._look()
        space = campaign.space
        self.console.print(
            f"[bold]{campaign.config.name}[/bold] in {campaign.store.uri}: "
            f"{len(campaign.inputs.parents)} parents, {len(space.genes)} genes of "
            f"{campaign.config.genome.space} for {space.method.name}, "
            f"{campaign.config.search.evaluations} evaluations by {campaign.config.search.optimizer}",
            highlight=False,
            soft_wrap=True,
        )
        for names in campaign.inputs.same_checkpoints:
            self.console.print(
                f"[yellow]{' and '.join(names)} are the same checkpoint[/yellow]: "
                "there is nothing to mix of them",
                highlight=False,
                soft_wrap=True,
            )
        for warning in campaign.inputs.warnings:
            self.console.print(
                warning, style="yellow", markup=False, highlight=False, soft_wrap=True
            )
        for name, tensors in campaign.inputs.unused.items():
            if tensors:
                self.console.print(
                    f"[yellow]{len(tensors)} tensors of {name} have no counterpart in the father and are "
                    f"not used[/yellow], such as {tensors[0]}",
                    highlight=False,
                    soft_wrap=True,
                )

    def stage(self, name: str) -> None:
        if name != self.stage_name:
            self.stage_name = name
            self._look()
            self._print_unprinted()
            self.console.print(
                f"[dim]{self._clock()}[/dim] {name}", highlight=False, soft_wrap=True
            )

    def notify(self, campaign: Campaign) -> None:
        self._remember(campaign)
        if time.monotonic() - self._looked >= 1 / REFRESH_PER_SECOND:
            self._look()
        steady = campaign.state.is_steady  # without generations, by the clock alone
        generation = 0 if steady else len(campaign.state.generations)
        last_generation, last_time = self._printed
        if self._live is None and (
            generation != last_generation or time.monotonic() - last_time > RATE_SECONDS
        ):
            self._printed = (generation, time.monotonic())
            self._show(campaign)

    def happened(self, campaign: Campaign, event: Mapping[str, Any]) -> None:
        """Nothing: what is shown comes from the campaign's state."""

    def _print_unprinted(self) -> None:
        """The last figures of a stage, before the next one begins."""
        is_new = bool(self._history) and self._history[-1][1] != self._items_shown
        if self._live is None and self.campaign is not None and is_new:
            self._show(self.campaign)

    def _show(self, campaign: Campaign) -> None:
        self._items_shown = self._history[-1][1]
        self.console.print(self._line(campaign), highlight=False, soft_wrap=True)

    # -- figures -------------------------------------------------------------------------------

    def _remember(self, campaign: Campaign) -> None:
        now = time.monotonic()
        items = campaign.state.items
        done = campaign.state.evaluated(campaign.config.search.evaluations)
        self._history.append((now, items, done))
        # One from before that while stays: results may come more seldom.
        while len(self._history) > 1 and now - self._history[1][0] > RATE_SECONDS:
            self._history.popleft()

    def _rates(self) -> tuple[float, float]:
        """Items and candidates per second, lately."""
        if len(self._history) < 2:
            return 0.0, 0.0
        (start, items0, done0), (end, items1, done1) = self._history[0], self._history[-1]
        span = max(end - start, 1e-6)
        return (items1 - items0) / span, (done1 - done0) / span

    def _clock(self) -> str:
        return _duration(time.monotonic() - self.started)

    def _line(self, campaign: Campaign) -> str:
        budget = campaign.config.search.evaluations
        best = campaign.state.best(budget)
        items_per_second, _ = self._rates()
        parts = [
            f"[dim]{self._clock()}[/dim] {_begun(campaign)}",
            f"{campaign.state.evaluated(budget)}/{budget} evaluations",
            f"best {best[1]:.3f}" if best else "no candidate yet",
            f"{_rate(items_per_second)} items/s",
            f"{campaign.state.failures} failures",
        ]
        raced = campaign.state.races.to_dict()
        if raced:
            parts.append(saved_text(raced))
        return " · ".join(parts)

    def _look(self) -> None:
        """Look up what the live view shows; on the main thread."""
        campaign = self.campaign
        if self._live is None or campaign is None:
            return
        budget = campaign.config.search.evaluations
        done = campaign.state.evaluated(budget)
        items_per_second, candidates_per_second = self._rates()
        left = (budget - done) / candidates_per_second if candidates_per_second else None
        raced = campaign.state.races.to_dict()
        self._figures = Figures(
            begun=_begun(campaign),
            items=f"{_rate(items_per_second)} items/s",
            busy=f"{campaign.busy_workers}/{campaign.config.workers.total} workers busy",
            failures=f"{campaign.state.failures} failures",
            raced=saved_text(raced) if raced else "",
            left=f"about {_duration(left)} left" if left is not None and done < budget else "",
            done=done,
            budget=budget,
            scores=self._scores(),
        )
        self._looked = time.monotonic()

    def _render(self) -> RenderableType:
        """Draw what was looked up; on the view's own thread."""
        figures = self._figures
        if figures is None:
            return Text(f"{self._clock()} {self.stage_name}", style="dim")
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            f"[bold]{self.stage_name}[/bold]",
            figures.begun,
            figures.items,
            figures.busy,
            figures.failures,
            f"{self._clock()} elapsed",
            figures.raced,
            figures.left,
        )
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=figures.budget, completed=figures.done, width=50),
            f"{figures.done}/{figures.budget} evaluations",
        )
        return Group(grid, bar, figures.scores)

    def _scores(self) -> Table:
        """Search scores of the parents and of the best candidate, with intervals."""
        assert self.campaign is not None
        campaign = self.campaign
        tasks = [task.name for task in campaign.inputs.tasks]
        # Without padding at the edge, three tasks take the 80 columns that a log and most terminals have.
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
        for heading in (
            "search items",
            *tasks,
            f"fitness ({scalar_name(campaign.config.objective)})",
        ):
            table.add_column(heading)
        rows = {name: recipe.id for name, recipe in campaign.parent_recipes.items()}
        best = campaign.state.best(campaign.config.search.evaluations)
        if best:
            rows["best child"] = best[0].recipe_id
        for name, recipe_id in rows.items():
            evaluation = campaign.state.evaluation(recipe_id, "search")
            if not evaluation.complete or evaluation.failed is not None:
                continue
            scores = {task: score(evaluation.results[task]) for task in tasks}
            fitness = campaign.state.fitness(recipe_id) or 0.0
            low, high = fitness_interval(scores, campaign.config.objective, campaign.weights)
            table.add_row(
                name,
                *(f"{s.score:.3f} [dim]{s.low:.2f}-{s.high:.2f}[/dim]" for s in scores.values()),
                f"[bold]{fitness:.3f}[/bold] [dim]{low:.2f}-{high:.2f}[/dim]",
            )
        return table


def _begun(campaign: Campaign) -> str:
    """How far it is: the generation, or the number of asks where there are none."""
    asked = len(campaign.state.generations)
    return f"{asked} asked" if campaign.state.is_steady else f"generation {asked}"


def fitness_interval(
    scores: dict[str, Score], objective: str, weights: Mapping[str, float] | None = None
) -> tuple[float, float]:
    """An interval for a fitness: that of the worst task, or one for the mean of independent tasks by their
    `weights`, which sum to 1; None: even ones.

    The latter recovers variances from the tasks' own intervals (MOVER; Zou and Donner 2008, eq. 3).
    """
    values = scores.values()
    weights = weights or dict.fromkeys(scores, 1 / len(scores))
    if objective == "worst":
        worst = min(values, key=lambda value: value.score)
        return worst.low, worst.high
    mean = sum(weights[task] * value.score for task, value in scores.items())
    below = math.hypot(*(weights[task] * (v.score - v.low) for task, v in scores.items()))
    above = math.hypot(*(weights[task] * (v.high - v.score) for task, v in scores.items()))
    return mean - below, mean + above


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
