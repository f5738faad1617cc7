"""HARC: the router of one layer, calibrated so that merged experts are chosen as the donors chose theirs.

Hessian-aware router calibration ("When Model Merging Breaks Routing: Training-Free Calibration for MoE",
ICML 2026, PMLR v306; public code huangcb01/HARC, read for the formula and its defaults). To second order the
divergence of a donor's routing `p = softmax(W_d x)` from that of a router W is `1/2 y^T H y` with
`y = (W - W_d) x` and `H = diag(p) - p p^T`. The router that has the least of it, over the tokens x that reach
the router of the merged model, solves

    sum_d (1/T_d) sum_x H_d(x) W x x^T  =  sum_d (1/T_d) sum_x H_d(x) W_d x x^T

for W `[E, H]`, which conjugate gradients do without ever forming the E H x E H matrix: a product with it
costs 4 E H operations for each token of each donor (of 512 experts and 4096 channels 8.4 MFLOP: 0.27 TFLOP
for 32,768 tokens), and memory for X `[T, H]` as the model computed it and p `[T, E]` in float64.

H has no power over what all experts have in common: W and W + 1 v^T route alike. The published setting
multiplies the entries of the big matrix off its diagonal by 0.9 (`shrink`), on both sides of the equation.
That makes it positive definite, so W is unique, and that of a single donor is W_d itself. With `shrink` 1
the equation leaves the common part open; conjugate gradients then keep that of the router which they start
from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.errors import BadInputError
from workers.experts.calibration_order import ITERATIONS, SHRINK, TOLERANCE

BLOCK_ELEMENTS = 1 << 22
"""So many elements of the states are float64 at a time."""


@dataclass(frozen=True)
class Donor:
    """A model whose routing is to be kept, in one layer."""

    router: torch.Tensor
    """`[E, H]`, its rows in the order of the merged model's experts."""
    states: Sequence[torch.Tensor]
    """What reaches the merged model's router of the donor's own prompts: `[tokens, H]` of each."""


@dataclass(frozen=True)
class Solution:
    """A calibrated router."""

    router: torch.Tensor
    """float64 `[E, H]`."""
    iterations: int
    residual: float
    """What is left of the equation: |b - A W| / |b|."""
    start: float
    """The same of the router that it was started from."""


class NormalEquations:
    """Both sides of the equation, for the donors of one layer. All arithmetic is float64: residuals of 1e-6
    of the right side would be lost in the rounding of fp32 sums over many tokens."""

    def __init__(self, donors: Sequence[Donor], shrink: float = SHRINK) -> None:
        self._shrink = shrink
        self._states = [donor.states for donor in donors]
        self._probabilities: list[list[torch.Tensor]] = []
        self._diagonal = torch.zeros_like(donors[0].router, dtype=torch.float64)
        self.right = torch.zeros_like(self._diagonal)
        """`[E, H]`."""
        for number, donor in enumerate(donors):
            router = donor.router.double()
            diagonal = torch.zeros_like(self._diagonal)
            self._probabilities.append([])
            for states in donor.states:
                chances = (states.double() @ router.T).softmax(-1)
                self._probabilities[-1].append(chances)
                diagonal += (chances * (1 - chances)).T @ states.double().square()
            diagonal /= self._tokens(number)
            self._diagonal += diagonal
            self.right += shrink * self._whole(number, router) + (1 - shrink) * diagonal * router

    def product(self, router: torch.Tensor) -> torch.Tensor:
        """The left side for W = `router` `[E, H]`."""
        result = (1 - self._shrink) * self._diagonal * router
        for number in range(len(self._states)):
            result += self._shrink * self._whole(number, router)
        return result

    def _tokens(self, number: int) -> int:
        return sum(len(states) for states in self._states[number])

    def _whole(self, number: int, router: torch.Tensor) -> torch.Tensor:
        """The donor's part of the left side with nothing shrunk."""
        result = torch.zeros_like(router)
        for states, chances in zip(self._states[number], self._probabilities[number], strict=True):
            step = max(1, BLOCK_ELEMENTS // states.shape[1])
            for first in range(0, len(states), step):
                x, p = states[first : first + step].double(), chances[first : first + step]
                z = p * (x @ router.T)
                result += (z - p * z.sum(-1, keepdim=True)).T @ x
        return result / self._tokens(number)


def calibrate(
    start: torch.Tensor,
    donors: Sequence[Donor],
    shrink: float = SHRINK,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> Solution:
    """The router `[E, H]` by at most so many `iterations` of conjugate gradients from the router `start`.

    They end when the residual is at most `tolerance` times the right side. The same bits for the same inputs
    and number of threads. Raises `BadInputError` if routers or states are not finite.
    """
    equations = NormalEquations(donors, shrink)
    router = start.double()
    left = equations.right - equations.product(router)
    scale = float(torch.linalg.vector_norm(equations.right))
    square = float(left.square().sum())
    begun = residual = _share(square, scale)
    if not math.isfinite(residual):
        raise BadInputError("a router, or what the prompts give it, is not finite")
    direction = left.clone()
    done = 0
    while done < iterations and residual > tolerance:
        image = equations.product(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0.0:
            break  # rounding: what is left lies where the routing does not depend on the router
        router = router + (square / curvature) * direction
        left = left - (square / curvature) * image
        before, square = square, float(left.square().sum())
        residual = _share(square, scale)
        direction = left + (square / before) * direction
        done += 1
    return Solution(router, done, residual, begun)


def _share(square: float, scale: float) -> float:
    return square**0.5 / scale if scale else 0.0
