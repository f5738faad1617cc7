"""Matplotlib figures as inline SVG that follows the page's font and colours.

Neutral parts are drawn in a stand-in colour that becomes CSS `currentColor`, so one chart serves light
and dark pages. Text stays text. The same figure gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour until the SVG is on the page."""
WIDTH = 6.4
"""Inches; the page scales it."""
SMALL = 6.8
"""Points, for numbers; other text has 8."""
SMALLEST_SCALE = 0.92
"""On a narrower page a chart scrolls: its text would be too small to read."""

FORMATTING = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw_svg(
    name: str, title: str, height: float, draw: Callable[[Figure], None], width: float = WIDTH
) -> Markup:
    """A figure of so many inches, drawn by `draw`, as an element of the page.

    `name` is unique on the page; `title` is what a screen reader says.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out = io.StringIO()
    with rc_context(FORMATTING | {"svg.hashsalt": name}):
        figure = Figure((width, height), layout="constrained")
        draw(figure)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    return Markup(_inline(out.getvalue(), title, round(width * 72 * SMALLEST_SCALE)))


def _inline(svg: str, title: str, width: int) -> str:
    """Turn an SVG file into an element: no prologue, no unused ids, fewer decimals, CSS colours."""
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None
    body = svg[svg.index(">") + 1 :].strip()
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))

    def clean(tag: re.Match[str]) -> str:
        kept = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", tag[0])
        if not kept.startswith("<image"):  # its scale is stretched by as many pixels as it has
            kept = re.sub(r"(\.\d\d)\d+", r"\1", kept)
        return kept.replace("xlink:href", "href").replace(f": {INK}", ": currentColor")

    body = re.sub(r"<[^>]+>", clean, body)
    label = escape(title)
    return f'<svg {box[0]} style="min-width: {width}px" role="img" aria-label="{label}">{body}'
