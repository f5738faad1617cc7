"""Fixtures that tests of all rooms share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.servers import S3Server, seaweedfs_server

# The conformance suites ship with the package; their asserts should explain themselves too.
pytest.register_assert_rewrite(
    "workers.storage.conformance",
    "workers.storage.conformance_parts",
    "workers.storage.conformance_tools",
)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server for the whole run, started when the first test asks for it."""
    with seaweedfs_server() as server:
        yield server


@pytest.fixture(scope="session")
def s3_location(s3_server: S3Server) -> Iterator[str]:
    """A new bucket, as `s3://bucket`, with the environment set so that `open_store` reaches it.

    The bucket is shared by the session: each test takes a prefix of its own in it.
    """
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        bucket = f"test-{uuid.uuid4().hex}"
        boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"
