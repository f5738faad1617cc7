"""The miniature machines that other tests stand on are apart, and break as machines do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import Hosts, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")

SERVER = "import http.server as h; h.HTTPServer(('', 80), h.BaseHTTPRequestHandler).serve_forever()"
CLIENT = (
    "import socket, sys\n"
    "try:\n"
    "    socket.create_connection((sys.argv[1], 80), timeout=2).close()\n"
    "except OSError:\n"
    "    print('no')\n"
    "else:\n"
    "    print('yes')\n"
)
AWAIT = "until ip address show dev eth0 | grep -q 'state UP'; do :; done"


def test_hosts_meet_through_their_network_alone() -> None:
    with Hosts(["one", "two"]) as hosts:
        one, two = hosts["one"], hosts["two"]

        def reaches(name: str) -> bool:
            return two.run(sys.executable, "-c", CLIENT, name) == "yes\n"

        listening = "until ss -ltn | grep -q ':80 '; do :; done"
        server = one.start(sys.executable, "-c", SERVER)
        one.run("bash", "-c", listening)
        assert one.run("hostname").strip() == "one"
        assert reaches("one")
        assert not reaches("localhost"), "it is another machine"
        before = os.readlink("/proc/thread-self/ns/net")
        with two.network(), socket.create_connection((one.address, 80)) as connection:
            assert connection.getsockname()[0] == two.address
        assert os.readlink("/proc/thread-self/ns/net") == before
        (found,) = one.processes(Path(sys.executable).name)
        assert SERVER in Path(f"/proc/{found}/cmdline").read_text()
        one.run("touch", "/tmp/ray/mine", "/dev/shm/mine")
        two.run("test", "!", "-e", "/tmp/ray/mine", "-a", "!", "-e", "/dev/shm/mine")
        one.cut_off()
        assert not reaches("one")
        one.plug_in()
        one.run("bash", "-c", AWAIT)
        assert reaches("one")
        one.lose_power()
        server.wait(timeout=10)
        assert not reaches("one")
        hosts.power_on("one")
        one.run("test", "!", "-e", "/tmp/ray/mine")
        server = one.start(sys.executable, "-c", SERVER)
        one.run("bash", "-c", listening)
        assert reaches("one")
        process = two.process_id
    server.wait(timeout=10)
    assert subprocess.run(["kill", "-0", str(process)], capture_output=True).returncode != 0
