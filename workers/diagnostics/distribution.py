"""How the values of one tensor are distributed: entropy, mean, spread, extremes, and what is no number.

All sums are float64. A 16-bit number has only 65,536 codes, so of such a tensor the codes are counted, and
every statistic follows from the counts: from one pass, whatever the order in which the values came. Wider
numbers take two passes over a fixed grid of chunks: the moments (merged by the formulas of Chan, Golub and
LeVeque, 1979), then the bins that follow from them.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy

BINS = 256
"""Bins of the histogram between its ends; beyond them there is one more on each side."""

SPAN = 6.0
"""The histogram reaches from -SPAN to +SPAN standard deviations around 0, so that a single outlier, however
large, is one count in an outer bin and does not stretch the others."""

MOST_BITS = math.log2(BINS + 2)
"""Entropy of a histogram whose bins are all equally full: what entropies are divided by."""

COUNT_CHUNK = 1 << 17
"""Codes counted at once: their 64-bit copies stay in the cache."""

CHUNK_ELEMENTS = 1 << 15
"""Numbers that are added up at once. The grid decides where sums are rounded: with another one, last digits
would differ."""

FEW_CODES = 1 << 14
"""Of fewer codes than this those in use are found by sorting: a table of all would cost more."""

CODED = ("BF16", "F16")
"""Dtypes of 16 bits."""

Statistics = dict[str, float | int | None]


class CodeCounts:
    """How often each code of a 16-bit dtype ("BF16" or "F16") occurs."""

    def __init__(self, dtype: str) -> None:
        self._values = code_values(dtype)
        self._counts: Any = None
        self._few: Any = None

    def add(self, codes: numpy.ndarray) -> None:
        """Count flat uint16 `codes`."""
        if self._counts is None and self._few is None and len(codes) < FEW_CODES:
            self._few = numpy.unique(codes, return_counts=True)
            return
        counts = self._table()
        # `bincount` looks for the greatest first, and makes a table each time: it takes half as long again.
        index = numpy.empty(min(COUNT_CHUNK, len(codes)), numpy.intp)
        one = counts.dtype.type(1)
        for first in range(0, len(codes), COUNT_CHUNK):
            chunk = codes[first : first + COUNT_CHUNK]
            numpy.copyto(index[: len(chunk)], chunk)
            numpy.add.at(counts, index[: len(chunk)], one)

    def _table(self) -> Any:
        if self._counts is None:
            self._counts = numpy.zeros(1 << 16, numpy.int64)
        if self._few is not None:
            codes, counts = self._few
            self._counts[codes] += counts
            self._few = None
        return self._counts

    def finish(self) -> Statistics:
        if self._few is not None:
            codes, counts = self._few
        else:
            counts = self._table()
            codes = numpy.flatnonzero(counts)
            counts = counts[codes]
        values = self._values[codes]
        finite = numpy.isfinite(values)
        broken: Statistics = {
            "nan": int(counts[numpy.isnan(values)].sum()),
            "inf": int(counts[numpy.isinf(values)].sum()),
        }
        values, counts = values[finite], counts[finite]
        total = int(counts.sum())
        if not total:
            return _nothing() | broken
        mean = float((values * counts).sum()) / total
        centred = values - mean
        std = math.sqrt(float((centred * centred * counts).sum()) / total)
        bins = numpy.bincount(bins_of(values, std), counts, BINS + 2)
        found: Statistics = {
            "entropy": entropy(bins),
            "mean": mean,
            "std": std,
            "rms": math.sqrt(float((values * values * counts).sum()) / total),
            "abs_max": float(numpy.abs(values).max()),
        }
        return found | broken


class Moments:
    """Mean, spread and extremes of wide numbers, given in the order of the tensor.

    After all of them were added they are given once more, to `add_bins`.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0
        """Sum of the squared distances from the mean."""
        self.low, self.high = math.inf, -math.inf
        self.nan = 0
        self.inf = 0
        self._bins = numpy.zeros(BINS + 2, numpy.int64)

    def add(self, numbers: numpy.ndarray) -> None:
        """Add flat fp32 or fp64 numbers."""
        for first in range(0, len(numbers), CHUNK_ELEMENTS):
            self.merge(self._of_chunk(numbers[first : first + CHUNK_ELEMENTS]))

    def _of_chunk(self, numbers: numpy.ndarray) -> Moments:
        found = Moments()
        finite = finite_of(to_float64(numbers, "F32"))
        if len(finite) < len(numbers):
            found.nan = int(numpy.count_nonzero(numpy.isnan(numbers)))
            found.inf = len(numbers) - len(finite) - found.nan
        found.count = len(finite)
        if found.count:
            found.mean = float(finite.sum()) / found.count
            found.low, found.high = float(finite.min()), float(finite.max())
            finite = finite - found.mean
            found.squares = float((finite * finite).sum())
        return found

    def merge(self, other: Moments) -> None:
        """Take in the moments of the elements that follow."""
        total = self.count + other.count
        if other.count:
            step = other.mean - self.mean
            self.squares += other.squares + step * step * (self.count * other.count / total)
            self.mean += step * (other.count / total)
        self.count = total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.nan += other.nan
        self.inf += other.inf

    @property
    def std(self) -> float:
        # A mean that was rounded would give equal numbers a spread.
        return math.sqrt(self.squares / self.count) if self.low < self.high else 0.0

    def add_bins(self, numbers: numpy.ndarray) -> None:
        """Count the same numbers into the bins that their spread has defined."""
        for first in range(0, len(numbers), CHUNK_ELEMENTS):
            chunk = to_float64(numbers[first : first + CHUNK_ELEMENTS], "F32")
            places = bins_of(finite_of(chunk), self.std)
            self._bins += numpy.bincount(places, minlength=BINS + 2)

    def finish(self) -> Statistics:
        broken: Statistics = {"nan": self.nan, "inf": self.inf}
        if not self.count:
            return _nothing() | broken
        found: Statistics = {
            "entropy": entropy(self._bins),
            "mean": self.mean,
            "std": self.std,
            "rms": math.sqrt(self.squares / self.count + self.mean * self.mean),
            "abs_max": max(-self.low, self.high),
        }
        return found | broken


def bins_of(values: numpy.ndarray, std: float) -> numpy.ndarray:
    """The bin of each of finite float64 `values`: 0 and BINS + 1 are the outer ones."""
    if std == 0.0:
        return numpy.zeros(len(values), numpy.intp)  # all are equal
    with numpy.errstate(over="ignore"):
        places = numpy.floor((values + SPAN * std) / (2.0 * SPAN * std / BINS))
    return (numpy.clip(places, -1, BINS) + 1).astype(numpy.intp)


def entropy(bins: numpy.ndarray) -> float:
    """Shannon entropy of a histogram, as a share of the greatest that it could have.

    The logarithms are the C library's, one by one: numpy's depend on the processor.
    """
    total = float(bins.sum())
    shares = (float(count) / total for count in bins if count)
    return abs(math.fsum(share * math.log2(share) for share in shares)) / MOST_BITS


def finite_of(values: numpy.ndarray) -> numpy.ndarray:
    """Those of the values that are neither NaN nor infinite; the very array if all are."""
    finite = numpy.isfinite(values)
    return values if finite.all() else values[finite]


@cache
def code_values(dtype: str) -> numpy.ndarray:
    """The float64 values of the 65,536 codes of "BF16" or "F16"."""
    return to_float64(numpy.arange(1 << 16, dtype=numpy.uint16), dtype)


def to_float64(stored: numpy.ndarray, dtype: str) -> numpy.ndarray:
    """The values of stored numbers; BF16 and F16 are given as their codes."""
    if dtype == "BF16":
        stored = stored.astype(numpy.uint32)
        stored <<= 16
        stored = stored.view(numpy.float32)
    elif dtype == "F16":
        stored = stored.view(numpy.float16)
    with numpy.errstate(invalid="ignore"):  # signalling NaN
        return stored.astype(numpy.float64)


def _nothing() -> Statistics:
    """Of a tensor without a single finite value."""
    return dict.fromkeys(("entropy", "mean", "std", "rms", "abs_max"))
