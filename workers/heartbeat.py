"""Signs of life: each worker process sends them from a thread of its own, whatever else it does.

They go to one `Beats` for all workers of a driver, which counts them. Nobody's clock is compared with another
one's: a worker whose count does not grow while others ask for it is frozen, or cannot be reached.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress


class Beats:
    """How many signs of life there were, of each process: (worker's serial number, member of its gang)."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, int]] = Counter()

    def beat(self, serial: int, member: int) -> None:
        """Count one more."""
        self._counts[serial, member] += 1

    def counts(self) -> dict[tuple[int, int], int]:
        """All of them, so far."""
        return dict(self._counts)


def keep_beating(beat: Callable[[], None], seconds: float) -> threading.Thread:
    """Call `beat` every so many seconds as long as this process lives. What it raises is its own affair:
    nobody may be there yet who counts, or no longer."""

    def run() -> None:
        pause = threading.Event()
        while not pause.wait(seconds):
            with suppress(Exception):
                beat()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    return thread
