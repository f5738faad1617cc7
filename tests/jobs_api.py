"""A stand-in for the Jobs API of a cluster's head, that fails where a test wants it to.

It answers what Ray 2.60 answers; that the real one does, tests/end_to_end/test_jobs.py shows.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

from aiohttp import web


class JobsApi:
    """A server on this machine, in a thread of its own. A context manager."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        """Submission id -> what is told of it."""
        self.submitted: list[dict[str, Any]] = []
        """Requests that were accepted."""
        self.before_submit: Callable[[], None] = lambda: None
        self.connections: list[Callable[[web.WebSocketResponse], Awaitable[None]]] = []
        """What each next connection to a log does; each but the last one ends in an error."""
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def add(self, job_id: str, status: str, **more: Any) -> None:
        """A job as Ray tells of it."""
        self.jobs[job_id] = {
            "type": "SUBMISSION", "submission_id": job_id, "job_id": None, "status": status,
            "entrypoint": "", "message": "", "start_time": 1000 + len(self.jobs), **more,
        }  # fmt: skip

    def __enter__(self) -> JobsApi:
        self._thread.start()
        assert self._up.wait(30)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._up.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/packages/{protocol}/{name}", self._has_package)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{id}", self._read)
        app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0]
        self.address = f"http://{host}:{port}"

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0"})

    async def _has_package(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        self.before_submit()
        job_id = wanted["submission_id"]
        if job_id in self.jobs:
            return web.Response(
                status=400,
                text=f"Traceback\nValueError: Job with submission_id {job_id} already exists. Please",
            )
        self.submitted.append(wanted)
        self.add(job_id, "PENDING", metadata=wanted["metadata"])
        return web.json_response({"job_id": job_id, "submission_id": job_id})

    async def _read(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return web.Response(status=404, text="does not exist")
        return web.json_response(job)

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        answer = web.WebSocketResponse()
        await answer.prepare(request)
        await self.connections.pop(0)(answer)
        if self.connections and request.transport is not None:
            request.transport.abort()  # as if the head were gone
        return answer
