"""Which nodes of the cluster are gone, and which are about to go."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

POLL_SECONDS = 2.0


class NodeWatch:
    """Asks Ray about its nodes, in a thread of its own: while a cluster's head is away nobody answers, and
    the driver and its workers go on. A context manager; Ray is up."""

    def __init__(self) -> None:
        self._lost: dict[str, float] = {}
        """Node -> when we learned of its end."""
        self._draining: frozenset[str] = frozenset()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Before Ray is left."""
        self._end.set()
        self._thread.join(timeout=10 * POLL_SECONDS)

    def is_leaving(self, nodes: Iterable[str]) -> bool:
        """Whether one of them is gone, or draining: told to go, and to take no more work."""
        known = self._draining or self._lost
        return bool(known) and any(n in self._draining or n in self._lost for n in nodes)

    def loses(self, nodes: Iterable[str], before: float) -> bool:
        """Whether one of them was lost before this time (of `time.monotonic`), or is about to be."""
        return any(
            node in self._draining or self._lost.get(node, math.inf) < before for node in nodes
        )

    def _run(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            with suppress(Exception):  # no head: asked again
                self._poll()

    def _poll(self) -> None:
        import ray
        from ray._private.state import state  # there is no public way to learn of draining nodes

        now = time.monotonic()
        lost = {node["NodeID"]: now for node in ray.nodes() if not node["Alive"]}
        self.note(lost, state.get_draining_nodes())

    def note(self, lost: Mapping[str, float], draining: Iterable[str]) -> None:
        """Take in which nodes are lost, and since when at the latest; and which ones drain now."""
        self._lost = {**lost, **self._lost}
        self._draining = frozenset(draining)
