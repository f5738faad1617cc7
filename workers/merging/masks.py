"""Random masks that depend only on what is masked, never on who draws them or in which pieces.

Philox-4x64 (Salmon et al., SC 2011; NumPy's `Philox`) is a counter-based generator: a stream of bytes whose
key is a hash of seed, parent and tensor name. Element `i` of a tensor gets a number of 32 bits, and is kept
if that is below 2^32 times its probability. The upper 8 are byte `i` of the stream. They decide but in one
case of 256; only then the lower 24 are made, by the finalizer of SplitMix64 (Steele et al., OOPSLA 2014) from
the key and `i`. So drawing costs a quarter of what numbers of 32 bits would.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

BYTES_PER_BLOCK = 32
"""One step of the counter gives four numbers of 64 bits."""

LOWER_BITS = 24

PIECE = 1 << 13
"""Elements compared at once with a probability of their own."""


def keep_mask(
    seed: int,
    parent: str,
    tensor: str,
    start: int,
    count: int,
    probability: float | NDArray[numpy.float32],
) -> NDArray[numpy.bool_]:
    """Booleans `[count]` for the elements from `start` on, True with `probability`, one or `[count]`."""
    first_block, skipped = divmod(start, BYTES_PER_BLOCK)
    blocks = -(-(skipped + count) // BYTES_PER_BLOCK)
    name = hashlib.sha256(f"{seed}\0{parent}\0{tensor}".encode()).digest()
    key = numpy.frombuffer(name[:24], dtype="<u8")
    generator = numpy.random.Philox(key=key[:2], counter=first_block)
    numbers = generator.random_raw(blocks * BYTES_PER_BLOCK // 8).astype("<u8", copy=False)
    drawn = numbers.view("u1")[skipped : skipped + count]
    kept = numpy.empty(count, dtype=bool)
    if isinstance(probability, numpy.ndarray):
        # Piece by piece: memory that a process gets afresh costs several times what is computed in it.
        for first in range(0, count, PIECE):
            piece = slice(first, first + PIECE)
            limits = numpy.rint(probability[piece].astype("f8") * 2**32).astype("i8")
            _compare(drawn[piece], limits, start + first, key[2], kept[piece])
    else:
        assert 0.0 <= probability <= 1.0
        _compare(drawn, numpy.int64(round(probability * 2**32)), start, key[2], kept)
    return kept


def _compare(
    drawn: NDArray[numpy.uint8],
    limits: numpy.int64 | NDArray[numpy.int64],
    start: int,
    key: numpy.uint64,
    kept: NDArray[numpy.bool_],
) -> None:
    """Which elements' numbers are below their limits, one or one each; `drawn` are their upper bits."""
    upper, lower = limits >> LOWER_BITS, limits & ((1 << LOWER_BITS) - 1)
    if upper.ndim == 0 and upper == 256:  # beyond what 8 bits can be compared with
        kept[:] = True
        return
    # Of 16 bits, as 256 is among those of many elements.
    upper = upper.astype("u1" if upper.ndim == 0 else "i2")
    numpy.less(drawn, upper, out=kept)
    if not numpy.any(lower):
        return
    undecided = numpy.flatnonzero(drawn == upper)
    own = numpy.broadcast_to(lower, drawn.shape)[undecided]
    kept[undecided] = lower_bits(key, undecided + start) < own


def lower_bits(key: numpy.uint64, elements: NDArray[numpy.int64]) -> NDArray[numpy.uint64]:
    """`LOWER_BITS` random bits for each of these elements: the output of SplitMix64 whose state began at
    `key`."""
    bits = (elements.astype("u8") + numpy.uint64(1)) * numpy.uint64(0x9E3779B97F4A7C15)
    bits += key
    bits ^= bits >> numpy.uint64(30)
    bits *= numpy.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> numpy.uint64(27)
    bits *= numpy.uint64(0x94D049BB133111EB)
    bits ^= bits >> numpy.uint64(31)
    return bits >> numpy.uint64(64 - LOWER_BITS)
