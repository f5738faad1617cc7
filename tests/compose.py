"""Services of docker-compose.yml as plain processes on `tests.hosts`, with their health checks.

What an engine for containers adds is done by hand: secrets and volumes are mounted where the file says, and
what ends is started again. Images are not: commands and code are those of this environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.hosts import Host, Hosts

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docker-compose.yml"
HEALTHY_SECONDS = 300.0
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def read_services(variables: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The file's services, with these values for its variables, or the file's own."""
    text = _VARIABLE.sub(lambda found: variables.get(found[1], found[2]), FILE.read_text())
    services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return services


class Compose:
    """The cluster of the file. Secrets, named volumes and logs are kept in `folder`."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self._services = read_services(variables)
        self._folder = folder
        make = [str(ROOT / "conf" / "cluster" / "secrets.sh"), str(folder / "secrets")]
        subprocess.run(make, check=True)

    def environment(self, service: str) -> dict[str, str]:
        """Of a service's processes: what the file gives, and this environment's commands and code."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ours = {
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        return ours | self._services[service].get("environment", {})

    def prepare(self, service: str, host: Host) -> None:
        """Mount a service's secrets and named volumes on a host that nothing runs on."""
        described = self._services[service]
        mounts = {
            self._folder / "secrets" / secret: f"/run/secrets/{secret}"
            for secret in described["secrets"]
        }
        for volume in described.get("volumes", []):
            source, _, target = volume.partition(":")
            if "/" not in source:
                (self._folder / source).mkdir(exist_ok=True)
                mounts[self._folder / source] = target
        # Folders of this machine stay as they are: the mounts are in ones that lie over them.
        host.run("bash", "-c", "for over in /run /srv; do mount -t tmpfs tmpfs $over; done")
        place = 'if [ -d "$0" ]; then mkdir -p "$1"; else mkdir -p "${1%/*}" && touch "$1"; fi'
        for source, target in mounts.items():
            host.run("bash", "-c", f'{place}; mount --bind "$0" "$1"', str(source), target)

    def up(self, hosts: Hosts, **services: str) -> None:
        """Start services, each on the host that is named, and wait until all of them are healthy."""
        running = {name: self._start(service, hosts[name]) for name, service in services.items()}
        deadline = time.monotonic() + HEALTHY_SECONDS
        for name, service in services.items():
            while not self._is_healthy(service, hosts[name]):
                log = (self._folder / f"{name}.log").read_text()
                assert time.monotonic() < deadline, f"{name} is not healthy\n{log}"
                if running[name].poll() is not None:
                    # With a container, all that it had started ends.
                    hosts[name].lose_power()
                    hosts.power_on(name)
                    running[name] = self._start(service, hosts[name])

    def run(self, host: Host, service: str, *arguments: str, expect: int = 0) -> str:
        """Run a service on a prepared host to its end, as `docker compose run` does; its output."""
        process = host.start(
            *self._services[service]["entrypoint"],
            *arguments,
            environment=self.environment(service),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=300)
        assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err}"
        return out

    def _start(self, service: str, host: Host) -> subprocess.Popen[str]:
        self.prepare(service, host)
        command = self._services[service]["command"]
        environment = self.environment(service)
        with open(self._folder / f"{host.name}.log", "a") as log:
            return host.start(*command, environment=environment, stdout=log, stderr=log)

    def _is_healthy(self, service: str, host: Host) -> bool:
        kind, *check = self._services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        environment = self.environment(service)
        process = host.start(*check, environment=environment, stderr=subprocess.DEVNULL)
        return process.wait(timeout=60) == 0
