"""The gates before a child is published: verdicts from what was measured. Bounds: docs/campaigns.md."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.config import HealthConfig
from orchestrator.descent.shares import parent_shares

EXPECTED_CHANGES = 16
"""A blend is expected to change a tensor if so many of the sampled elements should have moved visibly."""

VISIBLE_STEPS = 2.0
"""A mother's part in an element is visible if it makes so many steps of bfloat16."""

LEAST_SPREAD = 0.01
"""Parents' outputs are taken to be at least so far apart: of near twins any child would be far off."""

BOUNDED = ("nearswap",)
"""Methods that go an absolute step at most: how many steps of bfloat16 that is depends on the values."""

EXTREME = 4.0
"""So many times beyond the bound, a layer's warning becomes a failure."""

EXTREME_DISTANCE = 0.5
"""And only where its output has turned so far from every parent's: a mean cosine of a half."""


@dataclass(frozen=True)
class Gate:
    """The verdict of one gate."""

    name: str
    passed: bool
    finding: str
    """What was measured, in words."""
    bound: str
    """What had to be so."""
    warnings: tuple[str, ...] = ()


def summarize(gates: list[Gate], health: HealthConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """What lineage, card and report say of the gates, as data."""
    return {
        "rejected": rejecting(gates, health),
        "allowed": [g.name for g in gates if not g.passed and g.name in health.allow],
        "gates": [
            {
                "name": gate.name,
                "result": _result(gate, health),
                "finding": gate.finding,
                "bound": gate.bound,
                "warnings": list(gate.warnings),
            }
            for gate in gates
        ],
        "measured": measured,
    }


def rejecting(gates: list[Gate], health: HealthConfig) -> list[str]:
    """The names of the gates that keep the child from being published."""
    return [gate.name for gate in gates if not gate.passed and gate.name not in health.allow]


def _result(gate: Gate, health: HealthConfig) -> str:
    if gate.passed:
        return "warning" if gate.warnings else "passed"
    return "failed, allowed" if gate.name in health.allow else "failed"


# -- what the written bytes tell -------------------------------------------------------------


def weight_gates(
    tensors: list[dict[str, Any]], parents: list[str], health: HealthConfig
) -> list[Gate]:
    """`finite`, `different` and `changed`, from `child_writer.ChildReport.tensors`."""
    return [
        _finite(tensors),
        _different(tensors, parents, health),
        _changed(tensors, parents),
    ]


def _finite(tensors: list[dict[str, Any]]) -> Gate:
    bad = [tensor for tensor in tensors if tensor.get("broken")]
    finding = f"all of {len(tensors)} tensors are finite"
    if bad:
        finding = (
            f"{bad[0]['name']} has {bad[0]['broken']} elements that are NaN or infinite "
            f"({len(bad)} such tensors)"
        )
    elif any(tensor["not_finite"] for tensor in tensors):
        finding = "what is NaN or infinite is the father's own, copied"
    return Gate("finite", not bad, finding, "no NaN or infinity but what is copied from the father")


def _different(tensors: list[dict[str, Any]], parents: list[str], health: HealthConfig) -> Gate:
    found, passed = [], True
    for parent in parents:
        counts: dict[str, list[int]] = {}
        for tensor in tensors:
            total = counts.setdefault(tensor["component"], [0, 0])
            for number, count in enumerate(tensor.get("moved", {}).get(parent, ())):
                total[number] += count
        shares = {c: moved / looked for c, (moved, looked) in counts.items() if looked}
        if not shares:
            # Parts that an older version wrote: their elements were counted, but not sampled.
            missing = any(t["elements"] and parent in t["changed"] for t in tensors)
            passed = passed and not missing
            found.append(f"{parent}: {'not measured' if missing else 'no tensor to compare'}")
            continue
        component = max(shares, key=lambda name: shares[name])
        passed = passed and shares[component] >= health.difference
        found.append(f"{parent}: {shares[component]:.2%} of {component}")
    return Gate(
        "different",
        passed,
        "; ".join(found),
        f"from each parent, {health.difference:.2%} or more of a component by two steps of bfloat16 or more",
    )


def _changed(tensors: list[dict[str, Any]], parents: list[str]) -> Gate:
    blended = [tensor for tensor in tensors if tensor["method"] != "passthrough"]
    missed = [tensor["name"] for tensor in blended if _should_have_changed(tensor, parents)]
    miscopied = [tensor for tensor in tensors if tensor.get("miscopied")]
    found = []
    if missed:
        found.append(
            f"{len(missed)} of {len(blended)} blended tensors have the father's values alone, such as "
            f"{missed[0]}"
        )
    if miscopied:
        first = miscopied[0]
        found.append(
            f"{len(miscopied)} copied tensors are not their source's, such as {first['name']}, of which "
            f"{first['miscopied']} elements differ from {first['parameters']['source']}"
        )
    return Gate(
        "changed",
        not found,
        "; ".join(found) or f"{len(blended)} blended, {len(tensors) - len(blended)} copied",
        "every tensor that is blended, of parents that differ there, differs from the father; every one "
        "that is copied is its source's",
    )


def _should_have_changed(tensor: dict[str, Any], parents: list[str]) -> bool:
    """Whether a blend that left the father's values had enough of a mother to be seen."""
    if tensor["method"] in BOUNDED:
        return False
    values = tensor["parameters"]
    for mother, counts in tensor.get("reach", {}).items():
        part = _part(tensor, parents, mother)
        visible = sum(n for k, n in enumerate(counts) if 2**k * part >= VISIBLE_STEPS)
        density = values.get("density", 1.0)
        kept = density.get(mother, 1.0) if isinstance(density, dict) else density
        if visible * kept >= EXPECTED_CHANGES:
            return True
    return False


def _part(tensor: dict[str, Any], parents: list[str], mother: str) -> float:
    """How much of the mother's distance the blend should go, at least."""
    values = tensor["parameters"]
    share = abs(parent_shares(tensor["method"], values, parents)[mother])
    factor: float = abs(values.get("lambda", 1.0))
    # A sum of task vectors that is not divided by the weights goes no further than they say.
    is_normalized = values.get("normalize", values.get("normalize_weights", "lambda" not in values))
    if "weight" in values and not is_normalized:
        weight: float = abs(values["weight"].get(mother, 0.0))
        return min(share, weight * factor)
    return min(share, share * factor)


# -- what the live model tells ---------------------------------------------------------------


def engine_gates(measured: dict[str, Any], health: HealthConfig) -> list[Gate]:
    """`perplexity`, `repetition`, `endings` and `layers`, from `workers.evaluation.health.examine`."""
    models = dict(measured["models"])
    child = models.pop("child")
    return [
        _perplexity(child, models, measured, health),
        _share_of_prompts("repetition", "looping", "loops", child, models, health.repetition),
        _share_of_prompts("endings", "cut", "hits the limit", child, models, health.endings),
        _layers(measured["layers"], models, health),
    ]


def _perplexity(
    child: dict[str, Any],
    parents: dict[str, dict[str, Any]],
    measured: dict[str, Any],
    health: HealthConfig,
) -> Gate:
    own = child["perplexity"]
    others = {name: parent["perplexity"] for name, parent in parents.items()}
    known = [value for value in others.values() if value is not None]
    # Where no parent has one there is nothing to hold against a child that has.
    worst = max(known, default=float("inf"))
    passed = own is not None and own <= health.perplexity * worst
    listed = ", ".join(f"{name} {_number(value)}" for name, value in others.items())
    return Gate(
        "perplexity",
        passed,
        f"{_number(own)} on the {measured['text']} ({listed})",
        f"at most {health.perplexity:g} times the worst parent's",
    )


def _share_of_prompts(
    name: str,
    key: str,
    words: str,
    child: dict[str, Any],
    parents: dict[str, dict[str, Any]],
    margin: float,
) -> Gate:
    own = child["generations"]
    worst = max(parent["generations"][key] for parent in parents.values())
    passed = own[key] <= worst + margin * own["prompts"]
    finding = (
        f"{words} after {own[key]} of {own['prompts']} prompts, the worst parent after {worst}"
    )
    if not passed and key == "looping":
        finding += f": {own['examples'][0]!r}"
    return Gate(name, passed, finding, f"at most {margin:.0%} of the prompts more than that parent")


def _layers(layers: list[dict[str, Any]], parents: Iterable[str], health: HealthConfig) -> Gate:
    if not layers:
        unseen = "not measured, as the decoder layers were not found in the model"
        return Gate("layers", True, unseen, "none", (f"layers: {unseen}",))
    warnings = [
        f"layer {first}: the output of the parent {name} holds NaN or infinite values"
        for name in parents
        if (first := next((x["layer"] for x in layers if name in x["broken"]), None)) is not None
    ]
    failures: list[str] = []
    for layer in layers:
        for message, extreme in [
            *_interference(layer, health.interference),
            *_function_loss(layer, health.function_loss),
        ]:
            (failures if extreme else warnings).append(f"layer {layer['layer']}: {message}")
    finding = "; ".join([*failures, *warnings][:3]) or f"{len(layers)} layers like the parents'"
    return Gate(
        "layers",
        not failures,
        finding,
        f"no layer's output beyond {health.interference:g} times the parents' distance, no contribution "
        f"under {health.function_loss:g} of the parents' least; {EXTREME:g} times worse fails",
        (*failures, *warnings),
    )


def _interference(layer: dict[str, Any], bound: float) -> list[tuple[str, bool]]:
    if "child" in layer["broken"]:
        return [("its output holds NaN or infinite values", True)]
    nearest, spread = layer["nearest"], layer["spread"]
    if nearest is None or spread is None:
        return []
    limit = bound * max(spread, LEAST_SPREAD)
    if nearest <= limit:
        return []
    extreme = nearest > EXTREME * limit and nearest > EXTREME_DISTANCE
    message = (
        f"interference: its output is {nearest:.3g} from every parent's, these {spread:.3g} apart"
    )
    return [(message, extreme)]


def _function_loss(layer: dict[str, Any], bound: float) -> list[tuple[str, bool]]:
    contributions = dict(layer["contribution"])
    own = contributions.pop("child")
    known = [value for value in contributions.values() if value is not None]
    if own is None or not known:
        return []  # said by its output
    least = min(known)
    if own >= bound * least:
        return []
    message = f"function loss: it adds {own:.3g} of what comes in, a parent at least {least:.3g}"
    return [(message, own < bound * least / EXTREME)]


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"
