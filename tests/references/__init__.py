"""Plain float64 references of the merge methods' formulas, one module a family, found by themselves.

Each module has `REFERENCES`, method -> function, and `CASES`, with which parents and parameters they are
compared. A reference gets every parent's whole tensor and the base's as float64, flat, with the shape of
the tensor under `values["shape"]`; the resolved parameters; and (seed, tensor name) of random masks. That
of a post-step finds under `values["out"]` what the method before it has made. `TOLERANCES`, if a module
has them, are absolute: method -> what iterations in fp32 may differ by, beside rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import numpy

Vectors = dict[str, numpy.ndarray]
"""Parent -> the whole tensor in float64."""

Case = tuple[str, int, dict[str, Any]]
"""Method, number of parents, parameters."""


def random_numbers(seed: int, tensor: str, parent: str, count: int) -> numpy.ndarray:
    """What decides whether an element is kept: a byte of Philox, and below it 24 bits of SplitMix64."""
    digest = hashlib.sha256(f"{seed}\0{parent}\0{tensor}".encode()).digest()
    *key, state = numpy.frombuffer(digest[:24], "<u8")
    numbers = numpy.random.Philox(key=numpy.array(key)).random_raw(count // 8 + 1)
    upper = numpy.stack([numbers >> 8 * place & 0xFF for place in range(8)], axis=1).reshape(-1)
    word = state + numpy.arange(1, count + 1, dtype="u8") * 0x9E3779B97F4A7C15
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return (upper[:count] << 24) + ((word ^ (word >> 31)) >> 40)


REFERENCES: dict[str, Callable[..., numpy.ndarray]] = {}
CASES: list[Case] = []
TOLERANCES: dict[str, float] = {}
for _module in iter_modules(__path__):
    _family = import_module(f"{__name__}.{_module.name}")
    REFERENCES |= _family.REFERENCES
    CASES += _family.CASES
    TOLERANCES |= getattr(_family, "TOLERANCES", {})
