"""How well experts of two models were matched; data that needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

LEAST_SIMILARITY = 0.5
LEAST_MARGIN = 0.1
"""Below the one or the other, on the mean of a layer, its experts may not belong together; our own choice.
Fine-tunes have almost 1 in both."""


@dataclass(frozen=True)
class LayerMatching:
    """The order of a donor's experts in one layer, and how sure it is."""

    layer: int
    order: tuple[int, ...]
    """For each of the father's places the number of the donor's expert."""
    similarity: float
    """Of matched experts, the mean; 1 for experts that are the same."""
    least: float
    """Of the two that are the least alike."""
    margin: float
    """How much more alike matched experts are than the father's and the donor's next best, the mean."""

    @property
    def moved(self) -> int:
        """How many of the donor's experts have another number than the father's."""
        return sum(place != number for place, number in enumerate(self.order))

    @property
    def is_poor(self) -> bool:
        """Whether the experts may not belong together."""
        return self.similarity < LEAST_SIMILARITY or self.margin < LEAST_MARGIN

    def to_dict(self) -> dict[str, Any]:
        """What is told of it, without the order."""
        told = asdict(self)
        del told["layer"], told["order"]
        return told | {"moved": self.moved, "poor": self.is_poor}


def describe(
    layer: int, order: tuple[int, ...], similarity: numpy.ndarray[Any, Any]
) -> LayerMatching:
    """The matching by this order, given `[father's, donor's]` similarities."""
    import numpy

    places = numpy.arange(len(order))
    matched = similarity[places, list(order)]
    others = similarity.copy()
    others[places, list(order)] = -1.0
    margins = matched - others.max(axis=1)
    return LayerMatching(
        layer,
        order,
        round(float(matched.mean()), 6),
        round(float(matched.min()), 6),
        round(float(margins.mean()), 6),
    )
