"""Calls to the workers of a merge: in processes of this machine, or (see `pool`) to actors of a cluster."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Protocol

from workers.actors import MergeWorker
from workers.storage import StorageError


class Calls(Protocol):
    """Workers that take calls: threads of this process, or actors of a pool."""

    def group_bytes(self, total: int) -> int:
        """About as much of `total` is given to a worker at once."""

    def each(self, method: str, arguments: list[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Call the workers' `method` with each of `arguments`; (number, result) as they come."""


class LocalCalls:
    """Calls to one worker object: in this process, or in copies of it that share its memory.

    Processes, not threads: a merge is many short operations, and threads would spend as much time on
    handing Python's lock to one another.
    """

    def __init__(self, worker: MergeWorker, processes: int = 1) -> None:
        self._worker = worker
        self._processes = processes

    def group_bytes(self, total: int) -> int:
        """See `Calls.group_bytes`: each part by itself."""
        return 1

    def each(self, method: str, arguments: list[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """See `Calls.each`. Raises `StorageError` if a process dies."""
        if self._processes == 1 or len(arguments) < 2:
            for number, given in enumerate(arguments):
                yield number, getattr(self._worker, method)(*given)
            return
        import torch

        torch.set_num_threads(1)
        pool = ProcessPoolExecutor(
            min(self._processes, len(arguments)),
            get_context("fork"),
            _begin_process,
            (self._worker, os.getpid()),
        )
        try:
            futures = {
                pool.submit(_call, method, given): number for number, given in enumerate(arguments)
            }
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise StorageError(
                "a process of the merge was ended from outside, perhaps for want of memory, or because a "
                "parent's file was cut short; run the same command again to go on"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_own: dict[str, MergeWorker] = {}


def _begin_process(worker: MergeWorker, driver: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver takes it, and ends us
    threading.Thread(target=_end_with, args=(driver,), daemon=True).start()
    _own["worker"] = worker


def _end_with(driver: int) -> None:
    """End this process when the driver was killed: the pool itself would wait for more work for ever."""
    while os.getppid() == driver:
        time.sleep(1.0)
    os._exit(1)


def _call(method: str, given: tuple[Any, ...]) -> Any:
    return getattr(_own["worker"], method)(*given)
