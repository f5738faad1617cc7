"""Whose turn it is: which worker takes which of the calls that wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Turns:
    """Numbers of calls that wait. A worker takes those that are meant for it, in their order; then those
    that are meant for nobody; then the last one of the worker that has most left, so that none idles."""

    def __init__(self, count: int, preferred: Sequence[int] | None = None) -> None:
        """`preferred` has the worker of each of `count` calls."""
        self._own: dict[int, deque[int]] = {}
        self._anyones: deque[int] = deque()
        for number in range(count):
            queue = self._own.setdefault(preferred[number], deque()) if preferred else self._anyones
            queue.append(number)

    def __len__(self) -> int:
        return len(self._anyones) + sum(len(queue) for queue in self._own.values())

    def take(self, worker: int) -> int:
        """The next call of a worker. Some must wait."""
        own = self._own.get(worker)
        if own:
            return own.popleft()
        if self._anyones:
            return self._anyones.popleft()
        return max(self._own.values(), key=len).pop()

    def put_back(self, number: int) -> None:
        """Let a call that has failed wait again, for whoever comes first."""
        self._anyones.append(number)
