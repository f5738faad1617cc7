"""karcher: the Riemannian centre of mass of the parents on a sphere (arXiv 2603.04972)."""

from __future__ import annotations

import math
from functools import lru_cache

from workers.merging.methods.gram import Matrix, combine, is_finite, parents_gram, weights_cancel
from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register

ANTIPODAL = 1e-6
"""Closer to a half turn than this there is no direction to go."""


@lru_cache(1024)
def coefficients(
    gram: Matrix, weights: tuple[float, ...], most: int, tolerance: float
) -> tuple[float, ...]:
    """c_i of sum_i c_i x_i, found by steps along the mean of the logarithms.

    Everything happens in the span of the parents, whose angles the Gram matrix has.
    """
    total = sum(weights)
    weights = tuple(weight / total for weight in weights)
    norms = [math.sqrt(row[i]) if row[i] > 0.0 else 0.0 for i, row in enumerate(gram)]
    there = [i for i, norm in enumerate(norms) if norm > 0.0]
    share = sum(weights[i] for i in there)
    if not is_finite(gram) or not there or share == 0.0:
        return weights
    cosines = [[_clamp(gram[i][j] / (norms[i] * norms[j])) for j in there] for i in there]
    units = _mean_direction(cosines, [weights[i] / share for i in there], most, tolerance)
    mean_norm = sum(weight * norm for weight, norm in zip(weights, norms, strict=True))
    found = dict(zip(there, units, strict=True))
    return tuple(
        found[i] * mean_norm / norms[i] if i in found else 0.0 for i in range(len(weights))
    )


def _mean_direction(
    cosines: list[list[float]], weights: list[float], most: int, tolerance: float
) -> list[float]:
    """The unit vector of least mean squared angle to unit vectors u_i, as coefficients of these."""
    size = range(len(weights))

    def products(mean: list[float]) -> list[float]:
        return [sum(cosines[i][j] * mean[j] for j in size) for i in size]

    def length(vector: list[float]) -> float:
        square = sum(one * other for one, other in zip(vector, products(vector), strict=True))
        return math.sqrt(max(square, 0.0))

    mean = weights
    if length(mean) < tolerance or length(mean) == 0.0:
        mean = [float(i == 0) for i in size]
    mean = [part / length(mean) for part in mean]
    for _ in range(most):
        # The logarithm of u_i at the mean m is angle / sin(angle) * (u_i - cos(angle) m).
        angles_cosines = [_clamp(product) for product in products(mean)]
        steps = [
            weight * _angle_by_sine(cosine)
            for weight, cosine in zip(weights, angles_cosines, strict=True)
        ]
        back = sum(step * cosine for step, cosine in zip(steps, angles_cosines, strict=True))
        tangent = [step - back * part for step, part in zip(steps, mean, strict=True)]
        angle = length(tangent)
        if angle < tolerance or angle == 0.0:
            break
        mean = [
            math.cos(angle) * part + math.sin(angle) * step / angle
            for part, step in zip(mean, tangent, strict=True)
        ]
        mean = [part / length(mean) for part in mean]
    return mean


def _angle_by_sine(cosine: float) -> float:
    angle = math.acos(cosine)
    if angle > math.pi - ANTIPODAL:
        return 0.0
    return angle / math.sin(angle) if angle > 0.0 else 1.0


def _clamp(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))


def merge(piece: Slice, values: Values) -> None:
    """out = the point of the sphere with the least sum_i w_i angle(x_i)^2, times the mean of the |x_i|.

    With two parents and weights 1 - t and t its direction is slerp's. A parent that is zero has a part in
    the mean length but none in the direction. Weights are ours: mergekit's are equal, as the defaults are.
    An antipode of the mean does not pull; in mergekit its pull is a rounding error times a large number.
    """
    weights = tuple(values["weight"][name] for name in piece.parents)
    found = coefficients(piece.statistic, weights, int(values["max_iter"]), values["tol"])
    combine(piece.parents.values(), found, None, piece.out)


def check(values: Values) -> str | None:
    if values["max_iter"] != int(values["max_iter"]):
        return f"parameter 'max_iter': {values['max_iter']:g} is not a whole number"
    return weights_cancel(values["weight"])


register(
    MergeMethod(
        name="karcher",
        summary="Riemannian mean of the parents on a sphere (arXiv 2603.04972)",
        parameters=(
            Parameter("weight", "per_parent", default=1.0),
            Parameter("max_iter", "shared", low=1.0, high=1000.0, default=10.0),
            Parameter("tol", "shared", low=0.0, high=1.0, default=1e-5),
        ),
        merge=merge,
        check=check,
        statistic=parents_gram,
    )
)
