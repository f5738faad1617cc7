"""What a scan says of places in a model: how much weighs there, and how far parents are from one another.

A place is what some keys of a row have in common: a component, or a component of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any

NORM_CAP = 4.0
"""An rms of so many times the usual one of the component, and all beyond, counts as 1."""

Place = tuple[Any, ...]
Cells = dict[Place, float]
Row = dict[str, Any]
"""An entry of the scan's `static` part."""


def static_importance(rows: Iterable[Row], parents: list[str]) -> dict[str, dict[str, float]]:
    """Tensor -> parent -> (H + S + N) / 3, between 0 and 1, of those that are finite there.

    H is the entropy. S = std / (std + s), s the median of std over the tensors of the component in all
    parents. N = min(1, rms / (4 m)), m that of rms: rms, as an L2 norm would rank tensors by their size.
    """
    rows = list(rows)
    usual: dict[tuple[str, str], float] = {}
    for component in {row["component"] for row in rows}:
        own = [row for row in rows if row["component"] == component]
        for key in ("std", "rms"):
            values = [row["of"][p][key] for row in own for p in parents if _is_finite(row, p)]
            usual[component, key] = median(values) if values else 0.0

    def importance(row: Row, parent: str) -> float:
        of, component = row["of"][parent], row["component"]
        both, typical = of["std"] + usual[component, "std"], usual[component, "rms"]
        spread = of["std"] / both if both else 0.0
        norm = min(1.0, of["rms"] / (NORM_CAP * typical)) if typical else 0.0
        return math.fsum((of["entropy"], spread, norm)) / 3.0

    return {
        row["tensor"]: {p: importance(row, p) for p in parents if _is_finite(row, p)}
        for row in rows
    }


def importance_by(rows: Iterable[Row], parents: list[str], *keys: str) -> dict[str, Cells]:
    """Parent -> place -> static importance, the mean over the weights of the rows that agree in `keys`."""
    rows = list(rows)
    found = static_importance(rows, parents)

    def mean(parent: str, own: list[Row]) -> float | None:
        known = [row for row in own if parent in found[row["tensor"]]]
        total: int = sum(row["elements"] for row in known)
        weighted = math.fsum(found[row["tensor"]][parent] * row["elements"] for row in known)
        return weighted / total if total else None

    return {parent: _by(rows, keys, partial(mean, parent)) for parent in parents}


def distance_by(rows: Iterable[Row], pair: str, *keys: str) -> Cells:
    """Place -> L2 distance of a pair of checkpoints ("base|father"), as a share of the first one's norm."""

    def relative(own: list[Row]) -> float | None:
        known = [row for row in own if _distance(row, pair) is not None]
        first = pair.split("|")[0]
        norm = math.fsum(row["of"][first]["rms"] ** 2 * row["elements"] for row in known)
        squares = math.fsum(row["between"][pair]["distance"] ** 2 for row in known)
        return math.sqrt(squares / norm) if norm else None

    return _by(rows, keys, relative)


def changed_by(rows: Iterable[Row], pair: str, *keys: str) -> Cells:
    """Place -> share of the elements that differ, of those that both checkpoints of a pair have."""

    def share(own: list[Row]) -> float | None:
        known = [row for row in own if pair in row["between"]]
        total = sum(row["elements"] for row in known)
        changed = math.fsum(row["between"][pair]["changed"] * row["elements"] for row in known)
        return changed / total if total else None

    return _by(rows, keys, share)


def not_finite(rows: Iterable[Row]) -> list[tuple[str, str, int, int]]:
    """(checkpoint, tensor, NaN, infinities) of each tensor that holds any."""
    return [
        (name, row["tensor"], of["nan"], of["inf"])
        for row in rows
        for name, of in row["of"].items()
        if of["nan"] or of["inf"]
    ]


def _by(
    rows: Iterable[Row], keys: tuple[str, ...], combine: Callable[[list[Row]], float | None]
) -> Cells:
    """Place -> what `combine` makes of its rows, where it makes anything."""
    found: dict[Place, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    values = {place: combine(own) for place, own in found.items()}
    return {place: value for place, value in values.items() if value is not None}


def _distance(row: Row, pair: str) -> float | None:
    distance: float | None = row["between"].get(pair, {}).get("distance")
    return distance


def _is_finite(row: Row, name: str) -> bool:
    of = row["of"].get(name)
    return of is not None and of["rms"] is not None and not of["nan"] and not of["inf"]
