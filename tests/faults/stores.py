"""A store that answers wrongly, late or not at all."""

from __future__ import annotations

from tests.fault_proxy import (
    FaultProxy,
    answer,
    cut_answer,
    delay,
    lose_answer,
    reset,
    wrong_length,
)
from tests.faults.host_cluster import put_parents
from tests.faults.run import LostError, Run

SHARE = 0.2
TIMEOUT_SECONDS = 61.0
"""Longer than the client waits for an answer."""

FAULTS = (
    answer(503, "SlowDown"),
    answer(500, "InternalError"),
    reset,
    lose_answer,
    cut_answer(after_bytes=0),
    cut_answer(after_bytes=100),
    cut_answer(after_bytes=50_000, cleanly=True),
    wrong_length(7),
    wrong_length(-7),
    delay(0.3),
)


def store_troubled(run: Run) -> None:
    """A fifth of all requests fails in one way or another, and one of the reads is not answered in time."""
    server = run.ground.s3
    location = run.ground.bucket()
    run.move_to(location, put_parents(location))
    with FaultProxy(server.endpoint) as proxy:
        proxy.trouble(SHARE, *FAULTS)
        proxy.inject(delay(TIMEOUT_SECONDS), only="GET")
        driver = run.start(environment=server.at(proxy.endpoint) | {"DARWIN_CACHE": run.cache()})
        run.end(driver)
        if proxy.faults_left or not proxy.troubled:
            raise LostError("the proxy was passed by")
        run.breaks += proxy.troubled + 1
