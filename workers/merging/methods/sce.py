"""sce: select by variance, calculate weights, erase minority signs (arXiv 2408.07990).

Differences to mergekit: the `select_topk` share of the elements whose task vectors differ is cut at whole
bins of their variance (1/256 of a power of two), so that equal ones have one fate. Small task vectors have
their weights as any others, as in the paper: mergekit makes all equal where their mean squares sum to less
than 1e-6, as those of most fine-tunes do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.merging.methods.consensus import add_agreeing, elected_sign
from workers.merging.methods.magnitudes import (
    BINS,
    NOT_FINITE,
    BinCounts,
    Magnitudes,
    spare,
)
from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register

if TYPE_CHECKING:
    import numpy
    from torch import Tensor


def take_differences(piece: Slice) -> Tensor:
    """Turn the parents into task vectors; their sum of squared deviations from the mean, per element.

    In scratch buffer 0; 1 and 2 are used. Exactly 0 where all are equal, which the number of elements
    to select rests on: hence all is reckoned from the first one.
    """
    import torch

    assert piece.base is not None
    first, *others = [parent.sub_(piece.base) for parent in piece.parents.values()]
    squares, mean, deviation = (piece.scratch(number) for number in range(3))
    mean.zero_()
    for other in others:
        mean.add_(torch.sub(other, first, out=deviation))
    mean.mul_(1.0 / (1 + len(others)))
    torch.mul(mean, mean, out=squares)
    for other in others:
        torch.sub(other, first, out=deviation).sub_(mean)
        squares.add_(deviation.mul_(deviation))
    return squares


@dataclass(frozen=True, slots=True)
class Variances:
    """The variances of a tensor's elements in bins, and what each parent changed in them."""

    bins: Magnitudes
    squares: dict[str, numpy.ndarray]
    """Per parent, the sum of squares of its task vector over the elements of each bin or above."""

    def bound(self, share: float) -> float:
        """The greatest variance that is not selected; below 0 if all elements are."""
        return -1.0 if share >= 1.0 else self.bins.bound_keeping(self._wanted(share))

    def weights(self, share: float) -> dict[str, float]:
        """Each parent's part of the sum of squares over the selected elements; equal if that is 0."""
        last = len(self.bins.bins)
        if share < 1.0:
            last = self.bins.bins_keeping(self._wanted(share))
        found = {
            name: float(sums[last - 1]) if last else 0.0 for name, sums in self.squares.items()
        }
        total = math.fsum(found.values())
        return {
            name: square / total if total > 0 else 1.0 / len(found)
            for name, square in found.items()
        }

    def _wanted(self, share: float) -> int:
        differing = self.bins.total
        if len(self.bins.bins) and self.bins.bins[-1] == 0:
            differing = int(self.bins.counts[-2]) if len(self.bins.bins) > 1 else 0
        return math.floor(share * differing)


class VarianceTable:
    """Counts and sums of squares by bins of variance. Serves every `select_topk`."""

    def __init__(self, values: Values) -> None:
        self.variances = BinCounts()
        self.squares: dict[str, Tensor] = {}

    def update(self, piece: Slice) -> None:
        import torch

        self.variances.add(take_differences(piece), piece.out)
        index = spare(piece.out, torch.int64)  # as the count has left it
        for name, delta in piece.parents.items():
            if name not in self.squares:
                self.squares[name] = torch.zeros(BINS, dtype=torch.float64, device=delta.device)
            squares = spare(delta, torch.float64).copy_(delta.mul_(delta))
            self.squares[name].scatter_add_(0, index, squares)

    def merge(self, other: VarianceTable) -> None:
        self.variances.merge(other.variances)
        for name, squares in other.squares.items():
            if name in self.squares:
                self.squares[name] += squares
            else:
                self.squares[name] = squares

    def finish(self) -> Variances:
        bins = self.variances.finish()
        squares = {}
        for name, sums in self.squares.items():
            # A damaged element is to be found out in the child, where it is, and not to spoil others.
            sums[NOT_FINITE:] = 0.0
            squares[name] = sums.cpu().numpy()[bins.bins].cumsum()
        return Variances(bins, squares)


def merge(piece: Slice, values: Values) -> None:
    """out = x_0 + sum w_i d_i / sum w_i over the selected d_i of the sign of their sum.

    w_i is parent i's part of the sum of squares of what is selected.
    """
    import torch

    share, found = values["select_topk"], piece.statistic
    variance = take_differences(piece)
    bound = found.bound(share)
    if bound >= 0.0:
        selected = torch.gt(variance, bound, out=piece.scratch(1))
        for delta in piece.parents.values():
            delta.mul_(selected)
    weights = found.weights(share)
    sign = elected_sign(piece)
    for name, delta in piece.parents.items():
        delta.mul_(weights[name])
    add_agreeing(piece, sign, weights, 1.0)


register(
    MergeMethod(
        name="sce",
        summary="select by variance, calculate weights, erase minority signs (arXiv 2408.07990)",
        parameters=(Parameter("select_topk", "shared", low=0.0, high=1.0, default=1.0),),
        merge=merge,
        uses_base="always",
        least_task_vectors=2,
        statistic=VarianceTable,
    )
)
