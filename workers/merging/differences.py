"""How far values of a child are from a parent's, in steps of bfloat16: more than rounding, or not."""

from __future__ import annotations

from typing import Any

import numpy
import torch

SAMPLE_ELEMENTS = 1 << 13
"""So many elements of a merge unit, evenly spaced, are looked at; of a smaller unit all."""

FINER_BITS = {torch.bfloat16: 0, torch.float16: 3, torch.float32: 16, torch.float64: 45}
"""Bits that the dtype's mantissa has beyond the seven of bfloat16."""

LEAST_STEPS = 2
"""So many steps of bfloat16 apart are two values that rounding alone does not explain."""

HISTOGRAM_BINS = 16


def sample(values: torch.Tensor) -> torch.Tensor:
    """About `SAMPLE_ELEMENTS` of the flat `values`, evenly spaced; the same ones for each parent."""
    stride = len(values) // SAMPLE_ELEMENTS
    # Odd, so that it walks through the columns of a matrix and does not stay in some.
    return values[:: stride | 1] if stride > 1 else values


def count_moved(values: torch.Tensor, others: torch.Tensor) -> int:
    """How many of `values` are `LEAST_STEPS` steps of bfloat16 or more from `others`, element by element."""
    return int(numpy.count_nonzero(bfloat16_steps(values, others) >= LEAST_STEPS))


def count_by_steps(values: torch.Tensor, others: torch.Tensor) -> list[int]:
    """A histogram of how far `values` are from `others`: bin k counts 2^k to 2^(k+1) - 1 steps.

    Values less than a step apart are in no bin, the farthest in the last one.
    """
    steps = bfloat16_steps(values, others)
    exponents = numpy.frexp(steps[steps > 0].astype(numpy.float64))[1] - 1
    bins = numpy.bincount(numpy.minimum(exponents, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)
    return [int(count) for count in bins]


def bfloat16_steps(values: torch.Tensor, others: torch.Tensor) -> Any:
    """How many whole steps of bfloat16 lie between `values` and `others`, rounded to their dtype.

    Codes of floating point numbers of one sign are in the order of their values, so a difference of codes
    is a number of steps, whatever the magnitude. Of other dtypes codes are compared as they are.
    """
    size = values.element_size()
    one, other = (
        _codes(v, size, values.dtype in FINER_BITS) for v in (values, others.to(values.dtype))
    )
    return numpy.abs(one - other) >> FINER_BITS.get(values.dtype, 0)


def _codes(values: torch.Tensor, size: int, signed_magnitude: bool) -> Any:
    codes = values.contiguous().view(torch.uint8).numpy().view(f"i{size}")
    codes = codes.astype(numpy.int32 if size < 4 else numpy.int64)
    if not signed_magnitude:
        return codes
    # The smallest code for the most negative value: -0.0 and 0.0 become neighbours.
    return codes ^ ((codes >> (8 * size - 1)) & ((1 << (8 * size - 1)) - 1))
