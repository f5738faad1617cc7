"""The formulas of the first methods, plainly, on whole tensors in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy

from tests.references import Case, Vectors, philox_words


def linear(parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any) -> numpy.ndarray:
    """sum_i w_i x_i / sum_i w_i (arXiv 2203.05482)."""
    weights = values["weight"]
    total = sum(weights.values()) if values.get("normalize", 1.0) else 1.0
    return sum(weights[name] * x for name, x in parents.items()) / total


def slerp(parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any) -> numpy.ndarray:
    """sin((1-t)a)/sin(a) x + sin(ta)/sin(a) y, a line where the angle a is all but 0 or 180 degrees."""
    x, y = parents.values()
    t, norms = values["t"], numpy.linalg.norm(x) * numpy.linalg.norm(y)
    cosine = (x @ y) / norms if norms else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * x + t * y
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


def task_arithmetic(
    parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any
) -> numpy.ndarray:
    """x_0 + lambda sum_i w_i (x_i - x_0) (arXiv 2212.04089)."""
    changes = sum(values["weight"][name] * (x - base) for name, x in parents.items())
    return base + values.get("lambda", 1.0) * changes


def agreeing(
    deltas: Vectors, base: numpy.ndarray, values: dict[str, Any], normalize: float
) -> numpy.ndarray:
    """Elect the sign of sum_i w_i d_i, + for 0, and add up (or average) what has it."""
    weights = values["weight"]
    sign = numpy.where(sum(weights[name] * d for name, d in deltas.items()) < 0, -1.0, 1.0)
    total, divisor = numpy.zeros_like(base), numpy.zeros_like(base)
    for name, delta in deltas.items():
        agrees = delta * sign > 0
        total += weights[name] * delta * agrees
        divisor += weights[name] * agrees
    if values.get("normalize", normalize):
        total /= numpy.where(divisor == 0, 1.0, divisor)
    return base + values.get("lambda", 1.0) * total


def smallest_kept(delta: numpy.ndarray, density: float) -> float:
    """The k-th largest magnitude, k = density x elements, rounded down to 8 bits of mantissa."""
    k = math.ceil(density * delta.size)
    if k == 0:
        return math.inf
    mantissa, exponent = math.frexp(numpy.sort(numpy.abs(delta))[-k])
    return math.ldexp(math.floor(mantissa * 512), exponent - 9)


def ties(parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any) -> numpy.ndarray:
    """Trim, elect, disjoint mean (arXiv 2306.01708)."""
    deltas = {}
    for name, x in parents.items():
        delta = x - base
        deltas[name] = delta * (numpy.abs(delta) >= smallest_kept(delta, values["density"][name]))
    return agreeing(deltas, base, values, normalize=1.0)


def dare_ties(
    parents: Vectors, base: numpy.ndarray, values: dict[str, Any], seeded: tuple[int, str]
) -> numpy.ndarray:
    """Drop at random, rescale by 1/density (arXiv 2311.03099), elect, sum."""
    deltas = {}
    for name, x in parents.items():
        density = values["density"][name]
        kept = philox_words(*seeded, name, x.size) < round(density * 2**32)
        deltas[name] = (x - base) * kept / density if density else numpy.zeros_like(x)
    return agreeing(deltas, base, values, normalize=0.0)


def passthrough(
    parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any
) -> numpy.ndarray:
    return values["scale"] * parents[values["source"]]


REFERENCES = {
    function.__name__: function
    for function in (linear, slerp, task_arithmetic, ties, dare_ties, passthrough)
}

# Of few bits, so that a draw in the sign election is one in fp32 as in float64.
WEIGHTS = {"a": 0.75, "b": 0.3125, "c": 0.5625}
DENSITIES = {"a": 0.5, "b": 0.125, "c": 0.25}
CASES: list[Case] = [
    ("linear", 3, {"weight": WEIGHTS}),
    ("linear", 3, {"weight": WEIGHTS | {"b": -0.3}, "normalize": 0}),
    ("linear", 2, {"weight": 0.5}),
    ("slerp", 2, {"t": 0.3}),
    ("slerp", 2, {"t": 0.999}),
    ("task_arithmetic", 3, {"weight": WEIGHTS}),
    ("task_arithmetic", 3, {"weight": WEIGHTS | {"b": -0.5}, "lambda": 1.7}),
    ("ties", 3, {"weight": WEIGHTS, "density": DENSITIES}),
    ("ties", 3, {"weight": 1.0, "density": 0.2, "lambda": 0.5, "normalize": 0}),
    ("ties", 2, {"weight": {"a": 0.0, "b": 1.0}, "density": {"a": 1.0, "b": 0.5}}),
    ("ties", 2, {"weight": 1.0, "density": {"a": 0.0, "b": 1.0}}),
    ("dare_ties", 3, {"weight": WEIGHTS, "density": DENSITIES}),
    ("dare_ties", 3, {"weight": WEIGHTS, "density": 0.5, "lambda": -0.5, "normalize": 1}),
    ("dare_ties", 2, {"weight": 1.0, "density": {"a": 0.0, "b": 1.0}}),
    ("passthrough", 3, {"source": "b"}),
    ("passthrough", 3, {"source": "b", "scale": -0.7}),
]
