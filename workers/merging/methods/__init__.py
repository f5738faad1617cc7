"""Merge methods, one file each: pure functions on flat slices, with their parameters declared.

To add a method, add a file here that calls `register`. It is found by itself, the conformance tests in
`tests/unit/test_methods.py` run on it, and recipes and genome spaces can name it.
"""

from importlib import import_module
from pkgutil import iter_modules

from workers.merging.methods.method import (
    METHODS,
    Grain,
    MergeMethod,
    Parameter,
    Slice,
    Statistic,
    get_method,
    register,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "Grain",
    "MergeMethod",
    "Parameter",
    "Slice",
    "Statistic",
    "get_method",
    "register",
]
