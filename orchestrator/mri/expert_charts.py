"""Pictures of experts, as inline SVG: heat maps of layers by experts, and overlaps by layer."""

from __future__ import annotations

import math
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from orchestrator.mri.charts import FAINTEST
from orchestrator.mri.experts import (
    Routing,
    RoutingByLayer,
    relative_frequency,
    relative_merit,
    routing_by_layer,
)
from orchestrator.reporting.charts import DEEP, FEW_LAYERS, ON_COLOUR, parent_colours, shorten
from orchestrator.reporting.inline_svg import INK, SMALL, WIDTH, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAD = 0.55
"""Inches of a panel's title and ticks."""
ROW, THIN_ROW = 0.19, 0.034
"""Inches of a layer with numbers in its cells, and without."""
LEAST_HEIGHT = 0.4
SHADES = 15
"""Depths that cells are told apart by. With none they are 16, which take four bits."""

EMBEDDED = re.compile(r'("data:image/png;base64,)([^"]*)')

Panels = dict[str, dict[int, list[float]]]
"""Title -> layer -> value by expert, 1 in the mean of a layer."""


def expert_figures(found: RoutingByLayer, parents: list[str]) -> list[dict[str, Any]]:
    """The figures of all sets together, as pages show them; none without experts."""
    if not found:
        return []
    figures = [
        _map_figure(
            "expert-frequency",
            "Experts: how often they are chosen",
            "relative to uniform, by layer (down) and expert (across): 1 is an even load. The deeper, the "
            "more often, on a logarithmic scale; no colour is never. Over the tokens of all prompts.",
            _panels(found, relative_frequency),
            parents,
        )
    ]
    if merits := _panels(found, relative_merit):
        figures.append(
            _map_figure(
                "expert-merit",
                "Experts: merit",
                "relative to the mean of the layer's experts: frequency, times weight, times the norm of "
                "what the expert adds.",
                merits,
                parents,
            )
        )
    if any("overlap" in routing for layers in found.values() for routing in layers.values()):
        figures.append(
            {
                "title": "Routers: overlap",
                "caption": "by layer: of the experts that a parent chooses, the share that the router of the "
                "other would choose too, of the same hidden states. Dashed: by chance.",
                "highest": None,
                "chart": overlap_lines(found, parents),
            }
        )
    return figures


def set_figures(scan: dict[str, Any], parents: list[str]) -> list[dict[str, Any]]:
    """How often experts are chosen for each set's prompts; none if there is one set only."""
    names = list(scan["probe"].get("sets", {}))
    found = [(name, routing_by_layer(scan, name)) for name in names]
    return [
        _map_figure(
            f"expert-frequency-{number}",
            f"Experts chosen for {name}",
            "relative to uniform.",
            _panels(by_layer, relative_frequency),
            parents,
        )
        for number, (name, by_layer) in enumerate(found)
        if by_layer and len(names) > 1
    ]


def _panels(found: RoutingByLayer, measure: Callable[[Routing], list[float]]) -> Panels:
    panels = {
        parent: {n: values for n, routing in layers.items() if (values := measure(routing))}
        for parent, layers in found.items()
    }
    return {parent: layers for parent, layers in panels.items() if layers}


def _map_figure(
    name: str, title: str, caption: str, panels: Panels, parents: list[str]
) -> dict[str, Any]:
    return {
        "title": title,
        "caption": caption,
        "highest": short_number(max(_values(panels))),
        "chart": expert_maps(name, title, panels, parent_colours(parents)),
    }


def expert_maps(name: str, title: str, panels: Panels, colours: dict[str, str]) -> Markup:
    """A panel of each parent, layers by experts: the deeper a cell's colour, the greater its value.

    All panels have one scale, logarithmic in 1 + value, up to the greatest value of all. Many cells are an
    image of a pixel each; few have their values written into them.
    """
    deepest = math.log1p(max(_values(panels))) or 1.0
    experts = max(len(row) for layers in panels.values() for row in layers.values())
    rows = 1 + max(layer for layers in panels.values() for layer in layers)
    is_written = experts <= FEW_LAYERS and rows <= FEW_LAYERS
    across = 2 if len(panels) > 1 and experts <= FEW_LAYERS // 2 else 1
    down = -(-len(panels) // across)
    height = max(LEAST_HEIGHT, rows * (ROW if is_written else THIN_ROW))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes, (parent, layers) in zip(grid, panels.items(), strict=False):
            axes.set_title(shorten(parent, 60), loc="left", weight="bold")
            depths = {
                layer: [_depth(value, deepest) for value in row] for layer, row in layers.items()
            }
            _draw_pixels(axes, depths, rows, experts, colours[parent])
            if is_written:
                _write_values(axes, layers, depths)
        for axes in grid[0::across]:
            axes.set_ylabel("layer")
        for axes in grid[-across:]:
            axes.set_xlabel("expert")

    drawn = draw_svg(name, title, down * (HEAD + height), draw)
    return Markup(EMBEDDED.sub(lambda found: found[1] + _smaller(found[2]), drawn))


def overlap_lines(found: RoutingByLayer, parents: list[str]) -> Markup:
    """A panel of each parent: by layer, the share of its choices that each other parent's router makes."""
    colours = parent_colours(parents)
    panels = {
        parent: {
            other: {
                n: r["overlap"][other] for n, r in layers.items() if other in r.get("overlap", {})
            }
            for other in parents
        }
        for parent, layers in found.items()
    }
    chance = {
        parent: max(r["per_token"] / len(r["choices"]) for r in layers.values())
        for parent, layers in found.items()
    }

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False).ravel()
        for axes, (parent, others) in zip(grid, panels.items(), strict=True):
            axes.set_title(f"chosen by {shorten(parent, 50)}", loc="left", weight="bold")
            axes.axhline(chance[parent], color=INK, alpha=0.35, linewidth=0.8, dashes=(3, 3))
            for other, shares in others.items():
                if shares:
                    axes.plot(list(shares), list(shares.values()), color=colours[other],
                              marker="o" if len(shares) <= FEW_LAYERS else None,
                              markersize=2.4, linewidth=1.2, label=shorten(other))  # fmt: skip
            axes.set(ylim=(0.0, 1.04))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.6)
            axes.legend(
                loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=1.2,
                title="router of",
            )  # fmt: skip
        grid[-1].set_xlabel("layer")
        grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw_svg(
        "expert-overlap", "Overlap of routers by layer", 0.35 + 1.15 * len(panels), draw, WIDTH
    )


def _draw_pixels(
    axes: Axes, depths: dict[int, list[float]], rows: int, experts: int, colour: str
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.ticker import MaxNLocator
    from numpy import uint8, zeros

    pixels = zeros((rows, experts, 4), uint8)
    pixels[..., :3] = [round(255 * part) for part in to_rgb(colour)]
    for layer, row in depths.items():
        pixels[layer, : len(row), 3] = [round(255 * depth) for depth in row]
    axes.imshow(pixels, aspect="auto", interpolation="none")
    axes.tick_params(length=2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    for spine in axes.spines.values():
        spine.set(visible=True, alpha=0.3)


def _smaller(image: str) -> str:
    """The same PNG, one colour in some depths, with a palette of these: an eighth of its size."""
    from numpy import asarray, uint8, unique
    from PIL import Image

    with Image.open(BytesIO(b64decode(image))) as full:
        pixels = asarray(full)
    depths, indices = unique(pixels[..., 3], return_inverse=True)
    indexed = Image.fromarray(indices.reshape(pixels.shape[:2]).astype(uint8), "P")
    indexed.putpalette(pixels[0, 0, :3].tolist() * len(depths))
    out = BytesIO()
    indexed.save(out, "png", transparency=depths.tobytes(), optimize=True)
    return b64encode(out.getvalue()).decode()


def _write_values(
    axes: Axes, layers: dict[int, list[float]], depths: dict[int, list[float]]
) -> None:
    for layer, row in layers.items():
        for expert, value in enumerate(row):
            axes.text(expert, layer, short_number(value), size=SMALL, ha="center", va="center_baseline",
                      color=ON_COLOUR if depths[layer][expert] > DEEP else INK)  # fmt: skip


def _depth(value: float, deepest: float) -> float:
    """Between 0 and 1; a value that is not 0 is seen."""
    if value <= 0:
        return 0.0
    shade = math.ceil(SHADES * math.log1p(value) / deepest) / SHADES
    return FAINTEST + (1.0 - FAINTEST) * min(1.0, shade)


def _values(panels: Panels) -> Iterable[float]:
    return (value for layers in panels.values() for row in layers.values() for value in row)


def short_number(value: float) -> str:
    """Two digits where there is room for them."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
