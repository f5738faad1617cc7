"""What a user is told about a cluster that does not answer as one should."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.errors import ClusterError
from orchestrator.jobs.cluster import Cluster
from orchestrator.jobs.logs import read_logs
from orchestrator.jobs.submitting import new_job
from workers.errors import BadInputError


class Server(ThreadingHTTPServer):
    """Answers each path with a status and a body; 404 where none is given."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {}
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        status, body = self.server.answers.get(self.path.split("?")[0], (404, "not here"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def cluster(server: Server) -> Cluster:
    server.answers["/api/version"] = 200, json.dumps({"ray_version": "2.60.0", "version": "4"})
    return Cluster(server.address)


def test_a_server_that_is_no_cluster_is_refused(server: Server) -> None:
    with pytest.raises(ClusterError, match=r"^http://127.*Is this its dashboard's address"):
        Cluster(server.address)


def test_a_cluster_in_trouble_is_told_from_a_job_that_is_gone(
    server: Server, cluster: Cluster
) -> None:
    # `logs --follow` waits for the first, and gives up for the second.
    server.answers |= {"/api/jobs/": (500, "GCS is away"), "/api/jobs/one": (500, "GCS is away")}
    with pytest.raises(ClusterError, match="GCS is away"):
        cluster.read("one")
    with pytest.raises(ClusterError, match="GCS is away"):
        cluster.jobs()
    with pytest.raises(BadInputError, match="has no job two any more"):
        cluster.read("two")


def test_a_log_that_cannot_be_read_says_so_once(server: Server, cluster: Cluster) -> None:
    job = new_job("small", "s3://bucket/small", 1, "0")
    server.answers[f"/api/jobs/{job.id}/logs"] = 500, "its node is gone"
    with pytest.raises(ClusterError, match=r"^http://[^/]*: the log of darwin-small-"):
        read_logs(cluster, job)


def test_a_head_without_an_agent_says_what_to_look_at(server: Server, cluster: Cluster) -> None:
    server.answers["/api/jobs/"] = 500, "No available agent to submit job, please try again later."
    with pytest.raises(ClusterError, match="--dashboard-agent-listen-port"):
        cluster.jobs()


def test_a_token_that_is_missing_is_told_from_a_wrong_one(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["/api/version"] = 401, "Unauthorized"
    with pytest.raises(BadInputError, match="wants a token, and none was given"):
        Cluster(server.address)
    file = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(BadInputError, match=f"there is none in {file}"):
        Cluster(server.address)
