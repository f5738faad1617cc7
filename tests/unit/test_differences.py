"""Differences between values in steps of bfloat16, against the list of all bfloat16 numbers."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from workers.merging.differences import (
    SAMPLE_ELEMENTS,
    bfloat16_steps,
    count_by_steps,
    count_moved,
    sample,
)

CODES = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
NUMBERS = CODES.view(torch.bfloat16)
FINITE = NUMBERS[NUMBERS.isfinite()]
PLACES = {value: n for n, value in enumerate(sorted({float(x) for x in FINITE}))}
"""Every finite number of bfloat16 -> which one it is; both zeros are one."""


def random_numbers(seed: int, count: int = 2000) -> torch.Tensor:
    return FINITE[torch.randperm(len(FINITE), generator=torch.Generator().manual_seed(seed))][
        :count
    ]


def test_steps_are_counted_as_in_the_list_of_all_numbers() -> None:
    one, other = random_numbers(1), random_numbers(2)
    expected = [
        abs(PLACES[float(a)] - PLACES[float(b)]) + (math.copysign(1, a) != math.copysign(1, b))
        for a, b in zip(one, other, strict=True)
    ]
    assert bfloat16_steps(one, other).tolist() == expected  # the zeros are a step apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_step_is_one_of_bfloat16_whatever_the_dtype(dtype: torch.dtype) -> None:
    """Of a value near 1 a step is 2^-7, and of one just below 2^-8."""
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, 0.75, 0.75], dtype=dtype)
    others = values + torch.tensor([0.0, 2**-7, 2**-6, 2**-5, -(2**-6), 2**-8, 2**-7], dtype=dtype)
    assert bfloat16_steps(values, others).tolist() == [0, 1, 2, 4, 2, 1, 2]
    assert count_moved(values, others) == 4


def test_less_than_a_step_is_rounding() -> None:
    values = torch.rand(1000) + 0.5
    assert count_moved(values, values * (1 + 2**-9)) == 0
    assert count_moved(values.bfloat16(), (values * (1 + 2**-9)).bfloat16()) == 0
    assert count_moved(values, values * (1 + 2**-5)) == 1000


def test_a_zero_that_lost_its_sign_has_not_moved() -> None:
    zeros = torch.zeros(10, dtype=torch.bfloat16)
    assert count_moved(zeros, -zeros) == 0


def test_the_histogram_holds_each_value_once() -> None:
    one, other = random_numbers(3), random_numbers(4)
    steps = bfloat16_steps(one, other)
    counts = count_by_steps(one, other)
    assert sum(counts) == numpy.count_nonzero(steps)
    for number, count in enumerate(counts[:-1]):
        assert count == sum(2**number <= step < 2 ** (number + 1) for step in steps)


def test_a_sample_is_spread_over_the_whole() -> None:
    values = torch.arange(10 * SAMPLE_ELEMENTS)
    looked_at = sample(values)
    assert SAMPLE_ELEMENTS * 0.8 < len(looked_at) <= SAMPLE_ELEMENTS
    assert looked_at[0] == 0
    assert looked_at[-1] > len(values) * 0.99
    assert len({int(x) % 4096 for x in looked_at}) == 4096, "some columns are never looked at"
    assert torch.equal(sample(values[:SAMPLE_ELEMENTS]), values[:SAMPLE_ELEMENTS])
