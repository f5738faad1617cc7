"""Threads that share the work of a merge, and those of torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


def in_threads(work: Callable[[Any], Any], items: Iterable[Any], threads: int) -> None:
    """`work(item)` for every item, by so many threads; the first error ends it."""
    if threads == 1:
        for item in items:
            work(item)
        return
    remaining = iter(items)
    lock = threading.Lock()
    stopped = threading.Event()

    def loop() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    item = next(remaining, stopped)
                if item is stopped:
                    return
                work(item)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in [pool.submit(loop) for _ in range(threads)]:
                future.result()
        finally:
            stopped.set()  # an interrupt arrives here, not in the threads


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch with so many threads: sums are the same only for the same number of them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
