"""Heat maps of a scan, components by layers, as inline SVG."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from markupsafe import Markup

from orchestrator.mri.importance import Cells
from orchestrator.reporting.charts import DEEP, FEW_LAYERS, ON_COLOUR, SQUARE, shorten
from orchestrator.reporting.inline_svg import INK, SMALL, draw_svg
from workers.checkpoints import COMPONENTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW, HEAD = 0.19, 0.45
"""Inches of a row of cells, and of a panel's title and ticks."""
FAINTEST = 0.06
"""Colour of the least value: it is there, other than a place that has none."""
NARROW = 11
"""Columns of a panel that still fits beside another one."""


def heat_maps(
    name: str,
    title: str,
    panels: dict[str, Cells],
    colours: dict[str, str],
    label: Callable[[float], str],
) -> Markup:
    """A panel of each of `panels`, by its name: the deeper a cell's colour, the greater its value.

    All panels have one scale, from 0 to the greatest value of all, so that what hardly differs looks alike.
    `label` is what a cell says of its value, where there is room.
    """
    highest = highest_value(panels)
    found = {place for cells in panels.values() for place in cells}
    order = {component: number for number, component in enumerate(COMPONENTS)}
    components = sorted({c for c, _ in found}, key=lambda c: order.get(c, len(order)))
    layers = 1 + max((layer for _, layer in found if layer is not None), default=-1)
    columns: dict[int | None, float] = {layer: float(layer) for layer in range(layers)}
    if any(layer is None for _, layer in found):
        columns[None] = layers + 0.5 if layers else 0.0
    across = 2 if len(panels) > 1 and len(columns) <= NARROW else 1
    down = -(-len(panels) // across)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes, (panel, cells) in zip(grid, panels.items(), strict=False):
            axes.set_title(shorten(panel, 60), loc="left", weight="bold")
            _draw_cells(axes, cells, components, columns, colours[panel], highest, label)

    return draw_svg(name, title, down * (HEAD + ROW * len(components)), draw)


def highest_value(panels: dict[str, Cells]) -> float:
    """The greatest value of all panels; 0 if there is none."""
    return max((value for cells in panels.values() for value in cells.values()), default=0.0)


def _draw_cells(
    axes: Axes,
    cells: Cells,
    components: list[str],
    columns: dict[int | None, float],
    colour: str,
    highest: float,
    label: Callable[[float], str],
) -> None:
    from matplotlib.collections import PolyCollection

    squares, depths = [], []
    for (component, layer), value in cells.items():
        column, row = columns[layer], components.index(component)
        depth = FAINTEST + (1.0 - FAINTEST) * (value / highest if highest else 0.0)
        squares.append([(column + x, row + y) for x, y in SQUARE])
        depths.append(depth)
        if len(columns) <= FEW_LAYERS + 1:
            axes.text(column, row, label(value), size=SMALL, ha="center", va="center",
                      color=ON_COLOUR if depth > DEEP else INK)  # fmt: skip
    axes.add_collection(
        PolyCollection(
            squares,
            facecolors=[(colour, depth) for depth in depths],
            edgecolors=(INK, 0.15),
            linewidths=0.5,
            clip_on=False,
        )
    )
    layers = sum(layer is not None for layer in columns)
    step = max(1, -(-layers // FEW_LAYERS))
    ticks: list[int | None] = [*range(0, layers, step), *([None] if None in columns else [])]
    axes.set(
        xlim=(-0.5, max(columns.values(), default=0.0) + 0.5), ylim=(len(components) - 0.5, -0.5)
    )
    axes.set_xticks(
        [columns[tick] for tick in ticks], ["rest" if tick is None else str(tick) for tick in ticks]
    )
    axes.set_yticks(range(len(components)), [shorten(name) for name in components])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
