"""Magnitudes of whole task vectors, tabulated in one scan: what trims by magnitude read their bounds from."""

from __future__ import annotations

import math
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workers.merging.methods.method import Slice, Values

if TYPE_CHECKING:
    import numpy
    import torch
    from torch import Tensor

BIN_SHIFT = 15
"""Magnitudes are tabulated by the upper 16 bits of their fp32 pattern: 8 of exponent, 8 of mantissa."""
BINS = 1 << 16

NOT_FINITE = 0x7F800000 >> BIN_SHIFT
"""The first bin of infinities and NaN."""

_spare = threading.local()


def spare(like: Tensor, dtype: torch.dtype) -> Tensor:
    """This thread's buffer of a dtype of 64 bits, of the shape of `like`; holds arbitrary values."""
    import torch

    kept: dict[Any, Tensor] = _spare.__dict__
    buffer = kept.get((like.device, dtype))
    if buffer is None or len(buffer) < like.numel():
        buffer = torch.empty(like.numel(), dtype=dtype, device=like.device)
        kept[like.device, dtype] = buffer
    return buffer[: like.numel()].view(like.shape)


class BinCounts:
    """How many numbers lie in each magnitude bin. Integers, so the order of the numbers is no matter."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._merged: numpy.ndarray | None = None

    def add(self, numbers: Tensor, ones: Tensor) -> None:
        """Count fp32 `numbers`, and overwrite them and `ones`, an fp32 buffer of their shape.

        Scattered additions of int32 to one table cost a third of `bincount`, which looks for the
        greatest bin first and makes a new table each time.
        """
        import torch

        assert self._merged is None
        if self._counts is None:
            # int32 is enough for one stretch of a tensor; stretches are merged as int64.
            self._counts = torch.zeros(BINS, dtype=torch.int32, device=numbers.device)
        bits = numbers.view(torch.int32)
        bits.bitwise_and_(0x7FFFFFFF).bitwise_right_shift_(BIN_SHIFT)
        index = spare(numbers, torch.int64).copy_(bits)
        one = ones.view(torch.int32).fill_(1)
        self._counts.scatter_add_(0, index.view(-1), one.view(-1))

    def merge(self, other: BinCounts) -> None:
        if self._merged is None:
            self._merged = self.counts.astype("i8")
            self._counts = None
        self._merged += other.counts

    @property
    def counts(self) -> numpy.ndarray:
        """int32 or int64 `[BINS]`."""
        import numpy

        if self._merged is not None:
            return self._merged
        return numpy.zeros(BINS, "i4") if self._counts is None else self._counts.cpu().numpy()

    def finish(self) -> Magnitudes:
        import numpy

        counts = self.counts
        bins = numpy.flatnonzero(counts != 0)[::-1]  # seven times as fast as of the counts
        used = counts[bins].astype("i8")
        # Zeros lie in bin 0, and have no norm; nor has what is not finite.
        counted = (bins > 0) & (bins < NOT_FINITE)
        middles = (bins[counted].astype("u4") << BIN_SHIFT) + (1 << BIN_SHIFT - 1)
        norms = numpy.zeros(len(bins))
        norms[counted] = used[counted] * middles.view("f4").astype("f8")
        return Magnitudes(bins.astype("i4"), used.cumsum(), norms.cumsum())


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """The magnitudes of one task vector in bins of 1/256 of a power of two.

    A bound read from it is that of a bin: numbers of one bin are kept or dropped together.
    """

    bins: numpy.ndarray
    """Those in use, the largest magnitudes first."""
    counts: numpy.ndarray
    """How many numbers lie in each of them or above."""
    norms: numpy.ndarray
    """Their L1 norm, each number taken for the middle of its bin: right to 1/512, and a ratio of two
    such norms to far less. Without what is not finite."""

    @property
    def total(self) -> int:
        return int(self.counts[-1]) if len(self.counts) else 0

    def bound_keeping(self, wanted: int) -> float:
        """The greatest magnitude below those of the `wanted` largest numbers, in whole bins."""
        if wanted <= 0:
            return math.inf
        if wanted >= self.total:
            return 0.0
        first_kept = int(self.bins[self.bins_keeping(wanted) - 1]) << BIN_SHIFT
        return _from_bits(max(first_kept - 1, 0))

    def bound_dropping(self, most: int) -> float:
        """The greatest magnitude that is left when no more than `most` of the largest are dropped."""
        dropped = self.bins_dropping(most)
        if dropped == 0:
            return math.inf
        if dropped == len(self.bins):
            return 0.0
        return _from_bits((int(self.bins[dropped]) + 1 << BIN_SHIFT) - 1)

    def norm_ratio(self, wanted: int, dropped: int = 0) -> float:
        """L1 norm of all numbers over that of what is kept by these two bounds; 1 if that is 0."""
        last, first = self.bins_keeping(wanted), self.bins_dropping(dropped)
        if last <= first:
            return 1.0
        kept = self.norms[last - 1] - (self.norms[first - 1] if first else 0.0)
        return float(self.norms[-1] / kept) if kept > 0 else 1.0

    def bins_keeping(self, wanted: int) -> int:
        """How many bins hold the `wanted` largest numbers."""
        if wanted <= 0:
            return 0
        return min(int(self.counts.searchsorted(wanted)) + 1, len(self.bins))

    def bins_dropping(self, most: int) -> int:
        """How many whole bins hold no more than `most` of the largest numbers."""
        return int(self.counts.searchsorted(most, side="right"))


def _from_bits(bits: int) -> float:
    number: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return number


class MagnitudeTable:
    """Per parent, the magnitudes of its task vector. Serves every density."""

    def __init__(self) -> None:
        self.found: dict[str, BinCounts] = {}

    def update(self, piece: Slice) -> None:
        assert piece.base is not None
        for name, parent in piece.parents.items():
            counts = self.found.setdefault(name, BinCounts())
            counts.add(parent.sub_(piece.base), piece.out)

    def merge(self, other: MagnitudeTable) -> None:
        for name, counts in other.found.items():
            self.found.setdefault(name, BinCounts()).merge(counts)

    def finish(self) -> dict[str, Magnitudes]:
        return {name: counts.finish() for name, counts in self.found.items()}


def magnitude_table(values: Values) -> MagnitudeTable | None:
    """The statistic of a method that trims by magnitude; none if its densities drop nothing."""
    densities = values["density"].values()
    return None if all(density >= 1.0 for density in densities) else MagnitudeTable()
