"""The retry policy: what is tried again, how long, and within what bounds. No test waits."""

from __future__ import annotations

import random

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    SSLError,
)
from hypothesis import given
from hypothesis import strategies as st

from workers.storage.retry import RetryPolicy, call_with_retries
from workers.storage.s3_requests import passing_trouble
from workers.storage.store import StorageError


class World:
    """A clock that moves only when someone sleeps or works."""

    def __init__(self, failures: list[Exception], seconds_per_try: float = 0.0) -> None:
        self.now = 1000.0
        self.waits: list[float] = []
        self.tries = 0
        self._failures = failures
        self._seconds_per_try = seconds_per_try

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def action(self) -> str:
        self.tries += 1
        self.now += self._seconds_per_try
        if self._failures:
            raise self._failures.pop(0)
        return "result"

    def run(self, policy: RetryPolicy) -> str:
        return call_with_retries(
            self.action,
            "reading s3://bucket/key",
            lambda error: str(error) if isinstance(error, TimeoutError) else None,
            policy,
            clock=lambda: self.now,
            sleep=self.sleep,
        )


def timeouts(count: int) -> list[Exception]:
    return [TimeoutError(f"timeout {number}") for number in range(1, count + 1)]


def test_what_works_is_tried_once() -> None:
    world = World([])
    assert world.run(RetryPolicy()) == "result"
    assert (world.tries, world.waits) == (1, [])


def test_what_passes_is_tried_until_it_has_passed() -> None:
    world = World(timeouts(5))
    assert world.run(RetryPolicy(tries=6)) == "result"
    assert (world.tries, len(world.waits)) == (6, 5)


def test_other_errors_pass_through_at_once() -> None:
    world = World([*timeouts(1), ValueError("a bug")])
    with pytest.raises(ValueError, match="a bug"):
        world.run(RetryPolicy())
    assert world.tries == 2


def test_the_number_of_tries_is_bounded() -> None:
    world = World(timeouts(100))
    with pytest.raises(StorageError, match=r"^reading s3://bucket/key failed 4 times in") as caught:
        world.run(RetryPolicy(tries=4))
    assert "timeout 4" in str(caught.value)
    assert str(caught.value.__cause__) == "timeout 4"
    assert (world.tries, len(world.waits)) == (4, 3)


@given(st.floats(0.01, 10), st.floats(0.01, 100), st.floats(0.1, 100), st.floats(0.5, 50))
def test_no_try_starts_after_the_time_is_over(
    first_wait: float, longest_wait: float, total_seconds: float, seconds_per_try: float
) -> None:
    world = World(timeouts(1000), seconds_per_try)
    policy = RetryPolicy(1000, first_wait, longest_wait, total_seconds)
    with pytest.raises(StorageError, match="failed"):
        world.run(policy)
    last_start = world.now - seconds_per_try - 1000.0
    assert last_start <= total_seconds + 1e-6
    assert all(wait <= longest_wait for wait in world.waits)


def test_waits_grow_and_are_spread_and_capped() -> None:
    policy = RetryPolicy(first_wait=0.1, longest_wait=5.0)
    for failed_tries, longest in ((1, 0.2), (2, 0.4), (5, 3.2), (6, 5.0), (2000, 5.0)):
        waits = [policy.wait_after(failed_tries) for _ in range(2000)]
        assert 0 <= min(waits) < 0.05 * longest
        assert 0.95 * longest < max(waits) <= longest
        assert sum(waits) / len(waits) == pytest.approx(longest / 2, rel=0.1)


def test_jitter_leaves_the_global_generator_alone() -> None:
    random.seed(1)
    state = random.getstate()
    waits = {RetryPolicy().wait_after(3) for _ in range(10)}
    assert random.getstate() == state
    random.seed(1)
    assert waits.isdisjoint({RetryPolicy().wait_after(3) for _ in range(10)})


def client_error(status: int, code: str) -> ClientError:
    response = {
        "Error": {"Code": code, "Message": "in words"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return ClientError(response, "GetObject")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        client_error(500, "InternalError"),
        client_error(502, "502"),
        client_error(503, "SlowDown"),
        client_error(504, "504"),
        client_error(429, "TooManyRequests"),
        client_error(400, "RequestTimeout"),
        client_error(400, "IncompleteBody"),
        client_error(403, "SlowDown"),
        client_error(409, "ConditionalRequestConflict"),
        ConnectTimeoutError(endpoint_url="http://x"),
        ReadTimeoutError(endpoint_url="http://x"),
        EndpointConnectionError(endpoint_url="http://x"),
        IncompleteReadError(actual_bytes=1, expected_bytes=2),
        SSLError(endpoint_url="https://x", error=OSError("EOF occurred")),
    ],
    ids=str,
)
def test_troubles_of_the_server_and_the_network_pass(error: Exception) -> None:
    trouble = passing_trouble(error)
    assert trouble
    assert "max retries" not in trouble


@pytest.mark.parametrize(
    "error",
    [
        client_error(400, "InvalidArgument"),
        client_error(403, "AccessDenied"),
        client_error(404, "NoSuchKey"),
        client_error(409, "BucketAlreadyExists"),
        client_error(412, "PreconditionFailed"),
        client_error(416, "InvalidRange"),
        client_error(501, "NotImplemented"),
        NoCredentialsError(),
        SSLError(endpoint_url="https://x", error=OSError("CERTIFICATE_VERIFY_FAILED")),
        StorageError("short"),
        ValueError("a bug"),
    ],
    ids=str,
)
def test_other_troubles_stay(error: Exception) -> None:
    assert passing_trouble(error) is None
