"""An S3 server that lets nobody do more than an IAM policy says: a proxy before a real server.

Which action a request needs is taken from AWS's table "Required permissions for Amazon S3 API operations";
how statements are matched, from its "Policy evaluation logic", as far as the shipped policy uses it (Allow,
wildcards, StringLike). For an object that is missing the answer is 403 and not 404 unless the whole bucket
may be listed, which is the strictest reading of AWS's description of GetObject and HeadObject.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from orchestrator.config import SHIPPED
from tests.fault_proxy import Exchange, FaultProxy, answer

POLICY = SHIPPED / "cluster" / "s3_policy.json"


@dataclass(frozen=True)
class Need:
    """One right that a request needs."""

    action: str
    resource: str
    prefix: str | None = None
    """What a listing asks for; other requests have none."""


@dataclass
class Policy:
    """Statements that allow; what none of them allows is refused."""

    statements: list[dict[str, Any]]

    @staticmethod
    def shipped(**places: str) -> Policy:
        """The shipped policy with its placeholders replaced."""
        text = Path(POLICY).read_text()
        for name, value in places.items():
            text = text.replace(name, value)
        return Policy(json.loads(text)["Statement"])

    def allows(self, need: Need) -> bool:
        return any(_allows(statement, need) for statement in self.statements)

    def rights(self) -> list[tuple[str, str]]:
        """(statement, action) of each single right."""
        return [(one["Sid"], action) for one in self.statements for action in one["Action"]]

    def without(self, sid: str, action: str) -> Policy:
        return Policy(
            [
                one | {"Action": [a for a in one["Action"] if (one["Sid"], a) != (sid, action)]}
                for one in self.statements
            ]
        )


def _allows(statement: dict[str, Any], need: Need) -> bool:
    assert statement["Effect"] == "Allow"
    if need.action not in statement["Action"]:
        return False
    if not fnmatchcase(need.resource, statement["Resource"]):
        return False
    for operator, conditions in statement.get("Condition", {}).items():
        assert operator == "StringLike"
        assert list(conditions) == ["s3:prefix"]
        patterns = conditions["s3:prefix"]
        if need.prefix is None or not any(fnmatchcase(need.prefix, p) for p in patterns):
            return False
    return True


def needs_of(head: list[bytes]) -> list[Need]:
    """What a request, of which this is the head, needs; it is addressed in path style."""
    method, target, _ = head[0].decode().split(" ", 2)
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
    arn = f"arn:aws:s3:::{bucket}"
    if not key:
        if method == "GET" and "uploads" in query:
            return [Need("s3:ListBucketMultipartUploads", arn)]
        assert method == "GET"
        assert query.get("list-type") == ["2"]
        return [Need("s3:ListBucket", arn, query.get("prefix", [""])[0])]
    names = {line.split(b":")[0].decode().lower() for line in head[1:]}
    assert "x-amz-copy-source" not in names
    actions = {
        "GET": ["s3:ListMultipartUploadParts" if "uploadId" in query else "s3:GetObject"],
        "HEAD": ["s3:GetObject"],
        "PUT": ["s3:PutObject", *(["s3:GetObject"] if "if-match" in names else [])],
        "POST": ["s3:PutObject"],  # begins or completes an upload
        "DELETE": ["s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject"],
    }[method]
    return [Need(action, f"{arn}/{key}") for action in actions]


@dataclass
class Gate:
    """Lets through what the policy allows, and keeps what was asked."""

    policy: Policy
    asked: set[Need] = field(default_factory=set)
    refused: list[Need] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, exchange: Exchange) -> None:
        needs = needs_of(exchange.head)
        refused = [need for need in needs if not self.policy.allows(need)]
        with self._lock:
            self.asked.update(needs)
            self.refused += refused
        if refused:
            answer(403, "AccessDenied")(exchange)
        given = exchange.pass_request()
        bucket = needs[0].resource.split("/")[0]
        is_missing = exchange.head[0].startswith((b"GET", b"HEAD")) and b" 404 " in given[0]
        if is_missing and not self.policy.allows(Need("s3:ListBucket", bucket)):
            exchange.drop_answer(given)
            answer(403, "AccessDenied")(exchange)
        exchange.pass_answer(given)


@contextmanager
def guarded(endpoint: str, policy: Policy) -> Iterator[tuple[str, Gate]]:
    """The server at `endpoint` behind the policy; where it is then, and its gate."""
    gate = Gate(policy)
    with FaultProxy(endpoint) as proxy:
        proxy.trouble(1.0, gate)
        yield proxy.endpoint, gate
