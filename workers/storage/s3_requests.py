"""One request to S3: the client that sends it, what its errors mean, and which of them pass."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from workers.errors import BadInputError
from workers.storage.store import ObjectNotFoundError, PreconditionFailedError, StorageError

NOTHING = "ResponseMetadata"
"""For `ask`: what boto3 adds to every answer."""


class AccessRefusedError(StorageError):
    """The credentials do not allow it."""


class UploadGoneError(StorageError):
    """The server does not know the multipart upload (any more)."""


class CutAnswerError(Exception):
    """An answer lacks what it must hold."""


_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset(
    {
        "BadDigest",  # The bytes were damaged on their way, as in the next.
        "IncompleteBody",
        "ConditionalRequestConflict",  # Two conditional writes met: AWS asks to try again.
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
    }
)
_PASSING_ERRORS = (
    CutAnswerError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    FlexibleChecksumError,
    ResponseParserError,
    HTTPError,  # botocore lets urllib3's own errors through where a document breaks off
)


def ask(operation: Callable[..., Any], promised: str, **arguments: Any) -> Any:
    """One request, whose answer must hold `promised`.

    boto3 does not compare the length of a document with the one announced, and takes an empty one
    for an answer with nothing in it: a listing that was cut off would be a listing of no objects.
    """
    answer = operation(**arguments)
    if promised not in answer:
        raise CutAnswerError(f"an answer without its {promised}")
    return answer


def passing_trouble(error: Exception) -> str | None:
    """What is wrong, if the same request may well succeed a moment later; else None."""
    if isinstance(error, ClientError):
        code, status = _code_and_status(error)
        passes = status in _PASSING_STATUS or code in _PASSING_CODES
    else:
        # A server that is not who it should be is the one failed connection that stays so.
        passes = isinstance(error, _PASSING_ERRORS) and "CERTIFICATE_VERIFY" not in str(error)
    return _text(error) if passes else None


def as_storage_error(error: Exception, what: str) -> Exception:
    """The error that callers know for one of boto3's. `what` names the operation and its object."""
    if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
        return BadInputError(
            f"{what}: {error}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if not isinstance(error, ClientError):
        return StorageError(f"{what}: {_text(error)}")
    code, status = _code_and_status(error)
    if code == "NoSuchBucket":
        return BadInputError(f"{what}: there is no such bucket: create it, or mend the location")
    if code == "NoSuchUpload":
        return UploadGoneError(
            f"{what}: the unfinished upload was discarded before it was published: "
            "another owner has taken over"
        )
    if status == 412:
        return PreconditionFailedError(f"{what}: {_text(error)}")
    if status == 404:
        return ObjectNotFoundError(f"{what}: there is no such object")
    if status == 416:
        return StorageError(
            f"{what}: the object ends before that: "
            "it is cut short, or its index belongs to another object"
        )
    if status in (401, 403):
        return AccessRefusedError(
            f"{what}: access was refused ({code}): check the credentials and what they may do "
            "(without the right to list, AWS says this of a missing object too)"
        )
    return StorageError(f"{what}: {_text(error)}")


def _code_and_status(error: ClientError) -> tuple[str, int]:
    code = error.response.get("Error", {}).get("Code", "")
    return code, error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _text(error: Exception) -> str:
    """The error in words; boto3's own speak of its retries, which are off."""
    if not isinstance(error, ClientError):
        return str(error)
    code, status = _code_and_status(error)
    return f"{code} ({status}) {error.response.get('Error', {}).get('Message', '')}".strip()


def client_of_environment() -> Any:
    """The boto3 client that the environment and the AWS configuration files describe."""
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return _make_client(os.getpid(), tuple(sorted(aws.items())))


@lru_cache(maxsize=8)
def _make_client(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """One client, and so one pool of connections, for all stores of a process and environment.

    Making one takes 100 ms. `environment` is what boto3 reads by itself. Both are here only as the
    cache's key: what is forked must not use the connections of the process that it comes from.
    """
    core = botocore.session.get_session()
    session = boto3.session.Session(botocore_session=core)
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=10,
        read_timeout=60,
        tcp_keepalive=True,
        max_pool_connections=64,
    )
    client = session.client("s3", config=config)
    host = urlsplit(client.meta.endpoint_url).hostname or ""
    chosen_style = core.get_scoped_config().get("s3", {}).get("addressing_style")
    if chosen_style or re.search(r"\.amazonaws\.com(\.cn)?$", host):
        return client
    # Other servers rarely have a DNS name for each bucket.
    path_style = config.merge(Config(s3={"addressing_style": "path"}))
    return session.client("s3", config=path_style)
