"""Methods on spheres and with angles, as they are told: on whole vectors, step by step, in float64."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy

from tests.references import Case, Vectors


def arc(one: numpy.ndarray, two: numpy.ndarray, t: float) -> numpy.ndarray:
    """Spherical interpolation of two vectors; a line if they are parallel or one is zero."""
    norms = numpy.linalg.norm(one) * numpy.linalg.norm(two)
    cosine = numpy.clip((one @ two) / norms, -1.0, 1.0) if norms else 1.0
    if abs(cosine) > 1.0 - 1e-14:
        return (1 - t) * one + t * two
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * two) / math.sin(angle)


def rows(vector: numpy.ndarray, shape: tuple[int, ...]) -> numpy.ndarray:
    """`[rows, columns]`; a vector is one row."""
    return vector.reshape((shape[0], -1) if len(shape) > 1 else (1, -1))


def nuslerp(parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any) -> numpy.ndarray:
    one, two = (x - base for x in parents.values())
    first, second = values["weight"].values()
    t = second / (first + second)
    if values["flatten"]:
        return base + arc(one, two, t)
    pairs = zip(rows(one, values["shape"]), rows(two, values["shape"]), strict=True)
    return base + numpy.concatenate([arc(*pair, t) for pair in pairs])


def multislerp(
    parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any
) -> numpy.ndarray:
    """Logarithms at the weighted mean direction, their weighted mean, and back (goddard.blog, 2025)."""
    weights = numpy.array([values["weight"][name] for name in parents])
    if values["normalize_weights"]:
        weights = weights / weights.sum()
    vectors = numpy.stack([x - base for x in parents.values()])
    norms = numpy.linalg.norm(vectors, axis=1)
    units = vectors / (norms + values["eps"])[:, None]
    mean = weights @ units
    if numpy.linalg.norm(mean) <= values["eps"]:
        return base + weights @ vectors
    mean = mean / numpy.linalg.norm(mean)
    tangent = weights @ (units - numpy.outer(units @ mean, mean))
    angle = numpy.linalg.norm(tangent)
    direction = mean * math.cos(angle) + tangent * numpy.sinc(angle / math.pi)
    return base + direction * (weights @ norms)


def karcher(parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any) -> numpy.ndarray:
    """The fixed point of m = exp_m(mean log_m u_i) (arXiv 2603.04972), times the mean length."""
    weights = numpy.array([values["weight"][name] for name in parents])
    weights = weights / weights.sum()
    vectors = numpy.stack(list(parents.values()))
    norms = numpy.linalg.norm(vectors, axis=1)
    if not norms.any():
        return vectors[0]
    units = vectors[norms > 0] / norms[norms > 0, None]
    shares = weights[norms > 0] / weights[norms > 0].sum()
    mean = shares @ units
    if numpy.linalg.norm(mean) < values["tol"]:
        mean = units[0]
    mean = mean / numpy.linalg.norm(mean)
    for _iteration in range(int(values["max_iter"])):
        tangent = numpy.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            cosine = numpy.clip(unit @ mean, -1.0, 1.0)
            angle = math.acos(cosine)
            if 0.0 < angle < math.pi - 1e-6:
                tangent += share * angle / math.sin(angle) * (unit - cosine * mean)
        length = numpy.linalg.norm(tangent)
        if length < values["tol"]:
            break
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
        mean = mean / numpy.linalg.norm(mean)
    return mean * (weights @ norms)


def model_stock(
    parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any
) -> numpy.ndarray:
    """x_0 + t mean d_i, t = K cos / (1 + (K-1) cos) of the mean cosine (arXiv 2403.19522)."""
    shape = values["shape"] if values["filter_wise"] else ()
    deltas = [rows(x - base, shape) for x in parents.values()]
    cosines = []
    for one, two in combinations(deltas, 2):
        norms = numpy.linalg.norm(one, axis=1) * numpy.linalg.norm(two, axis=1)
        cosines.append((one * two).sum(axis=1) / numpy.where(norms == 0, 1.0, norms))
    cosine = numpy.maximum(numpy.mean(cosines, axis=0), 0.0)
    t = len(deltas) * cosine / (1 + (len(deltas) - 1) * cosine)
    return base + (t[:, None] * numpy.mean(deltas, axis=0)).reshape(-1)


def nearswap(
    parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any
) -> numpy.ndarray:
    """(1 - w) x_1 + w x_2, w = t / |x_1 - x_2| but at most 1."""
    one, two = parents.values()
    distance = numpy.abs(two - one)
    share = numpy.where(distance <= values["t"], 1.0, values["t"] / (distance + (distance == 0)))
    return (1 - share) * one + share * two


def arcee_fusion(
    parents: Vectors, base: numpy.ndarray, values: dict[str, Any], _: Any
) -> numpy.ndarray:
    """x_2 where |x_2 - x_1| KL(softmax x_2 || softmax x_1) >= median + 1.5 (Q3 - Q1), else x_1."""
    one, two = (rows(x, values["shape"]) for x in parents.values())
    log_one, log_two = (x - numpy.logaddexp.reduce(x, axis=1, keepdims=True) for x in (one, two))
    divergence = (numpy.exp(log_two) * (log_two - log_one)).sum(axis=1, keepdims=True)
    importance = (numpy.abs(two - one) * divergence.clip(0.0)).reshape(-1)
    first, median, third = (
        in_steps(numpy.sort(importance)[int(share * (importance.size - 1))])
        for share in (0.25, 0.5, 0.75)
    )
    taken = importance >= median + 1.5 * (third - first)
    return numpy.where(taken, two.reshape(-1), one.reshape(-1))


def in_steps(value: float) -> float:
    """Rounded down to 8 bits of mantissa, in which quartiles are told."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.floor(mantissa * 512), exponent - 9)


REFERENCES = {
    function.__name__: function
    for function in (nuslerp, multislerp, karcher, model_stock, nearswap, arcee_fusion)
}

WEIGHTS = {"a": 0.75, "b": 0.3, "c": 0.55}
CASES: list[Case] = [
    ("nuslerp", 2, {"weight": {"a": 0.75, "b": 0.3}}),
    ("nuslerp", 2, {"weight": {"a": -0.25, "b": 1.0}}),
    ("nuslerp", 2, {"weight": {"a": 0.75, "b": 0.3}, "flatten": 0}),
    ("multislerp", 3, {"weight": WEIGHTS}),
    ("multislerp", 3, {"weight": WEIGHTS | {"c": -0.1}, "normalize_weights": 0, "eps": 1e-3}),
    ("karcher", 3, {}),
    ("karcher", 3, {"weight": WEIGHTS, "max_iter": 3}),
    ("karcher", 3, {"weight": WEIGHTS, "max_iter": 100, "tol": 1e-12}),
    ("model_stock", 2, {}),
    ("model_stock", 3, {"filter_wise": 1}),
    ("nearswap", 2, {"t": 0.01}),
    ("nearswap", 2, {"t": 1.0}),
    ("arcee_fusion", 2, {}),
]
