"""What became of each routed expert of a child: kept, blended or transplanted, as a table and as a map."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.descent.shares import parent_shares

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

EXPERT = re.compile(r"\.experts\.(\d+)\.")
WHOLE = 1.0 - 1e-9
"""A share from which on an expert is one parent's alone."""

HEIGHT, LEAST_HEIGHT, MOST_HEIGHT = 0.09, 1.1, 5.0
"""Inches of the map: for each layer, and in all."""
MOST_TICKS = 16


@dataclass(frozen=True)
class BandCount:
    """The experts of a band of layers, by what became of them."""

    first: int
    last: int
    kept: int
    blended: int
    transplanted: dict[str, int]
    """Donor -> how many are its own."""

    @property
    def layers(self) -> str:
        """The band's layers, for people."""
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class ExpertMap:
    """What became of the routed experts of a child."""

    parents: tuple[str, ...]
    """The father first."""
    shares: dict[tuple[int, int], dict[str, float]]
    """(layer, expert) -> parent -> its share."""
    bands: tuple[tuple[int, int], ...]
    """First and last layer of each; those of the genome space, or one of all layers."""

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.shares})

    @property
    def experts(self) -> int:
        """The largest number of experts of a layer."""
        return 1 + max(expert for _, expert in self.shares)

    @property
    def counts(self) -> list[BandCount]:
        """The bands, the lowest first."""
        return [self._count(first, last) for first, last in self.bands]

    def _count(self, first: int, last: int) -> BandCount:
        father, *donors = self.parents
        own = [parts for (layer, _), parts in self.shares.items() if first <= layer <= last]
        whole = {name: sum(parts[name] >= WHOLE for parts in own) for name in self.parents}
        return BandCount(
            first,
            last,
            whole[father],
            len(own) - sum(whole.values()),
            {donor: whole[donor] for donor in donors},
        )


def expert_map(lineage: dict[str, Any]) -> ExpertMap | None:
    """What a lineage says of the child's routed experts; None if the model has none."""
    parents = [parent["name"] for parent in lineage["parents"]]
    totals: dict[tuple[int, int], dict[str, float]] = {}
    elements: dict[tuple[int, int], int] = {}
    for tensor in lineage["tensors"]:
        if tensor["component"] != "expert" or tensor["layer"] is None:
            continue
        found = EXPERT.search(tensor["name"])
        if found is None:
            continue
        place = tensor["layer"], int(found[1])
        total = totals.setdefault(place, dict.fromkeys(parents, 0.0))
        elements[place] = elements.get(place, 0) + tensor["elements"]
        given = parent_shares(tensor["method"], tensor["parameters"], parents)
        for parent, share in given.items():
            total[parent] += share * tensor["elements"]
    if not totals:
        return None
    shares = {
        place: {parent: value / max(elements[place], 1) for parent, value in total.items()}
        for place, total in totals.items()
    }
    layers = [layer for layer, _ in shares]
    space = lineage["search"].get("space") or {}
    bands = space.get("bands") or [(min(layers), max(layers))]
    return ExpertMap(tuple(parents), shares, tuple((first, last) for first, last in bands))


def expert_rows(found: ExpertMap) -> list[list[str]]:
    """The table of a card, its head first."""
    rows = [["layers", "experts", "kept", "blended", *(f"of {d}" for d in found.parents[1:])]]
    for band in found.counts:
        total = band.kept + band.blended + sum(band.transplanted.values())
        numbers = [total, band.kept, band.blended, *band.transplanted.values()]
        rows.append([band.layers, *(f"{number:,}" for number in numbers)])
    return rows


def expert_chart(found: ExpertMap) -> Markup:
    """Layers by experts: a cell has the donors' colour, as deep as their share; none is the father's."""
    from orchestrator.reporting.inline_svg import INK, draw_svg

    layers = found.layers
    cells = _cells(found)
    height = min(max(LEAST_HEIGHT, 0.5 + HEIGHT * len(layers)), MOST_HEIGHT)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        # As it is, a pixel for each cell: squares would be megabytes for a model of many experts.
        axes.imshow(cells, aspect="auto", interpolation="none")
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.set_xticks(_ticks(found.experts))
        rows = _ticks(len(layers))
        axes.set_yticks(rows, [str(layers[row]) for row in rows])
        for spine in axes.spines.values():
            spine.set(visible=True, color=INK, alpha=0.3)
        axes.tick_params(length=0)

    return draw_svg("experts", "What each expert of each layer has of the donors", height, draw)


def _cells(found: ExpertMap) -> list[list[tuple[float, float, float, float]]]:
    """Rows of colours: the donors' mixed by their shares, with these together as the opacity."""
    from matplotlib.colors import to_rgb

    from orchestrator.reporting.charts import parent_colours

    colours = {name: to_rgb(colour) for name, colour in parent_colours(found.parents).items()}
    blank = (0.0, 0.0, 0.0, 0.0)

    def cell(parts: dict[str, float] | None) -> tuple[float, float, float, float]:
        given = {donor: (parts or {}).get(donor, 0.0) for donor in found.parents[1:]}
        total = sum(given.values())
        if not total:
            return blank
        red, green, blue = (
            sum(share * colours[donor][channel] for donor, share in given.items()) / total
            for channel in range(3)
        )
        return red, green, blue, min(total, 1.0)

    return [
        [cell(found.shares.get((layer, expert))) for expert in range(found.experts)]
        for layer in found.layers
    ]


def _ticks(count: int) -> Sequence[int]:
    step = next(
        s for n in range(6) for s in (10**n, 2 * 10**n, 5 * 10**n) if count / s <= MOST_TICKS
    )
    return range(0, count, step)
