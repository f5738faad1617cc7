"""How many bytes this process has read from stores and written to them, for its metrics.

Counted is what is asked of a store, retries apart. What is mapped into memory, as parents on a local disk
are, is read by the system and not counted.
"""

from __future__ import annotations

import os
import threading


class Traffic:
    """Counters that only grow."""

    def __init__(self) -> None:
        self.read = 0
        self.written = 0
        self._lock = threading.Lock()

    def count_read(self, size: int) -> None:
        """So many bytes were read."""
        with self._lock:
            self.read += size

    def count_written(self, size: int) -> None:
        """So many bytes were written."""
        with self._lock:
            self.written += size

    def renew(self) -> None:
        """In a forked process: a thread of the parent's may have held the lock."""
        self._lock = threading.Lock()


TRAFFIC = Traffic()
"""Of this process."""

os.register_at_fork(after_in_child=TRAFFIC.renew)
