"""The one retry policy of all remote stores: jittered exponential back-off, bounded twice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from workers.storage.store import StorageError

Result = TypeVar("Result")

# A generator of its own: the global one belongs to those who seed it.
_jitter = random.Random()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and for how long an operation is tried; the waits are in seconds.

    The wait after try number n is drawn evenly between 0 and `first_wait * 2**n`, never above
    `longest_wait`, so that many workers that met one fault do not come back together. No try starts
    when more than `total_seconds` would have passed since the first.
    """

    tries: int = 10
    first_wait: float = 0.1
    longest_wait: float = 15.0
    total_seconds: float = 180.0

    def wait_after(self, failed_tries: int) -> float:
        doublings = min(failed_tries, 60)  # Beyond, a float would overflow.
        return _jitter.uniform(0.0, min(self.longest_wait, self.first_wait * 2.0**doublings))


def call_with_retries(
    action: Callable[[], Result],
    what: str,
    passing_trouble: Callable[[Exception], str | None],
    policy: RetryPolicy,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """What `action` returns, tried again while it fails with errors that are transient.

    `passing_trouble` describes an error that is, and gives None for others, which pass through.
    `what` names the operation and its object. Raises `StorageError` when a bound is reached.
    """
    start = clock()
    failed_tries = 0
    while True:
        try:
            return action()
        except Exception as error:
            trouble = passing_trouble(error)
            if trouble is None:
                raise
            failed_tries += 1
            wait = policy.wait_after(failed_tries)
            passed = clock() - start
            if failed_tries >= policy.tries or passed + wait > policy.total_seconds:
                raise StorageError(
                    f"{what} failed {failed_tries} times in {passed:.0f} s, last with: {trouble}: "
                    "check that the store is up and reachable"
                ) from error
            sleep(wait)
