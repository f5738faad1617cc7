"""Servers that tests start for themselves, on this machine only."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts import Host

_START_SECONDS = 30.0
_STARTS = 3
_PORT_FLAGS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


@dataclass(frozen=True)
class S3Server:
    """A running server: its endpoint, and the environment that leads boto3 to it."""

    endpoint: str
    environment: dict[str, str]

    def at(self, endpoint: str) -> dict[str, str]:
        """The environment for the same server behind another endpoint, such as a proxy's."""
        return {**self.environment, "AWS_ENDPOINT_URL": endpoint}


@contextmanager
def seaweedfs_server(host: Host | None = None) -> Iterator[S3Server]:
    """A SeaweedFS server, here or on a host, with a fresh folder and credentials; gone after the block."""
    address = "127.0.0.1" if host is None else host.address
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    for start in range(1, _STARTS + 1):
        folder = Path(tempfile.mkdtemp(prefix="seaweedfs-"))
        ports = dict(zip(_PORT_FLAGS, free_ports(len(_PORT_FLAGS)), strict=True))
        endpoint = f"http://{address}:{ports['s3.port']}"
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            # Whatever the machine is configured for must not leak into a test.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        process = _start_seaweedfs(folder, ports, environment, address, host)
        try:
            try:
                network: AbstractContextManager[None] = host.network() if host else nullcontext()
                with network:
                    _await_answer(endpoint, process)
            except RuntimeError as error:
                # A port may have been taken between the choice and the start: choose others.
                if start == _STARTS:
                    log = (folder / "log").read_text(errors="replace")[-4000:]
                    raise RuntimeError(f"{error}; it says:\n{log}") from error
                continue
            yield S3Server(endpoint, environment)
            return
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)
            for port in ports.values():
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel hands out to others."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randint(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def _start_seaweedfs(
    folder: Path,
    ports: dict[str, int],
    environment: dict[str, str],
    address: str,
    host: Host | None,
) -> subprocess.Popen[Any]:
    command = [
        str(Path(sys.executable).parent / "weed"),
        "mini",
        f"-dir={folder / 'data'}",
        f"-ip={address}",
        f"-ip.bind={address}",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{flag}={port}" for flag, port in ports.items()),
    ]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            command if host is None else host.command(*command),
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _await_answer(endpoint: str, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"weed ended with {process.returncode}")
        try:
            urllib.request.urlopen(endpoint, timeout=2)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"weed did not answer at {endpoint} within {_START_SECONDS:.0f} s")
