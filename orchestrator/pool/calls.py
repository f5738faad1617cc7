"""Calls to workers that merge or scan: in processes of this machine, or (see `pool`) actors of a cluster."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol

from orchestrator.pool.pool import Pool
from orchestrator.workers_config import WorkersConfig
from workers.actors import MergeSpec, MergeWorker
from workers.checkpoints import Checkpoint
from workers.merging.plan import BASE
from workers.storage import StorageError

MOST_PROCESSES = 16
"""Of this machine: beyond, the disk is the limit, and each takes memory."""


class Calls(Protocol):
    """Workers that take calls: processes of this machine, or actors of a pool."""

    @property
    def workers(self) -> int:
        """How many there are to divide a model among; 1 for those that share a machine's memory."""

    def group_bytes(self, total: int) -> int:
        """About as much of `total` is given to a worker at once."""

    def each(
        self,
        method: str,
        arguments: list[tuple[Any, ...]],
        preferred: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Call the workers' `method` with each of `arguments`; (number, result) as they come.

        `preferred` may say which worker, from 0 on, had better take each call."""


class LocalCalls:
    """Calls to one worker object: in this process, or in copies of it that share its memory.

    Processes, not threads: a merge is many short operations, and threads would spend as much time on
    handing Python's lock to one another.
    """

    def __init__(self, worker: MergeWorker, processes: int = 1) -> None:
        self._worker = worker
        self._processes = processes

    @property
    def workers(self) -> int:
        """See `Calls.workers`."""
        return 1

    def group_bytes(self, total: int) -> int:
        """See `Calls.group_bytes`: each part by itself."""
        return 1

    def each(
        self,
        method: str,
        arguments: list[tuple[Any, ...]],
        preferred: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """See `Calls.each`. Raises `StorageError` if a process dies."""
        if self._processes == 1 or len(arguments) < 2:
            for number, given in enumerate(arguments):
                yield number, getattr(self._worker, method)(*given)
            return
        if "torch" in sys.modules:  # else it is not needed, and importing it takes seconds
            sys.modules["torch"].set_num_threads(1)
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


@contextmanager
def open_calls(
    parents: dict[str, Checkpoint],
    base: Checkpoint | None,
    workers: WorkersConfig | None,
    address: str | None,
    prepare: Callable[[MergeWorker], Any] = lambda worker: None,
    processes: int | None = None,
) -> Iterator[Calls]:
    """Workers that have these parents: actors on the Ray cluster at `address`, or on this machine; without
    `workers` so many `processes` of this one, by default one for each core, which share what `prepare` has
    made."""
    checkpoints = parents | ({BASE: base} if base else {})
    spec = MergeSpec(
        parents={name: parent.location for name, parent in parents.items()},
        base=base.location if base else None,
        fingerprints={name: checkpoint.fingerprint for name, checkpoint in checkpoints.items()},
        threads=max(1, int(workers.cpus)) if workers else 1,
    )
    if workers is not None:
        with Pool(spec, workers, address, lambda description: None) as pool:
            yield pool
        return
    worker = MergeWorker(spec)
    worker.parents, worker.base = parents, base
    prepare(worker)
    yield LocalCalls(worker, processes or min(len(os.sched_getaffinity(0)), MOST_PROCESSES))
