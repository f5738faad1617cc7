"""The methods on whole matrices, plainly, with full decompositions in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy

from tests.references import Case, Vectors

Matrices = dict[str, numpy.ndarray]
"""Parent -> its task vector `[out, in]` times its weight."""


def on_matrices(change: Callable[[Matrices, dict[str, Any]], numpy.ndarray]) -> Any:
    """x_0 + lambda change(w_i (x_i - x_0)) for linear layers, x_0 + lambda mean of these for the rest."""

    def reference(
        parents: Vectors, base: numpy.ndarray, values: dict[str, Any], seeded: tuple[int, str]
    ) -> numpy.ndarray:
        deltas = {name: values["weight"][name] * (x - base) for name, x in parents.items()}
        if not is_linear_layer(seeded[1], values["shape"]):
            return base + values["lambda"] * sum(deltas.values()) / len(deltas)
        matrices = {name: delta.reshape(values["shape"]) for name, delta in deltas.items()}
        return base + values["lambda"] * change(matrices, values).reshape(-1)

    return reference


def is_linear_layer(name: str, shape: tuple[int, ...]) -> bool:
    """In the models of the tests, just these are called projections."""
    return (
        len(shape) == 2 and min(shape) > 1 and re.search(r"_proj(_\w+)?\.weight$", name) is not None
    )


@on_matrices
def iso_c(deltas: Matrices, values: dict[str, Any]) -> numpy.ndarray:
    """mean(S) U V^T of the sum (arXiv 2502.04959)."""
    left, strengths, right = numpy.linalg.svd(sum(deltas.values()), full_matrices=False)
    return strengths.mean() * left @ right


@on_matrices
def tsv_m(deltas: Matrices, values: dict[str, Any]) -> numpy.ndarray:
    """Of each the first 1/K of the directions, all of them made orthogonal (arXiv 2412.00081)."""
    share = min(next(iter(deltas.values())).shape) // len(deltas)
    parts = [numpy.linalg.svd(delta, full_matrices=False) for delta in deltas.values()]
    left = nearest_orthogonal(numpy.hstack([part[0][:, :share] for part in parts]))
    right = nearest_orthogonal(numpy.vstack([part[2][:share] for part in parts]))
    return left * numpy.concatenate([part[1][:share] for part in parts]) @ right


def nearest_orthogonal(matrix: numpy.ndarray) -> numpy.ndarray:
    left, _, right = numpy.linalg.svd(matrix, full_matrices=False)
    return left @ right


@on_matrices
def wudi(deltas: Matrices, values: dict[str, Any]) -> numpy.ndarray:
    """sum_i |(d - d_i) d_i^T|^2 / |d_i|^2 made smaller by Adam, from the sum (arXiv 2503.08099)."""
    result = sum(deltas.values())
    mean, square = numpy.zeros_like(result), numpy.zeros_like(result)
    for step in range(1, round(values["steps"]) + 1):
        gradient = sum(2 * (result - d) @ d.T @ d / (d**2).sum() for d in deltas.values())
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        root = numpy.sqrt(square / (1 - 0.999**step))
        result = result - values["learning_rate"] * mean / (1 - 0.9**step) / (root + 1e-8)
    return result


def svc(
    parents: Vectors, base: numpy.ndarray, values: dict[str, Any], seeded: tuple[int, str]
) -> numpy.ndarray:
    """Singular values times K / sum_i max(alpha, p_i) (arXiv 2602.05536); what the method before it has
    made is `values["out"]`."""
    if not is_linear_layer(seeded[1], values["shape"]):
        return values["out"]
    merged = (values["out"] - base).reshape(values["shape"])
    left, strengths, right = numpy.linalg.svd(merged, full_matrices=False)
    projections = []
    for x in parents.values():
        responses = left.T @ (x - base).reshape(values["shape"])
        overlaps = (left.T @ merged * responses).sum(axis=1)
        projections.append(overlaps / (responses**2).sum(axis=1))
    factors = len(parents) / numpy.maximum(projections, values["alpha"]).sum(axis=0)
    return base + (left * (factors * strengths) @ right).reshape(-1)


REFERENCES = {"iso_c": iso_c, "tsv_m": tsv_m, "wudi": wudi, "svc": svc}

TOLERANCES = {"wudi": 1e-7}
"""Adam's steps, of 1e-5, are taken in fp32: 1 % of a step."""

WEIGHTS = {"a": 0.75, "b": 0.3125, "c": 0.5625}
CASES: list[Case] = [
    ("iso_c", 3, {}),
    ("iso_c", 2, {"weight": {"a": 0.75, "b": -0.5}, "lambda": 1.5}),
    ("iso_c", 1, {"lambda": 0.5}),
    ("tsv_m", 3, {}),
    ("tsv_m", 3, {"weight": WEIGHTS, "lambda": 0.7}),
    ("tsv_m", 2, {}),
    ("wudi", 2, {}),
    ("wudi", 3, {"weight": WEIGHTS, "lambda": 0.5, "steps": 20, "learning_rate": 1e-4}),
    ("svc", 3, {}),
    ("svc", 2, {"alpha": 0.5}),
]
