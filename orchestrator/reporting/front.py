"""What card and report say of a search that aimed at several objectives: its Pareto front."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import TYPE_CHECKING, Any

from orchestrator.ledger.state import CampaignState, Candidate
from orchestrator.reporting.markdown import table

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_MEMBERS = 20
"""A card shows the first so many of a front; all are in the lineage."""

MOST_TASKS = 3
"""So many objectives are shown pair by pair; more as a line for each member."""

TaskScores = dict[str, float]


def front_section(lineage: dict[str, Any]) -> str:
    """The card's section; empty for a search that had one objective."""
    front = lineage["search"].get("front")
    if not front:
        return ""
    return f"## The Pareto front\n\n{front_note(front)}\n\n{table(front_rows(lineage))}"


def front_note(front: dict[str, Any]) -> str:
    """What the front is, in sentences."""
    members = front["members"]
    more = f" The first {MOST_MEMBERS} are shown." if len(members) > MOST_MEMBERS else ""
    return (
        f"The search looked for children of which no other is better on one task and as good on all others: "
        f"{len(members)} of those scored are. Together they dominate a hypervolume of "
        f"{front['hypervolume']:.4f} (above the reference point {front['reference']:g}; 1 would be all "
        f"items of all tasks). This child is the one with the best mean.{more} Scores are on the search "
        "items, which chose them, so they are too high; only this child was judged on held-out items."
    )


def front_rows(lineage: dict[str, Any]) -> list[list[str]]:
    """A heading, then a row for each member: its recipe, its score on each task, and their mean."""
    front, tasks = lineage["search"]["front"], list(lineage["tasks"])
    rows = [["recipe", *tasks, "mean"]]
    for member in front["members"][:MOST_MEMBERS]:
        own = " (this child)" if member["recipe"] == lineage["recipe_id"] else ""
        scores = [f"{member['scores'][task]:.3f}" for task in tasks]
        rows.append([f"`{member['recipe'][:12]}`{own}", *scores, f"{member['mean']:.3f}"])
    return rows


def draw_front(
    lineage: dict[str, Any], state: CampaignState, candidates: Iterable[Candidate]
) -> Markup | None:
    """The picture of the front among all candidates; None if there is no front."""
    front = lineage["search"].get("front")
    if not front:
        return None
    scored = [
        state.evaluation(candidate.recipe_id, "search").scores()
        for candidate in candidates
        if state.fitness(candidate.recipe_id) is not None
    ]
    members = [member["scores"] for member in front["members"]]
    return front_chart(members, scored, front["parents"], list(lineage["tasks"]))


def front_chart(
    members: list[TaskScores],
    candidates: list[TaskScores],
    parents: dict[str, TaskScores],
    tasks: list[str],
) -> Markup:
    """Members of the front (the child first) among the candidates, and the parents."""
    from orchestrator.reporting.charts import parent_colours, shorten
    from orchestrator.reporting.inline_svg import draw_svg

    colours = parent_colours(list(parents))

    def draw_pairs(figure: Figure) -> None:
        pairs = list(combinations(tasks, 2))
        panels = figure.subplots(1, len(pairs), squeeze=False)[0]
        for axes, (one, other) in zip(panels, pairs, strict=True):
            _draw_pair(axes, one, other, members, candidates, len(tasks) == 2)
            for name, scores in parents.items():
                axes.scatter(
                    scores[one], scores[other], 34, colours[name], marker="D", label=shorten(name)
                )
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4,
                      frameon=False)  # fmt: skip

    def draw_lines(figure: Figure) -> None:
        axes = figure.subplots()
        _draw_lines(axes, members, parents, colours, tasks)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4,
                      frameon=False)  # fmt: skip

    few = len(tasks) <= MOST_TASKS
    height = 3.4 if len(tasks) == 2 else 2.7
    return draw_svg("front", "The Pareto front", height, draw_pairs if few else draw_lines)


def _draw_pair(
    axes: Axes,
    one: str,
    other: str,
    members: list[TaskScores],
    candidates: list[TaskScores],
    with_steps: bool,
) -> None:
    from orchestrator.reporting.charts import CHILD_COLOUR, DOT_AREA, shorten
    from orchestrator.reporting.inline_svg import INK

    axes.set(xlabel=shorten(one), ylabel=shorten(other))
    axes.scatter(
        [scores[one] for scores in candidates],
        [scores[other] for scores in candidates],
        DOT_AREA, INK, alpha=0.3, linewidths=0, label="candidate",
    )  # fmt: skip
    across, up = zip(*sorted((scores[one], scores[other]) for scores in members), strict=True)
    if with_steps:
        axes.step(across, up, CHILD_COLOUR, where="pre", linewidth=1)
    axes.scatter(across, up, 22, CHILD_COLOUR, zorder=3, label="front")
    axes.scatter(
        members[0][one], members[0][other], 80, "none", edgecolors=INK, linewidths=1.2, zorder=4,
        label="child",
    )  # fmt: skip


def _draw_lines(
    axes: Axes,
    members: list[TaskScores],
    parents: dict[str, TaskScores],
    colours: dict[str, str],
    tasks: list[str],
) -> None:
    from orchestrator.reporting.charts import CHILD_COLOUR, shorten
    from orchestrator.reporting.inline_svg import INK

    places = range(len(tasks))
    axes.set(ylabel="share of right answers", xlim=(-0.2, len(tasks) - 0.8))
    axes.set_xticks(places, [shorten(task) for task in tasks])
    axes.grid(axis="x", color=INK, alpha=0.13, linewidth=0.6)
    for number, scores in enumerate(members[1:]):
        label = "front" if number == 0 else None
        axes.plot(places, [scores[task] for task in tasks], CHILD_COLOUR, alpha=0.5,
                  linewidth=0.9, label=label)  # fmt: skip
    axes.plot(places, [members[0][task] for task in tasks], CHILD_COLOUR, linewidth=2.4,
              label="child", marker="o")  # fmt: skip
    for name, scores in parents.items():
        axes.plot(places, [scores[task] for task in tasks], colours[name], dashes=(5, 2),
                  linewidth=1.4, label=shorten(name))  # fmt: skip
