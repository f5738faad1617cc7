"""Random masks: the same bits whoever draws them, in whatever pieces, for ever."""

from __future__ import annotations

import hashlib
import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.merging.masks import keep_mask

TENSOR = "layers.3.mlp.up_proj.weight"


def drawn_in_one_go(
    seed: int, parent: str, tensor: str, count: int, probability: float
) -> numpy.ndarray:
    """The definition: byte `i` of Philox, and below it 24 bits of SplitMix64, against the probability."""
    digest = hashlib.sha256(f"{seed}\0{parent}\0{tensor}".encode()).digest()
    key = [int.from_bytes(digest[first : first + 8], "little") for first in (0, 8, 16)]
    philox = numpy.random.Philox(key=numpy.array(key[:2], numpy.uint64), counter=0)
    numbers = philox.random_raw(count // 8 + 1)
    upper = [(int(number) >> shift) & 0xFF for number in numbers for shift in range(0, 64, 8)]
    limit = round(probability * 2**32)
    return numpy.array(
        [upper[i] * 2**24 + (split_mix(key[2], i) >> 40) < limit for i in range(count)]
    )


def split_mix(state: int, number: int) -> int:
    """Output `number` of SplitMix64, from its authors' reference implementation in C."""
    word = (state + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_split_mix_is_the_published_one() -> None:
    """The first outputs for the seed 1234567, as they are published with other implementations."""
    assert [split_mix(1234567, number) for number in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("probability", [0.0, 1e-6, 2e-4, 0.1, 0.5, 0.999, 1.0])
def test_is_the_stream_of_philox(probability: float) -> None:
    expected = drawn_in_one_go(7, "mother", TENSOR, 10_001, probability)
    found = keep_mask(7, "mother", TENSOR, 0, 10_001, probability)
    assert found.dtype == numpy.bool_
    assert numpy.array_equal(found, expected)


WHOLE = keep_mask(1, "mother", TENSOR, 0, 3000, 0.4)


@given(st.integers(0, 3000), st.integers(0, 3000))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_piece_is_that_of_the_whole(start: int, stop: int) -> None:
    start, stop = min(start, stop), max(start, stop)
    piece = keep_mask(1, "mother", TENSOR, start, stop - start, 0.4)
    assert numpy.array_equal(piece, WHOLE[start:stop])


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_pieces_put_together_are_the_whole(counts: list[int]) -> None:
    pieces, start = [], 0
    for count in counts:
        pieces.append(keep_mask(1, "mother", TENSOR, start, count, 0.4))
        start += count
    together = numpy.concatenate(pieces)[:3000]
    assert numpy.array_equal(together, WHOLE[: len(together)])


def test_a_piece_far_behind_is_drawn_without_what_is_before() -> None:
    """At the offsets of the largest tensors: 512 experts in one of 8.6 GB."""
    far = 512 * 2048 * 4096
    whole = keep_mask(1, "mother", TENSOR, far, 64, 0.5)
    assert numpy.array_equal(keep_mask(1, "mother", TENSOR, far + 13, 20, 0.5), whole[13:33])
    assert not numpy.array_equal(whole, keep_mask(1, "mother", TENSOR, 0, 64, 0.5))


def test_another_seed_parent_or_tensor_has_another_mask() -> None:
    keys = [
        (0, "mother", TENSOR),
        (1, "mother", TENSOR),
        (-1, "mother", TENSOR),
        (0, "donor", TENSOR),
        (0, "mother", TENSOR.replace("3", "4")),
        (0, "moth", "er" + TENSOR),
        (2**80, "mother", TENSOR),
    ]
    count = 4096
    masks = [keep_mask(*key, 0, count, 0.5) for key in keys]
    for number, mask in enumerate(masks):
        for other in masks[:number]:
            agreeing = int((mask == other).sum())
            assert abs(agreeing - count / 2) < 5 * math.sqrt(count / 4)  # as of independent coins


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_the_share_kept_is_the_probability(probability: float) -> None:
    count = 1 << 20
    kept = int(keep_mask(3, "mother", TENSOR, 0, count, probability).sum())
    sigma = math.sqrt(count * probability * (1 - probability))
    assert abs(kept - count * probability) < 5 * sigma


def test_a_greater_probability_keeps_what_a_smaller_one_keeps() -> None:
    smaller, greater = (keep_mask(0, "mother", TENSOR, 0, 5000, p) for p in (0.3, 0.31))
    assert not (smaller & ~greater).any()
    assert greater.sum() > smaller.sum()


def test_nothing_and_everything() -> None:
    assert not keep_mask(0, "mother", TENSOR, 5, 1000, 0.0).any()
    assert keep_mask(0, "mother", TENSOR, 5, 1000, 1.0).all()
    assert keep_mask(0, "mother", TENSOR, 5, 0, 0.5).shape == (0,)


@pytest.mark.parametrize("probability", [3 / 2**17, 0.1, 0.3])
def test_the_lower_bits_decide_where_the_upper_ones_do_not(probability: float) -> None:
    """A probability between two multiples of 2^-8: both of them would show in so many draws."""
    count = 1 << 24
    kept = int(keep_mask(5, "mother", TENSOR, 0, count, probability).sum())
    sigma = math.sqrt(count * probability * (1 - probability))
    assert abs(kept - count * probability) < 5 * sigma
    near = keep_mask(5, "mother", TENSOR, 0, count, probability + 2.0**-18)
    assert int(near.sum()) > kept  # 64 elements on the average


@pytest.mark.parametrize("probability", [0.0, 2e-5, 0.3, 0.7, 1.0])
def test_one_probability_for_all_is_that_for_each(probability: float) -> None:
    for start, count in ((0, 5000), (13, 4001)):
        each = numpy.full(count, probability, dtype="f4")
        assert numpy.array_equal(
            keep_mask(2, "mother", TENSOR, start, count, each),
            keep_mask(2, "mother", TENSOR, start, count, probability),
        )


def test_each_element_has_its_own_probability() -> None:
    probabilities = numpy.linspace(0, 1, 9).astype("f4")
    found = keep_mask(0, "mother", TENSOR, 7, 90_000, numpy.tile(probabilities, 10_000))
    shares = found.reshape(-1, 9).mean(axis=0)
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert shares == pytest.approx(probabilities, abs=0.025)  # five sigma


def test_neighbours_are_kept_independently() -> None:
    first, second = keep_mask(8, "mother", TENSOR, 0, 1 << 24, 0.3).reshape(-1, 2).T
    both = float((first & second).mean())
    assert abs(both - 0.09) < 5 * math.sqrt(0.09 * 0.91 / (1 << 23))


def test_the_bits_never_change() -> None:
    """Frozen: a change of these would change every child with random masks that was ever made.

    So many that for some of them the lower bits decide.
    """
    bits = keep_mask(42, "mother", TENSOR, 0, 100_000, 0.3)
    expected = drawn_in_one_go(42, "mother", TENSOR, 100_000, 0.3)
    assert numpy.array_equal(bits, expected)
    digest = hashlib.sha256(numpy.packbits(expected).tobytes()).hexdigest()
    assert digest == "23bd6fde3432a388435273d7b3b0b92e170c064de84361cdae029e042694b8bd"
