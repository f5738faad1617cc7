"""How far two tensors of one shape are from each other."""

from __future__ import annotations

import math

import numpy


class Comparison:
    """Sums over flat float64 chunks of two tensors, added in the order of the tensors.

    They use nothing of the linear algebra library, whose sums depend on the processor and on threads.
    """

    def __init__(self) -> None:
        self.elements = 0
        self.changed = 0
        """Elements that are not equal as numbers; a NaN equals nothing."""
        self.product = 0.0
        self.squares = 0.0
        """Sum of the squared differences."""

    def add(
        self, one: numpy.ndarray, two: numpy.ndarray, spare: numpy.ndarray, flags: numpy.ndarray
    ) -> None:
        """Compare two chunks; `spare` (float64) and `flags` (bool), as long as they, are overwritten."""
        self.elements += len(one)
        changed = int(numpy.count_nonzero(numpy.not_equal(one, two, out=flags)))
        self.changed += changed
        with numpy.errstate(invalid="ignore", over="ignore"):
            self.product += float(numpy.multiply(one, two, out=spare).sum())
            if changed:
                numpy.subtract(one, two, out=spare)
                self.squares += float(numpy.multiply(spare, spare, out=spare).sum())

    def finish(self, norms: tuple[float | None, float | None]) -> dict[str, float | None]:
        """`distance`, `cosine` and `changed`, None where a value is not defined.

        `norms` are the L2 norms of the two tensors.
        """
        distance, cosine = math.sqrt(self.squares), None
        is_finite = math.isfinite(distance) and math.isfinite(self.product)
        if is_finite and norms[0] and norms[1]:
            cosine = self.product / norms[0] / norms[1] if self.changed else 1.0
            cosine = max(-1.0, min(1.0, cosine))
        return {
            "distance": distance if is_finite else None,
            "cosine": cosine,
            "changed": self.changed / max(self.elements, 1),
        }
