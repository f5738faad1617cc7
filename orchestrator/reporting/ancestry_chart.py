"""The report's picture of the ancestry: the child on the left, each older generation further right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from orchestrator.descent.ancestry import Ancestor, Ancestry, share_in
from orchestrator.reporting.ancestry_view import details
from orchestrator.reporting.charts import CHILD_COLOUR, parent_colours, shorten
from orchestrator.reporting.inline_svg import INK, SMALL, WIDTH, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHILD = ""
"""The child's key among those of its ancestors."""
MOST_DRAWN = 60
ROW_INCHES = 0.36
COLUMN_INCHES = 2.3
LABEL = 0.8
"""How much of a column its labels may take; lines bend in the rest."""
LETTERS = 25
WIDEST_LINE = 7.0
"""Points, of who gave everything."""


@dataclass(frozen=True)
class Place:
    """Where somebody is drawn."""

    column: int
    row: int


def ancestry_chart(ancestry: Ancestry, parents: list[str]) -> Markup:
    """Everybody once, in a row of its own; a line is as wide as what came along it is of the child.

    `parents` have the colours that they have in the other charts.
    """
    drawn = {CHILD: ancestry.child} | ancestry.ancestors
    places = _places(ancestry)
    shares = ancestry.shares(lambda one: one.nearest) | ancestry.shares()
    shares[CHILD] = dict.fromkeys(ancestry.child.elements or {}, 1.0)
    colours = {
        descent.node: parent_colours(parents)[descent.name]
        for descent in reversed(ancestry.child.parents)
        if descent.name in parents
    } | {CHILD: CHILD_COLOUR}
    columns = 1 + max(place.column for place in places.values())

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set(xlim=(-0.06, columns - 0.02), ylim=(len(places) - 0.4, -0.6))
        axes.axis("off")
        for key, place in places.items():
            if drawn[key].nearest:  # between the two lines of the label
                axes.plot([place.column, place.column + LABEL], [place.row] * 2, INK, alpha=0.25,
                          linewidth=0.6)  # fmt: skip
            for descent in drawn[key].nearest:
                if descent.node in places:
                    given = {
                        part: share * share_in(drawn[key], descent, part)
                        for part, share in shares[key].items()
                    }
                    share = ancestry.child.overall(given)
                    colour = colours.get(descent.node, INK)
                    _line(axes, place, places[descent.node], share, colour)
        for key, place in places.items():
            _label(axes, place, drawn[key], key, ancestry.child.overall(shares[key]))
            hollow = drawn[key].fingerprint is None and key != CHILD
            colour = colours.get(key, INK)
            axes.scatter(place.column, place.row, 30, "none" if hollow else colour,
                         edgecolors=colour, linewidths=1.2, zorder=3)  # fmt: skip

    width = max(WIDTH, COLUMN_INCHES * columns)
    height = 0.2 + ROW_INCHES * len(places)
    return draw_svg("ancestry", "The child's ancestors", height, draw, width)


def _places(ancestry: Ancestry) -> dict[str, Place]:
    """Column: the longest way from the child. Row: amid those that it was the first to lead to."""
    drawn = {CHILD: ancestry.child} | ancestry.ancestors
    column = {CHILD: 0}
    first_met: dict[str, list[str]] = {key: [] for key in drawn}
    for key in [CHILD, *ancestry.in_order(lambda one: one.nearest)][:MOST_DRAWN]:
        for descent in drawn[key].nearest:
            if descent.node not in column:
                first_met[key].append(descent.node)
            column[descent.node] = max(column.get(descent.node, 0), column[key] + 1)
    rows: list[str] = []
    # Each is pushed twice: to unfold it, and then to take a row amid those it led to.
    stack = [(CHILD, False)]
    while stack:
        key, unfolded = stack.pop()
        led_to = first_met[key]
        if unfolded or not led_to:
            rows.append(key)
            continue
        half = (len(led_to) + 1) // 2
        around = [(other, False) for other in led_to]
        stack += reversed([*around[:half], (key, True), *around[half:]])
    return {key: Place(column[key], row) for row, key in enumerate(rows)}


def _line(axes: Axes, start: Place, end: Place, share: float, colour: str) -> None:
    """From behind the label of the one into the row of the other, and along it."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    left, bend, right = start.column + LABEL, start.column + 0.98, end.column
    middle = (left + bend) / 2
    points = [
        (left, start.row), (middle, start.row), (middle, end.row), (bend, end.row), (right, end.row),
    ]  # fmt: skip
    curve = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO])
    nothing = share < 0.0005
    axes.add_patch(
        PathPatch(
            curve,
            fill=False,
            edgecolor=colour,
            alpha=0.35 if nothing else 0.5,
            linewidth=0.8 if nothing else 0.8 + (WIDEST_LINE - 0.8) * min(share, 1.0),
            linestyle=(0, (3, 3)) if nothing else "solid",
            capstyle="butt",
        )
    )


def _label(axes: Axes, place: Place, one: Ancestor, key: str, share: float) -> None:
    """Who it is, and below in small what of the child it is and what else is known."""
    words = ["this child"] if key == CHILD else [f"{share:.1%}", *details(one)]
    lines = [(shorten(one.hub or one.name, LETTERS), "bottom", 1.0, 8.0, "bold"),
             (shorten(", ".join(words), LETTERS + 8), "top", 0.75, SMALL, "normal")]  # fmt: skip
    for text, side, alpha, size, weight in lines:
        axes.annotate(text, (place.column, place.row), (7, 1.5 if side == "bottom" else -1.5),
                      textcoords="offset points", va=side, alpha=alpha, size=size,
                      weight=weight)  # fmt: skip
