"""The formulas of the first methods, plainly, on whole tensors in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy

from tests.references import Case, Vectors


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
    """x_0 + lambda sum_i w_i (x_i - x_0) (arXiv 2212.04089), divided by sum_i w_i if so wanted."""
    changes = sum(values["weight"][name] * (x - base) for name, x in parents.items())
    divisor = sum(values["weight"].values()) if values.get("normalize", 0.0) else 1.0
    return base + values.get("lambda", 1.0) * changes / divisor


def passthrough(
    parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any
) -> numpy.ndarray:
    return values["scale"] * parents[values["source"]]


REFERENCES = {
    function.__name__: function for function in (linear, slerp, task_arithmetic, passthrough)
}

WEIGHTS = {"a": 0.75, "b": 0.3125, "c": 0.5625}
CASES: list[Case] = [
    ("linear", 3, {"weight": WEIGHTS}),
    ("linear", 3, {"weight": WEIGHTS | {"b": -0.3}, "normalize": 0}),
    ("linear", 2, {"weight": 0.5}),
    ("slerp", 2, {"t": 0.3}),
    ("slerp", 2, {"t": 0.999}),
    ("task_arithmetic", 3, {"weight": WEIGHTS}),
    ("task_arithmetic", 3, {"weight": WEIGHTS | {"b": -0.5}, "lambda": 1.7}),
    ("task_arithmetic", 3, {"weight": WEIGHTS, "lambda": 1.7, "normalize": 1}),
    ("passthrough", 3, {"source": "b"}),
    ("passthrough", 3, {"source": "b", "scale": -0.7}),
]
