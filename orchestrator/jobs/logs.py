"""What a job's driver says, as it says it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from orchestrator.errors import ClusterError
from orchestrator.jobs.cluster import INTERRUPTED, Cluster, Job

RETRY_SECONDS = 2.0
PATIENCE_SECONDS = 600.0
"""So long a head may be away before following it is given up."""
POLL_SECONDS = 0.2
FAILED = 1


def read_logs(cluster: Cluster, job: Job) -> str:
    """All that the driver has said so far. Raises `ClusterError` if the log cannot be had."""
    with cluster.asking():
        try:
            return str(cluster.client.get_job_logs(job.id))
        except RuntimeError as error:
            raise ClusterError(
                f"{cluster.address}: the log of {job.id} cannot be read; it lies on the node that its driver "
                f"ran on, which may be gone ({job.ray_status}: {job.message})"
            ) from error


def follow_logs(cluster: Cluster, job: Job, write: Callable[[str], None]) -> Job:
    """Hand on what the driver says until the job has ended; the job as it ended.

    A head that is away is waited for, up to `PATIENCE_SECONDS`; then raises `ClusterError`.
    """
    log = _Log(cluster, job.id, write)
    away_since: float | None = None
    while True:
        # aiohttp and Ray have many ways to say that the connection is gone; the job tells what it means.
        with suppress(Exception):
            asyncio.run(log.hand_on())
        try:
            job = cluster.read(job.id)
        except ClusterError:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > PATIENCE_SECONDS:
                raise
            time.sleep(RETRY_SECONDS)
            continue
        if not job.is_active:
            return job
        away_since = None
        time.sleep(POLL_SECONDS)


class _Log:
    """A job's log, handed on once over however many connections."""

    def __init__(self, cluster: Cluster, job_id: str, write: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._job_id = job_id
        self._write = write
        self._handed_on = 0

    async def hand_on(self) -> None:
        """Hand on what is new until the connection ends. It begins at the log's first character."""
        position = 0
        async for text in self._cluster.client.tail_job_logs(self._job_id):
            new = text[max(0, self._handed_on - position) :]
            position += len(text)
            if new:
                self._handed_on = position
                self._write(new)


def exit_code_of(job: Job) -> int:
    """What `darwin` ends with, that followed a job: the driver's own exit code."""
    if job.status == "stopped":
        return INTERRUPTED
    return 0 if job.status == "done" else job.exit_code or FAILED


def ended_line(job: Job) -> str:
    """A job's state, and how it ended, for people."""
    code = "" if job.exit_code is None else f" (exit code {job.exit_code})"
    why = f": {job.message.splitlines()[0]}" if job.status == "failed" and job.message else ""
    return f"{job.id} {job.status}{code}{why}"
