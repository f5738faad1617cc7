"""Machines in miniature: namespaces of this one, joined by a switch, for tests that break things.

    with Hosts(["head", "node1", "node2"]) as hosts:
        hosts["head"].run("ray", "start", "--head", ...)
        hosts["node1"].lose_power()
        hosts["node2"].cut_off()

Each host has its own network, processes, mounts, name, `/tmp/ray` and shared memory, so that what runs on one
meets the others through the network alone; other folders are this machine's. Nothing of it can be reached
from outside, nor reaches there, and all is gone when its processes are. It takes root and Linux's own tools:
see `why_not`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

NETWORK = "10.77.0"
NEW_NETWORK = 0x40000000
"""Of Linux: the namespace to enter is one of networks."""

TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")

# The first process of a host, which ends with it. Ray waits for names that no server knows, so there is none
# to ask.
INIT = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs -o size=2g tmpfs /tmp/ray
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/resolv.conf" /etc/resolv.conf
hostname "$2"
ip link set lo up
echo up
exec sleep infinity
"""


@cache
def why_not() -> str | None:
    """Why there can be no hosts on this machine; None if there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"there is no {', '.join(missing)}"
    try:
        with Hosts(["probe"]) as hosts:
            hosts["probe"].run("true")
    except (OSError, AssertionError, subprocess.CalledProcessError) as error:
        return f"namespaces are not allowed here ({error})"
    return None


class Host:
    """One of `Hosts`. Commands run on it as if they were started there."""

    def __init__(self, name: str, address: str, files: Path) -> None:
        self.name = name
        self.address = address
        self._files = files
        self._unshare: subprocess.Popen[str] | None = None
        self._init = 0
        self.power_on()

    def power_on(self) -> None:
        """Start the host, without a network so far."""
        inside = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=SIGKILL"]
        self._unshare = subprocess.Popen(
            ["unshare", *inside, "bash", "-c", INIT, "init", str(self._files), self.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._unshare.stdout is not None and self._unshare.stderr is not None
        if self._unshare.stdout.readline() != "up\n":
            raise OSError(" ".join(self._unshare.stderr.read().split()))
        self._init = _child_of(self._unshare.pid)

    @property
    def process_id(self) -> int:
        """Of the process that all others of the host descend from; killed, it takes them along."""
        return self._init

    def command(self, *command: str) -> list[str]:
        """The command that runs `command` on the host, in this process's folder."""
        assert self._unshare is not None, f"{self.name} has no power"
        namespaces = ["-n", "-m", "-p", "-u", "-i", f"--wd={os.getcwd()}"]
        return ["nsenter", "-t", str(self._init), *namespaces, "--", *command]

    def start(
        self, *command: str, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command on the host; `options` are those of `subprocess.Popen`."""
        own = os.environ | dict(environment or {})
        return subprocess.Popen(self.command(*command), env=own, text=True, **options)

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, seconds: float = 300
    ) -> str:
        """Run a command on the host to its end; its standard output. It must end with 0."""
        process = self.start(
            *command, environment=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == 0, f"{self.name}: {' '.join(command)}\n{out}\n{err}"
        return out

    @contextmanager
    def network(self) -> Iterator[None]:
        """Let this thread, and those that it starts meanwhile, reach what the host reaches."""
        with (
            open("/proc/thread-self/ns/net") as own,
            open(f"/proc/{self._init}/ns/net") as there,
        ):
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(own.fileno())

    def processes(self, name: str) -> list[int]:
        """The ids, among this machine's processes, of those on the host whose title begins with `name`."""
        found = []
        namespace = os.readlink(f"/proc/{self._init}/ns/pid")
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "ns/pid") == namespace:
                    program = (entry / "cmdline").read_text().split("\0")[0]
                    if program.startswith(name) or Path(program).name == name:
                        found.append(int(entry.name))
            except OSError:
                continue  # it ended while one looked
        return found

    def lose_power(self) -> None:
        """Everything that runs on the host is gone at once, without a word to the others."""
        if self._unshare is not None:
            os.kill(self._init, signal.SIGKILL)
            self._unshare.communicate()
            self._unshare = None

    def cut_off(self) -> None:
        """Unplug the host from the network."""
        self.run("ip", "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        """Plug it in again."""
        self.run("ip", "link", "set", "eth0", "up")


class Hosts:
    """Hosts of these names, which know each other by them. A context manager."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._hosts: dict[str, Host] = {}
        self._ends = ExitStack()

    def __enter__(self) -> Hosts:
        with ExitStack() as ends:
            files = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
            addresses = {name: f"{NETWORK}.{10 + n}" for n, name in enumerate(self._names)}
            known = {"localhost": "127.0.0.1"} | addresses
            lines = [f"{address} {name}\n" for name, address in known.items()]
            (files / "hosts").write_text("".join(lines))
            (files / "resolv.conf").touch()
            switch = Host("switch", "", files)
            ends.callback(switch.lose_power)
            switch.run("ip", "link", "add", "br0", "type", "bridge")
            switch.run("ip", "link", "set", "br0", "up")
            self._switch = switch
            for name, address in addresses.items():
                self._hosts[name] = Host(name, address, files)
                ends.callback(self._hosts[name].lose_power)
                self._connect(name)
            self._ends = ends.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.close()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def power_on(self, name: str) -> None:
        """Start a host again that has lost its power: nothing runs on it."""
        self._hosts[name].power_on()
        self._connect(name)

    def _connect(self, name: str) -> None:
        host = self._hosts[name]
        number = self._names.index(name)
        port = f"port{number}"
        card = f"02:00:00:00:00:{number:02x}"  # the others remember it
        other_end = ["peer", "name", "eth0", "address", card, "netns", str(host.process_id)]
        # Among this machine's processes, where the host's first one has its number.
        switch = ["nsenter", "-t", str(self._switch.process_id), "-n", "ip", "link", "add", port]
        subprocess.run([*switch, "type", "veth", *other_end], check=True, capture_output=True)
        self._switch.run("ip", "link", "set", port, "master", "br0", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, NEW_NETWORK) != 0:
        raise OSError(ctypes.get_errno(), "this network cannot be entered")


def _child_of(process: int) -> int:
    return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])
