"""Random masks that depend only on what is masked, never on who draws them or in which pieces.

Philox-4x64 (Salmon et al., SC 2011; NumPy's `Philox`) is a counter-based generator: element `i` of a
tensor gets the `i`-th 32-bit word of the stream whose key is a hash of seed, parent and tensor name.
"""

from __future__ import annotations

import hashlib

import numpy

WORDS_PER_BLOCK = 8
"""One step of the counter gives four 64-bit numbers: eight words of 32 bits."""


def keep_mask(
    seed: int,
    parent: str,
    tensor: str,
    start: int,
    count: int,
    probability: float | numpy.ndarray,
) -> numpy.ndarray:
    """Booleans `[count]` for the elements from `start` on, True with `probability`, one or `[count]`."""
    name = hashlib.sha256(f"{seed}\0{parent}\0{tensor}".encode()).digest()
    key = numpy.frombuffer(name[:16], dtype="<u8")
    first_block, skipped = divmod(start, WORDS_PER_BLOCK)
    generator = numpy.random.Philox(key=key, counter=first_block)
    blocks = -(-(skipped + count) // WORDS_PER_BLOCK)
    words = generator.random_raw(blocks * WORDS_PER_BLOCK // 2).astype("<u8", copy=False)
    words = words.view("<u4")[skipped : skipped + count]
    if isinstance(probability, numpy.ndarray):
        kept: numpy.ndarray = words < numpy.rint(probability.astype("f8") * 2**32)
        return kept
    limit = round(probability * 2**32)
    if limit == 2**32:
        return numpy.ones(count, dtype=bool)
    return words < numpy.uint32(limit)
