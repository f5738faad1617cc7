"""ties: trim small changes, elect a sign per element, average those that agree (arXiv 2306.01708)."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register

if TYPE_CHECKING:
    import numpy

BIN_SHIFT = 15
"""Magnitudes are tabulated by the upper 16 bits of their fp32 pattern: 8 of exponent, 8 of mantissa."""
BINS = 1 << 16


class MagnitudeTable:
    """For each parent, how many task-vector elements lie in each magnitude bin.

    The bins are so fine (1/256 of a power of two) that a density read from the table keeps at most one
    bin more than asked for; elements of equal magnitude are kept or dropped together.
    """

    def __init__(self, values: Values) -> None:
        self.counts: dict[str, numpy.ndarray] = {}

    def update(self, piece: Slice) -> None:
        import numpy
        import torch

        assert piece.base is not None
        for name, parent in piece.parents.items():
            bits = parent.sub_(piece.base).abs_().view(torch.int32)
            counts = numpy.bincount((bits >> BIN_SHIFT).cpu().numpy(), minlength=BINS)
            self.counts[name] = self.counts.get(name, 0) + counts

    def merge(self, other: MagnitudeTable) -> None:
        for name, counts in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + counts

    def finish(self) -> dict[str, tuple[numpy.ndarray, numpy.ndarray]]:
        """Per parent: the bins in use, largest first, and how many elements lie in them or above."""
        tables = {}
        for name, counts in self.counts.items():
            bins = counts.nonzero()[0][::-1]
            tables[name] = (bins.astype("int32"), counts[bins].cumsum())
        return tables


def dropped_below(table: tuple[numpy.ndarray, numpy.ndarray], density: float) -> float:
    """The greatest magnitude that is dropped when the largest `density` of the elements is kept."""
    bins, counts = table
    if density >= 1.0 or not len(bins):
        return 0.0
    wanted = math.ceil(density * int(counts[-1]))
    if wanted == 0:
        return math.inf
    first_kept = int(bins[int(counts.searchsorted(wanted))]) << BIN_SHIFT
    bound: float = struct.unpack("<f", struct.pack("<I", max(first_kept - 1, 0)))[0]
    return bound


def merge(piece: Slice, values: Values) -> None:
    """Trim each task vector to its `density` largest elements, then `merge_agreeing`."""
    import torch

    assert piece.base is not None
    for name, parent in piece.parents.items():
        delta = parent.sub_(piece.base)
        bound = dropped_below(piece.statistic[name], values["density"][name])
        if bound > 0.0:
            delta.copy_(torch.nn.functional.hardshrink(delta, bound))
    merge_agreeing(piece, values)


def merge_agreeing(piece: Slice, values: Values) -> None:
    """Sign election and disjoint merge of the task vectors now in `piece.parents`.

    The sign of an element is that of the greater of its positive and negative mass, sum_i w_i d_i over
    entries of one sign (+ if they are equal); only entries of that sign count:
    out = x_0 + lambda * that mass, divided by the sum of their w_i if `normalize` is 1.
    """
    # Written without masks and `where`: these are an order of magnitude slower than arithmetic.
    import torch

    assert piece.base is not None
    positive, negative = piece.out.zero_(), torch.zeros_like(piece.out)
    for name, delta in piece.parents.items():
        delta.mul_(values["weight"][name])
        positive.add_(delta.clamp(min=0.0))
        negative.add_(delta.clamp(max=0.0))
    is_positive = (positive + negative).ge_(0.0)
    is_negative = 1.0 - is_positive
    total = positive.mul_(is_positive).addcmul_(negative, is_negative)
    if values["normalize"]:
        divisor = torch.zeros_like(total)
        for name, delta in piece.parents.items():
            signs = delta.sign_()
            weight = values["weight"][name]
            divisor.addcmul_(signs.clamp(min=0.0), is_positive, value=weight)
            divisor.addcmul_(signs.clamp(max=0.0), is_negative, value=-weight)
        total.div_(divisor.clamp_(min=torch.finfo(torch.float32).tiny))
    torch.add(piece.base, total.mul_(values["lambda"]), out=piece.out)


def consensus_parameters(normalize: float) -> tuple[Parameter, ...]:
    """The parameters of a method that ends with `merge_agreeing`."""
    return (
        Parameter("weight", "per_parent", low=0.0),
        Parameter("density", "per_parent", low=0.0, high=1.0),
        Parameter("lambda", "shared", default=1.0),
        Parameter("normalize", "flag", default=normalize),
    )


register(
    MergeMethod(
        name="ties",
        summary="trim, elect sign, disjoint merge (arXiv 2306.01708)",
        parameters=consensus_parameters(normalize=1.0),
        merge=merge,
        uses_base="always",
        statistic=MagnitudeTable,
    )
)
