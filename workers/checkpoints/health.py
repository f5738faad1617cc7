"""Whether values are numbers: NaN and infinity have all ones in their exponent."""

from __future__ import annotations

import numpy

EXPONENTS = {
    "F16": ("<u2", 0x7C00, 0x7C00),
    "BF16": ("<u2", 0x7F80, 0x7F80),
    "F32": ("<u4", 0x7F800000, 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000, 0x7FF0000000000000),
    "F8_E5M2": ("<u1", 0x7C, 0x7C),
    "F8_E4M3": ("<u1", 0x7F, 0x7F),
}
"""dtype -> integer of its size, the bits to look at, and what they are in a NaN or an infinity."""

CHUNK_BYTES = 1 << 19


def count_not_finite(data: memoryview, dtype: str) -> int:
    """How many of the values in `data`, stored as `dtype`, are NaN or infinite."""
    if dtype not in EXPONENTS:
        return 0
    integer, mask, pattern = EXPONENTS[dtype]
    total = 0
    kept = numpy.empty(min(CHUNK_BYTES, data.nbytes) // numpy.dtype(integer).itemsize, integer)
    for first in range(0, data.nbytes, CHUNK_BYTES):
        codes = numpy.frombuffer(data[first : first + CHUNK_BYTES], integer)
        bits = numpy.bitwise_and(codes, mask, out=kept[: len(codes)])
        if bits.max() == pattern:
            total += int(numpy.count_nonzero(bits == pattern))
    return total
