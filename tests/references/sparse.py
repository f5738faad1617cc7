"""The formulas of the methods that make task vectors sparse, plainly, on whole tensors in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy

from tests.references import Case, Vectors, random_numbers

Values = dict[str, Any]


def floor_of_bin(magnitudes: numpy.ndarray) -> numpy.ndarray:
    """Rounded down to 8 bits of mantissa behind the leading one."""
    mantissa, exponent = numpy.frexp(magnitudes)
    return numpy.ldexp(numpy.floor(mantissa * 512), exponent - 9)


def norm_by_bins(numbers: numpy.ndarray) -> float:
    """The L1 norm, each number taken for the middle of its bin."""
    mantissa, exponent = numpy.frexp(numpy.abs(numbers))
    middles = numpy.ldexp(numpy.floor(mantissa * 512) + 0.5, exponent - 9)
    return float(middles[numbers != 0].sum())


def plain_norm(numbers: numpy.ndarray) -> float:
    return float(numpy.abs(numbers).sum())


def rescaled(
    kept: numpy.ndarray,
    whole: numpy.ndarray,
    rescale: str,
    probability: Any,
    norm: Callable[[numpy.ndarray], float],
) -> numpy.ndarray:
    if rescale == "inverse_density":
        return kept / numpy.where(kept == 0, 1.0, probability)
    left = norm(kept)
    return kept * (norm(whole) / left) if rescale == "l1" and left else kept


def trimmed(delta: numpy.ndarray, density: float) -> numpy.ndarray:
    """What is at least the k-th largest magnitude, k = density x elements, in whole bins."""
    k = max(math.floor(density * delta.size), 1) if density else 0
    if k == 0:
        return numpy.zeros_like(delta)
    bins = floor_of_bin(numpy.abs(delta))
    return delta * (bins >= numpy.sort(bins)[-k])


def middle(delta: numpy.ndarray, density: float, gamma: float) -> numpy.ndarray:
    """Without the gamma largest, as many bins of them as that many elements fill, and without what comes
    after the density next ones."""
    n = delta.size
    k = math.floor(density * n)
    top = min(math.floor(gamma * n), n - k)
    if k == 0:
        return numpy.zeros_like(delta)
    bins = floor_of_bin(numpy.abs(delta))
    falling = numpy.sort(bins)[::-1]
    # A bin goes if all that is in it or above it is among the `top` largest.
    goes = numpy.searchsorted(-falling, -falling, side="right") <= top
    largest = falling[~goes].max()
    return delta * (bins <= largest) * (bins >= falling[top + k - 1])


def dropped(
    delta: numpy.ndarray, probability: Any, name: str, seeded: tuple[int, str]
) -> numpy.ndarray:
    """Each element with its probability."""
    numbers = random_numbers(*seeded, name, delta.size)
    return delta * (numbers < numpy.rint(numpy.asarray(probability) * 2.0**32))


def della_probabilities(
    delta: numpy.ndarray, density: float, epsilon: float, shape: tuple[int, ...]
) -> numpy.ndarray:
    """By rank within each row; rounded as fp32 does, for each bit of it decides about an element."""
    rows = numpy.abs(delta).reshape(shape[0] if len(shape) > 1 else 1, -1)
    epsilon = min(epsilon, density, 1 - density)
    columns = rows.shape[1]
    if columns == 1:
        return numpy.full(delta.size, float(numpy.float32(density)))
    rank = rows.astype("f4").argsort(axis=1, kind="stable").argsort(axis=1).astype("f4")
    step = numpy.float32(2 * epsilon / (columns - 1))
    return (rank * step + numpy.float32(density - epsilon)).astype("f8").reshape(-1)


def added(deltas: Vectors, base: numpy.ndarray, values: Values) -> numpy.ndarray:
    """The weighted sum, divided by that of the weights if normalized."""
    total = sum(values["weight"][name] * delta for name, delta in deltas.items())
    divisor = sum(values["weight"].values()) if values["normalize"] else 1.0
    return base + values["lambda"] * total / divisor


def agreeing(deltas: Vectors, base: numpy.ndarray, values: Values) -> numpy.ndarray:
    """Elect the sign of sum_i w_i d_i, + for 0, and add up (or average) what has it."""
    weights = values["weight"]
    sign = numpy.where(sum(weights[name] * d for name, d in deltas.items()) < 0, -1.0, 1.0)
    total, divisor = numpy.zeros_like(base), numpy.zeros_like(base)
    for name, delta in deltas.items():
        agrees = weights[name] * delta * sign > 0
        total += weights[name] * delta * agrees
        divisor += weights[name] * agrees
    if values["normalize"]:
        total /= numpy.where(divisor == 0, 1.0, divisor)
    return base + values["lambda"] * total


def sparse_then(consensus: Callable[..., numpy.ndarray], kind: str) -> Callable[..., numpy.ndarray]:
    """Sparsify each task vector in one way, rescale it, put them together."""

    def reference(
        parents: Vectors, base: numpy.ndarray, values: Values, seeded: tuple[int, str]
    ) -> numpy.ndarray:
        deltas = {}
        for name, x in parents.items():
            # Rounded as fp32 is, for in which bin a magnitude lies is a matter of its last bit.
            delta, density = (x - base).astype("f4").astype("f8"), values["density"][name]
            probability: Any = density
            norm = norm_by_bins
            if not delta.size or density == 1.0:
                deltas[name] = delta
                continue
            if kind == "magnitude":
                kept = trimmed(delta, density)
            elif kind == "middle":
                kept = middle(delta, density, values["gamma"][name])
            else:
                norm = plain_norm
                if kind == "rank":
                    probability = della_probabilities(
                        delta, density, values["epsilon"][name], values["shape"]
                    )
                kept = dropped(delta, probability, name, seeded)
            deltas[name] = rescaled(kept, delta, values["rescale"], probability, norm)
        return consensus(deltas, base, values)

    return reference


def sce(parents: Vectors, base: numpy.ndarray, values: Values, _: Any) -> numpy.ndarray:
    """Select by variance, weigh by squares, erase minority signs (arXiv 2408.07990)."""
    deltas = numpy.stack([x - base for x in parents.values()])
    share = values["select_topk"]
    if share < 1:
        deviations = deltas - deltas.mean(axis=0)
        # What is equal in all parents has variance 0, whatever the rounding of the mean.
        variance = (deviations**2).sum(axis=0) * (deltas != deltas[:1]).any(axis=0)
        k = math.floor(share * (variance > 0).sum())
        deltas = deltas * (trimmed(variance, (k + 0.5) / variance.size) > 0 if k else 0.0)
    squares = (deltas**2).sum(axis=1)
    weights = squares / squares.sum() if squares.sum() else numpy.full(len(deltas), 1 / len(deltas))
    sign = numpy.where(deltas.sum(axis=0) < 0, -1.0, 1.0)
    counted = weights[:, None] * (deltas * sign > 0)
    divisor = counted.sum(axis=0)
    return base + (counted * deltas).sum(axis=0) / numpy.where(divisor == 0, 1.0, divisor)


def ram(parents: Vectors, base: numpy.ndarray, values: Values, _: Any) -> numpy.ndarray:
    """The mean over those that have changed an element; enlarged by RAM+ where it is one alone."""
    deltas = numpy.stack([x - base for x in parents.values()])
    deltas = deltas * (numpy.abs(deltas) > values["epsilon"])
    contributors = (deltas != 0).sum(axis=0)
    factors = numpy.ones(len(deltas))
    if "r" in values:
        shared = ((deltas != 0) & (contributors > 1)).sum(axis=1)
        unique = ((deltas != 0) & (contributors == 1)).sum(axis=1)
        rho = shared / numpy.maximum(unique, 1e-9)
        factors = 1 + values["r"] * numpy.minimum(rho, values["alpha"])
    factor = numpy.where(contributors == 1, factors[:, None], 1 / numpy.maximum(contributors, 1))
    return base + (deltas * factor).sum(axis=0)


REFERENCES = {
    "ties": sparse_then(agreeing, "magnitude"),
    "breadcrumbs": sparse_then(added, "middle"),
    "breadcrumbs_ties": sparse_then(agreeing, "middle"),
    "dare_linear": sparse_then(added, "random"),
    "dare_ties": sparse_then(agreeing, "random"),
    "della_linear": sparse_then(added, "rank"),
    "della": sparse_then(agreeing, "rank"),
    "sce": sce,
    "ram": ram,
    "ramplus": ram,
}

# Of few bits, so that a draw in the sign election is one in fp32 as in float64.
WEIGHTS = {"a": 0.75, "b": 0.3125, "c": 0.5625}
DENSITIES = {"a": 0.5, "b": 0.125, "c": 0.25}
MIXED = {"a": 0.0, "b": 1.0}
CASES: list[Case] = [
    ("ties", 3, {"weight": WEIGHTS, "density": DENSITIES}),
    ("ties", 3, {"weight": 1.0, "density": 0.2, "lambda": 0.5, "normalize": 0}),
    ("ties", 3, {"weight": WEIGHTS, "density": DENSITIES, "rescale": "l1"}),
    ("ties", 2, {"weight": {"a": 0.875, "b": -0.5}, "density": 0.5, "normalize": 0}),
    ("ties", 2, {"weight": {"a": 0.0, "b": 1.0}, "density": {"a": 1.0, "b": 0.5}}),
    ("ties", 2, {"weight": 1.0, "density": MIXED, "rescale": "inverse_density"}),
    ("breadcrumbs", 3, {"weight": WEIGHTS, "density": DENSITIES}),
    ("breadcrumbs", 2, {"weight": 0.5, "density": 0.9, "gamma": 0.25, "normalize": 1}),
    ("breadcrumbs", 2, {"weight": {"a": 1.0, "b": -0.5}, "density": MIXED, "rescale": "l1"}),
    ("breadcrumbs_ties", 3, {"weight": WEIGHTS, "density": DENSITIES, "gamma": 0.125}),
    ("breadcrumbs_ties", 3, {"weight": WEIGHTS, "density": 0.3, "gamma": 0.2, "rescale": "l1"}),
    ("dare_linear", 3, {"weight": WEIGHTS, "density": DENSITIES}),
    ("dare_linear", 3, {"weight": WEIGHTS, "density": 0.3, "rescale": "l1", "normalize": 1}),
    ("dare_ties", 3, {"weight": WEIGHTS, "density": DENSITIES}),
    ("dare_ties", 3, {"weight": WEIGHTS, "density": 0.3, "rescale": "l1"}),
    ("dare_ties", 3, {"weight": WEIGHTS, "density": 0.5, "lambda": -0.5, "normalize": 1}),
    ("dare_ties", 2, {"weight": 1.0, "density": MIXED, "rescale": "none"}),
    ("della_linear", 3, {"weight": WEIGHTS, "density": DENSITIES, "epsilon": 0.125}),
    ("della_linear", 2, {"weight": 0.5, "density": {"a": 0.9, "b": 0.05}, "rescale": "none"}),
    ("della", 3, {"weight": WEIGHTS, "density": DENSITIES, "epsilon": 0.125}),
    ("della", 3, {"weight": WEIGHTS, "density": 0.5, "lambda": 0.5, "rescale": "l1"}),
    ("della", 2, {"weight": 1.0, "density": MIXED}),
    ("sce", 3, {"select_topk": 0.3}),
    ("sce", 2, {"select_topk": 0.1}),
    ("sce", 3, {}),
    ("ram", 3, {"epsilon": 0.03125}),
    ("ram", 2, {}),
    ("ramplus", 3, {"epsilon": 0.03125, "r": 0.5, "alpha": 2.0}),
    ("ramplus", 2, {}),
]
