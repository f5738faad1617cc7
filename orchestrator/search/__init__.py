"""Optimizers: ask for points of the unit cube, tell how good they were. Larger fitness is better.

An optimizer is built from its seed and fed by `ask` and `tell` alone, so its state is never stored: it is
rebuilt by replaying the ledger. To add one, add a file here that calls `register`; it is found by
itself, and `tests/unit/test_search.py` holds it to the contract.
"""

from importlib import import_module
from pkgutil import iter_modules

from orchestrator.search.optimizer import OPTIMIZERS, Optimizer, build_optimizer, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["OPTIMIZERS", "Optimizer", "build_optimizer", "register"]
