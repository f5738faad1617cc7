"""Facts about whole tensors, found by all threads that need them together.

A tensor is cut into stretches on a fixed grid. Each thread that asks for the fact scans the stretches that
nobody has begun; then all wait for the last one. What was found is merged in the order of the tensor, so
it depends neither on the number of threads nor on who did what.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from workers.merging.methods import Statistic

STRETCH_ELEMENTS = 1 << 22
"""About as many elements are scanned by one thread at a time."""

STATISTIC_CHUNK_ELEMENTS = 1 << 18
"""A stretch is handed to a statistic in slices of this size, or of whole rows if those are longer."""


class SharedScan:
    """One fact about one tensor. `scan(stretch)` gives the statistic of one stretch."""

    def __init__(self, stretches: int, scan: Callable[[int], Statistic]) -> None:
        self._scan = scan
        self._waiting = list(range(stretches))[::-1]
        self._found: list[Statistic | None] = [None] * stretches
        self._folded = 0
        self._total: Statistic | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._fact: Any = None

    def result(self) -> Any:
        """The fact; to be called by any number of threads. Raises what a scan has raised."""
        while not self._done.is_set():
            with self._lock:
                stretch = self._waiting.pop() if self._waiting else None
            if stretch is None:
                self._done.wait()
                break
            try:
                found = self._scan(stretch)
                with self._lock:
                    self._found[stretch] = found
                    self._fold()
            except BaseException as error:
                self._error = error
                self._done.set()
                raise
        if self._error is not None:
            raise self._error
        return self._fact

    def _fold(self) -> None:
        """Merge what is next in order: of a long tensor only what threads are ahead with is held."""
        while self._folded < len(self._found):
            found = self._found[self._folded]
            if found is None:
                return
            if self._total is None:
                self._total = found
            else:
                self._total.merge(found)
            self._found[self._folded] = None
            self._folded += 1
        assert self._total is not None
        self._fact = self._total.finish()
        self._total = None
        self._done.set()


class StatisticCache:
    """The scans of many tensors, the least recently used forgotten beyond `most`."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._scans: OrderedDict[Hashable, SharedScan] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], SharedScan]) -> SharedScan:
        """The scan of this key, made if it is new."""
        with self._lock:
            if key not in self._scans:
                self._scans[key] = make()
            self._scans.move_to_end(key)
            if self._most is not None and len(self._scans) > self._most:
                self._scans.popitem(last=False)
            return self._scans[key]

    def forget(self, key: Hashable) -> None:
        """So that a scan that failed is tried again."""
        with self._lock:
            self._scans.pop(key, None)
