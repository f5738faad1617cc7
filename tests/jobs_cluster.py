"""A Ray cluster of one node with a Jobs API and a token, for tests that submit jobs."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from tests.ray_cluster import processes
from tests.servers import free_ports

START_SECONDS = 120.0


class JobsCluster:
    """A head with CPUs, on this machine only, whose Jobs API is at `address`. A context manager.

    Its nodes would share their folders, as if they were one machine's, so there is only one.
    """

    def __init__(self, cpus: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets need a short path
        port, dashboard, agent, client = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        """What whoever joins the cluster has set."""
        own = {
            "RAY_TMPDIR": self._folder,
            # A job runs whatever `python` is.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        arguments = {
            "port": port, "num-cpus": cpus, "node-ip-address": "127.0.0.1",
            "dashboard-host": "127.0.0.1", "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent, "ray-client-server-port": client,
            "min-worker-port": 0, "max-worker-port": 0, "object-store-memory": 80 << 20,
            "include-dashboard": "true",
        }  # fmt: skip
        self._log = open(f"{self._folder}/log", "w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "ray"), "start", "--head", "--block",
                *(f"--{name}={value}" for name, value in arguments.items()),
            ],
            env=os.environ | self.environment | own,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> JobsCluster:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                said = self._log.read()[-3000:]
                self.close()
                raise AssertionError(f"the cluster does not start:\n{said}")
            time.sleep(0.1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything that runs of it."""
        for process in (*processes(), self._process.pid):
            try:
                of_ours = self._folder in Path(f"/proc/{process}/environ").read_text()
                if of_ours and process != os.getpid():
                    os.kill(process, signal.SIGKILL)
            except (OSError, UnicodeDecodeError):
                continue  # it ended while one looked
        self._process.wait()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        """Whether jobs can be asked for."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        try:
            request = urllib.request.Request(f"{self.address}/api/jobs/", headers=token)
            with urllib.request.urlopen(request, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
