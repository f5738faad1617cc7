"""What the tests of `workers.storage.conformance` are written with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from workers.storage.store import PreconditionFailedError, Store

Result = TypeVar("Result")

THREADS = 8


def add_one(store: Store, key: str) -> bool:
    """Add one to the number in the object by compare and swap; whether it was not in vain."""
    data, version = store.read_with_version(key)
    return succeeds(lambda: store.replace(key, b"%d" % (int(data) + 1), version))


def succeeds(conditional_write: Callable[[], object]) -> bool:
    try:
        conditional_write()
    except PreconditionFailedError:
        return False
    return True


def in_threads(task: Callable[[int], Result]) -> list[Result]:
    """`task` of 0, 1, ... at once, each in a thread of its own."""
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> Result:
        barrier.wait()
        return task(number)

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(run, range(THREADS)))


def keys_of(store: Store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list_objects(prefix)]


@contextmanager
def raises(error: type[Exception], naming: str = "") -> Iterator[list[Exception]]:
    """Like `pytest.raises`, which would make this package depend on pytest."""
    caught: list[Exception] = []
    try:
        yield caught
    except error as raised:
        caught.append(raised)
    assert caught, f"no {error.__name__} was raised"
    assert naming in str(caught[0]), f"{caught[0]!r} does not name {naming!r}"
