"""What a scan says, for people: a table for the terminal, and a page with pictures that opens offline."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from orchestrator.config import ScanConfig
from orchestrator.mri.dead_experts import dead_by_layer, dead_expert_notes
from orchestrator.mri.expert_advice import expert_advice, expert_advice_notes
from orchestrator.mri.experts import expert_notes, routing_by_layer, summarize_experts
from orchestrator.mri.importance import (
    Cells,
    changed_by,
    distance_by,
    importance_by,
    not_finite,
)
from orchestrator.mri.prescription import LEAST_DISPERSION, prescribe
from workers.checkpoints import COMPONENTS
from workers.errors import BadInputError
from workers.merging.plan import BASE

TEMPLATE_FILE = "scan.html.jinja"
PLACE = ("component", "layer")
MOST_PAIRS = 3
"""So many pairs of checkpoints fit beside each other into a table."""
MOST_BROKEN = 8
"""So many tensors that are not finite are named one by one."""


def summarize(scan: dict[str, Any]) -> dict[str, Any]:
    """Per component: tensors, elements, static importance of each parent, and how far pairs are apart."""
    parents, static = parents_of(scan), scan["static"]
    pairs = list(dict.fromkeys(pair for row in static for pair in row["between"]))
    importance = importance_by(static, parents, "component")
    distance = {pair: distance_by(static, pair, "component") for pair in pairs}
    changed = {pair: changed_by(static, pair, "component") for pair in pairs}
    components = [
        {
            "component": component,
            "tensors": len(rows),
            "elements": sum(row["elements"] for row in rows),
            "importance": {p: importance[p].get((component,)) for p in parents},
            "between": {
                pair: {
                    "relative_distance": distance[pair].get((component,)),
                    "changed": changed[pair].get((component,)),
                }
                for pair in pairs
            },
        }
        for component in COMPONENTS
        if (rows := [row for row in static if row["component"] == component])
    ]
    return {
        "components": components,
        "pairs": pairs,
        "not_finite": [
            {"of": name, "tensor": tensor, "nan": nan, "inf": inf}
            for name, tensor, nan, inf in not_finite(scan["static"])
        ],
        "left_out": {name: len(tensors) for name, tensors in scan["left_out"].items()},
        "advice": advice(scan),
        "expert_advice": expert_advice(scan),
        "experts": summarize_experts(routing_by_layer(scan)),
        "dead_experts": dead_by_layer(scan),
    }


def advice(scan: dict[str, Any]) -> dict[str, Any]:
    """What a campaign would take from this scan: the shares by component, and whether they tell anything.

    As with a campaign's own settings if these are the defaults. `problem` says why there is none.
    """
    parents = parents_of(scan)
    if len(parents) < 2:
        return {"problem": "one parent alone has no shares"}
    rows = {row["tensor"]: row for row in scan["static"]}
    try:
        found = prescribe(scan, rows.keys(), ScanConfig.alpha)
    except BadInputError as error:
        return {"problem": str(error)}
    elements: dict[str, int] = {}
    shares: dict[str, dict[str, float]] = {}
    for name, share in found.shares.items():
        component, count = rows[name]["component"], rows[name]["elements"]
        elements[component] = elements.get(component, 0) + count
        total = shares.setdefault(component, dict.fromkeys(parents, 0.0))
        for parent in parents:
            total[parent] += share[parent] * count
    return {
        "dispersion": found.dispersion,
        "is_telling": found.is_telling,
        "shares": {
            component: {parent: part / elements[component] for parent, part in own.items()}
            for component in COMPONENTS
            if (own := shares.get(component)) is not None
        },
    }


def parents_of(scan: dict[str, Any]) -> list[str]:
    """The parents' names, the father's first."""
    return [parent["name"] for parent in scan["parents"]]


def render_summary(scan: dict[str, Any]) -> RenderableType:
    """The summary for a terminal."""
    summary = summarize(scan)
    parents = parents_of(scan)
    pairs = _most_telling(summary["pairs"])
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="none")
    table.add_column("component")
    for title in ("tensors", "elements", *(f"{p}\nimportance" for p in parents)):
        table.add_column(title, justify="right")
    for pair in pairs:
        table.add_column(f"{pair_title(pair)}\ndistance, changed", justify="right")
    for row in summary["components"]:
        table.add_row(
            row["component"],
            f"{row['tensors']:,}",
            f"{row['elements']:,}",
            *(number(row["importance"][parent]) for parent in parents),
            *(
                f"{percent(between['relative_distance'])}, {percent(between['changed'])}"
                for between in (row["between"][pair] for pair in pairs)
            ),
        )
    return Group(table, *notes(summary))


def _most_telling(pairs: list[str]) -> list[str]:
    """The pairs for which a table has room: those with the base first."""
    if len(pairs) <= MOST_PAIRS:
        return pairs
    return sorted(pairs, key=lambda pair: BASE not in pair.split("|"))[:MOST_PAIRS]


def notes(summary: dict[str, Any]) -> list[str]:
    """What a reader must know: values that are no numbers, and what was not scanned."""
    broken = summary["not_finite"]
    found = [
        f"not finite: {row['tensor']} of {row['of']}: {row['nan']:,} NaN, {row['inf']:,} infinite"
        for row in broken[:MOST_BROKEN]
    ]
    if len(broken) > MOST_BROKEN:
        found.append(f"not finite: {len(broken) - MOST_BROKEN:,} more tensors")
    told = [
        *_advice_notes(summary["advice"]),
        *expert_advice_notes(summary["expert_advice"]),
        *expert_notes(summary["experts"]),
        *dead_expert_notes(summary["dead_experts"]),
    ]
    return [*told, *found] + [
        f"left out: {count:,} stored tensors of {name}, which hold no floating point numbers or which "
        "the father lacks"
        for name, count in summary["left_out"].items()
    ]


def _advice_notes(found: dict[str, Any]) -> list[str]:
    if "problem" in found:
        return [f"advises no shares: {found['problem']}"]
    spread = f"advises shares that spread by {found['dispersion']:g}"
    if not found["is_telling"]:
        return [
            f"{spread}, less than {LEAST_DISPERSION}: it tells nothing, and a search will not trust it"
        ]
    shares = (
        f"{component} {' / '.join(f'{share:.2f}' for share in own.values())}"
        for component, own in found["shares"].items()
    )
    names = " / ".join(next(iter(found["shares"].values())))
    return [f"{spread}; by component ({names}): {', '.join(shares)}"]


def build_page(scan: dict[str, Any], places: dict[str, str]) -> str:
    """The HTML page: the same scan, of checkpoints that lie in the same `places`, gives the same bytes."""
    from jinja2 import Environment, StrictUndefined

    from orchestrator.mri.expert_charts import expert_figures, set_figures
    from orchestrator.reporting.charts import parent_colours

    parents = parents_of(scan)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "percent": percent, "pair_title": pair_title}
    text = files(__package__).joinpath(TEMPLATE_FILE).read_text("utf-8")
    summary = summarize(scan)
    return environment.from_string(text).render(
        scan=scan,
        places=places,
        parents=parents,
        colours=parent_colours(parents),
        summary=summary,
        pairs=_most_telling(summary["pairs"]),
        notes=notes(summary),
        figures=[
            *_static_figures(scan, parents),
            *_probe_figures(scan, parents),
            *expert_figures(routing_by_layer(scan), parents),
            *set_figures(scan, parents),
        ],
    )


def _static_figures(scan: dict[str, Any], parents: list[str]) -> list[dict[str, Any]]:
    rows = scan["static"]
    figures = [
        _figure(
            "importance",
            "Static importance",
            "times 100: the mean of entropy, spread and size, the last two relative to the component's "
            "tensors, over the weights. Compare parents, and layers of one component. What lies outside all "
            "layers is the rest.",
            importance_by(rows, parents, *PLACE),
            parents,
        )
    ]
    if scan["base"]:
        figures.append(
            _figure(
                "base",
                "Distance to the base",
                "in percent of the base: L2 norm of the parent's task vector over that of the base's "
                "weights.",
                {parent: distance_by(rows, f"{BASE}|{parent}", *PLACE) for parent in parents},
                parents,
            )
        )
    pairs = {
        pair: distance_by(rows, pair, *PLACE)
        for pair in dict.fromkeys(pair for row in rows for pair in row["between"])
        if BASE not in pair.split("|")
    }
    if pairs:
        figures.append(
            _figure(
                "between",
                "Distance between parents",
                "in percent of the first one: L2 norm of the difference over that of its weights.",
                {pair_title(pair): cells for pair, cells in pairs.items()},
                [],
            )
        )
    return figures


def _probe_figures(scan: dict[str, Any], parents: list[str]) -> list[dict[str, Any]]:
    probe = scan["probe"]
    return [
        _figure(
            f"probe-{number}",
            f"Probe: {name}",
            "cosine distance, times 100, between what a component adds for these prompts and for generic "
            f"ones ({of['prompts']} prompts, mean over the tokens).",
            {
                parent: {
                    (row["component"], row["layer"]): row["mean_token"]
                    for row in probe["parents"][parent][name]
                    if row["mean_token"] is not None
                }
                for parent in parents
            },
            parents,
        )
        for number, (name, of) in enumerate(probe.get("sets", {}).items())
    ]


def _figure(
    name: str, title: str, caption: str, panels: dict[str, Cells], parents: list[str]
) -> dict[str, Any]:
    from orchestrator.mri.charts import heat_maps, highest_value
    from orchestrator.reporting.charts import CHILD_COLOUR, parent_colours

    known = parent_colours(parents)
    return {
        "title": title,
        "caption": caption,
        "highest": hundredths(highest_value(panels)),
        "chart": heat_maps(
            name, title, panels, {p: known.get(p, CHILD_COLOUR) for p in panels}, hundredths
        ),
    }


def hundredths(value: float) -> str:
    """100 times a value."""
    return f"{100 * value:.1f}" if value < 0.9995 else f"{100 * value:.0f}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    """A share; one that is not 0 is never shown as such."""
    if value is None:
        return "-"
    return (
        "<0.01%" if 0 < value < 0.0001 else f"{100 * value:.2f}%" if value < 0.1 else f"{value:.0%}"
    )


def pair_title(pair: str) -> str:
    """What a pair is called: from the first to the second."""
    return pair.replace("|", " to ")
