"""Random masks that depend only on what is masked, never on who draws them or in which pieces.

Philox-4x64 (Salmon et al., SC 2011; NumPy's `Philox`) is a counter-based generator: a stream of 16-bit words
whose key is a hash of seed, parent and tensor name. Element `i` of a tensor gets the 32-bit number whose
upper half is word `i` and whose lower half is the neighbouring word `i xor 1`; it is kept if that is below
2^32 times its probability. So two elements share 32 bits, which halves what is to be drawn, and yet a
probability has 32 bits: the lower half decides in one case of 65,536.
"""

from __future__ import annotations

import hashlib

import numpy

WORDS_PER_BLOCK = 16
"""One step of the counter gives four 64-bit numbers: sixteen words of 16 bits."""

PIECE = 1 << 13
"""Elements compared at once with a probability of their own."""


def keep_mask(
    seed: int,
    parent: str,
    tensor: str,
    start: int,
    count: int,
    probability: float | numpy.ndarray,
) -> numpy.ndarray:
    """Booleans `[count]` for the elements from `start` on, True with `probability`, one or `[count]`."""
    first_block, skipped = divmod(start, WORDS_PER_BLOCK)
    blocks = -(-(skipped + count) // WORDS_PER_BLOCK)
    name = hashlib.sha256(f"{seed}\0{parent}\0{tensor}".encode()).digest()
    key = numpy.frombuffer(name[:16], dtype="<u8")
    generator = numpy.random.Philox(key=key, counter=first_block)
    numbers = generator.random_raw(blocks * WORDS_PER_BLOCK // 4).astype("<u8", copy=False)
    if isinstance(probability, numpy.ndarray):
        return _below(numbers, skipped, probability)
    upper, lower = divmod(round(probability * 2**32), 2**16)
    if upper == 2**16:
        return numpy.ones(count, dtype=bool)
    words = numbers.view("<u2")
    kept: numpy.ndarray = words < numpy.uint16(upper)
    if lower:
        undecided = (words == numpy.uint16(upper)).nonzero()[0]
        kept[undecided] = words[undecided ^ 1] < lower
    return kept[skipped : skipped + count]


def _below(numbers: numpy.ndarray, skipped: int, probability: numpy.ndarray) -> numpy.ndarray:
    """Which elements' 32 bits, but for `skipped` elements, are below those of their fp32 probability."""
    pairs = numbers.view("<u4")
    kept = numpy.empty(len(probability), dtype=bool)
    # Piece by piece: memory that a process gets afresh costs several times what is computed in it.
    for first in range(0, len(kept), PIECE):
        # 2^32 of a probability of 1 does not fit into 32 bits.
        limits = probability[first : first + PIECE].astype("f8")
        limits *= 2**32
        begin, end = skipped + first, skipped + first + len(limits)
        own = pairs[begin // 2 : -(-end // 2)]
        whole = numpy.empty((len(own), 2), dtype="u4")
        whole[:, 0] = own << 16
        whole[:, 0] |= own >> 16
        whole[:, 1] = own
        drawn = whole.reshape(-1)[begin % 2 : begin % 2 + len(limits)]
        numpy.less(drawn, numpy.rint(limits, out=limits), out=kept[first : first + PIECE])
    return kept
