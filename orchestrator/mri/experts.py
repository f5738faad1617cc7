"""What a scan's probe says of experts and routers: over its sets, by layer, and in a few words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from workers.storage import ObjectNotFoundError, Store
from workers.storage.documents import anything, damage_named, read_document, table

ROUTING_FILE = "experts.json"
"""In a campaign's store: `routing_by_layer` of its parents, for the report."""

Routing = dict[str, Any]
"""As in a scan's rows; see docs/diagnostics.md, Experts."""

RoutingByLayer = dict[str, dict[int, Routing]]
"""Parent -> layer with experts -> what was found there."""

LEAST_AGREEMENT = 0.1
"""Of the way from chance to full overlap: with less, parents do not number their experts alike."""

DIGITS = 4
"""Significant ones that are kept of a mean for the report."""


def routing_by_layer(scan: dict[str, Any], called: str | None = None) -> RoutingByLayer:
    """What the probe found with the set that is `called` so, or with all sets together; none of dense
    parents."""
    found: RoutingByLayer = {}
    for parent, sets in (scan["probe"] or {"parents": {}})["parents"].items():
        layers: dict[int, list[Routing]] = {}
        for name, rows in sets.items():
            for row in (row for row in rows if "routing" in row and called in (None, name)):
                layers.setdefault(row["layer"], []).append(row["routing"])
        if layers:
            found[parent] = {layer: combine(layers[layer]) for layer in sorted(layers)}
    return found


def combine(parts: list[Routing]) -> Routing:
    """What a layer did with all tokens, from what it did with those of each set."""
    tokens = [part["tokens"] for part in parts]
    choices = [sum(counts) for counts in zip(*(part["choices"] for part in parts), strict=True)]
    found: Routing = {
        "tokens": sum(tokens),
        "per_token": parts[0]["per_token"],
        "choices": choices,
        "load_entropy": _entropy(choices),
    }
    for key in ("weights", "merit"):
        if all(key in part for part in parts):
            by_expert = zip(*(part[key] for part in parts), strict=True)
            found[key] = [_mean(values, tokens) for values in by_expert]
    if all("token_entropy" in part for part in parts):
        found["token_entropy"] = _mean((part["token_entropy"] for part in parts), tokens)
    if all("overlap" in part for part in parts):
        found["overlap"] = {
            other: _mean((part["overlap"][other] for part in parts), tokens)
            for other in parts[0]["overlap"]
        }
    return found


def relative_frequency(routing: Routing) -> list[float]:
    """By expert: how often it was chosen, times what each would be at an even load."""
    return _relative(routing["choices"])


def relative_merit(routing: Routing) -> list[float]:
    """By expert: its merit over the mean of its layer's experts. Empty if it was not measured."""
    return _relative(routing.get("merit", []))


def summarize_experts(found: RoutingByLayer) -> dict[str, Any]:
    """Parent -> its number of experts, and how its routers are, as means over its layers and at the least.

    Entropies are in bits.
    """
    return {
        parent: {
            "experts": max(len(routing["choices"]) for routing in layers.values()),
            "per_token": max(routing["per_token"] for routing in layers.values()),
            "load_entropy": _over_layers({n: r["load_entropy"] for n, r in layers.items()}),
            "token_entropy": _over_layers(
                {n: r["token_entropy"] for n, r in layers.items() if "token_entropy" in r}
            ),
            "overlap": {
                other: _over_layers(
                    {n: r["overlap"][other] for n, r in layers.items() if other in r["overlap"]}
                )
                for other in dict.fromkeys(o for r in layers.values() for o in r.get("overlap", {}))
            },
        }
        for parent, layers in found.items()
    }


def expert_notes(summary: dict[str, Any]) -> list[str]:
    """`summarize_experts` in lines."""
    lines = []
    for parent, of in summary.items():
        load, token = of["load_entropy"], of["token_entropy"]
        most = math.log2(of["experts"])
        lines.append(
            f"routers of {parent} choose {of['per_token']} of {of['experts']} experts; load entropy "
            f"{load['mean']:.2f} of {most:.2f} bits, least {load['least']:.2f} in layer {load['layer']}"
            + (f"; entropy per token {token['mean']:.2f}" if token else "")
        )
        shares = ", ".join(
            f"{other} {share['mean']:.0%} (least {share['least']:.0%} in layer {share['layer']})"
            for other, share in of["overlap"].items()
        )
        if shares:
            lines.append(
                f"of the experts that {parent} chooses, the routers of others would choose, too: {shares}"
            )
        chance = of["per_token"] / of["experts"]
        lines += [
            f"the router of {other} agrees with {parent} no more than by chance ({chance:.0%}): their "
            "experts may have other numbers, which matching them would show (match_experts)"
            for other, share in of["overlap"].items()
            if share["mean"] - chance < LEAST_AGREEMENT * (1.0 - chance)
        ]
    return lines


def keep_routing(scan: dict[str, Any], store: Store) -> None:
    """Keep what the report of the campaign in `store` shows of its scan's experts, if it has any."""
    found = routing_by_layer(scan)
    if found:
        short = {
            parent: {layer: _shortened(routing) for layer, routing in layers.items()}
            for parent, layers in found.items()
        }
        store.write(ROUTING_FILE, json.dumps(short, separators=(",", ":")).encode())


def kept_routing(store: Store) -> RoutingByLayer:
    """What `keep_routing` has kept; empty if there is nothing."""
    try:
        found = read_document(store, ROUTING_FILE, table(table(table(anything))))
    except ObjectNotFoundError:
        return {}
    with damage_named(f"{store.uri}/{ROUTING_FILE}"):
        return {
            parent: {int(layer): routing for layer, routing in layers.items()}
            for parent, layers in found.items()
        }


def _shortened(routing: Routing) -> Routing:
    numbers = {
        key: [float(f"{value:.{DIGITS}g}") for value in routing[key]]
        for key in ("weights", "merit")
        if key in routing
    }
    return routing | numbers


def _relative(values: list[Any]) -> list[float]:
    total = math.fsum(values)
    return [value * len(values) / total if total else 0.0 for value in values]


def _mean(values: Iterable[float], tokens: list[int]) -> float:
    pairs = zip(values, tokens, strict=True)
    return math.fsum(value * count for value, count in pairs) / sum(tokens)


def _entropy(choices: list[int]) -> float:
    total = sum(choices)
    return abs(math.fsum(count / total * math.log2(count / total) for count in choices if count))


def _over_layers(values: dict[int, float]) -> dict[str, Any] | None:
    if not values:
        return None
    layer = min(values, key=lambda number: values[number])
    mean = math.fsum(values.values()) / len(values)
    return {"mean": mean, "least": values[layer], "layer": layer}
