"""What must not get out: secrets in the environment, and sockets that others can reach."""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
from pathlib import Path

from tests.campaigns import ancestors

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

SECRETS = ("HF_TOKEN", "OPENAI_API_KEY", "RAY_AUTH_TOKEN", "WANDB_API_KEY")


def planted_secrets() -> dict[str, str]:
    """Variables that hold secrets as users have them, with values that are found nowhere by chance; and those
    of the store, which are in the environment already."""
    planted = {name: secrets.token_hex(32) for name in SECRETS}
    present = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return planted | {name: os.environ[name] for name in present if name in os.environ}


def files_under(folder: Path) -> dict[str, bytes]:
    """Path -> content of every ordinary file."""
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode)
    }


def listening(ancestor: int) -> set[tuple[str, Address]]:
    """(program, address) of every TCP socket on which a process or what it has started takes connections."""
    listeners = _listeners()
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if ancestor not in (int(entry.name), *ancestors(int(entry.name))):
                continue
            program = Path((entry / "cmdline").read_text().split("\0")[0]).name.strip()
            links = [os.readlink(link) for link in (entry / "fd").iterdir()]
        except (OSError, ValueError):
            continue  # it ended while one looked
        found |= {(program, listeners[link]) for link in links if link in listeners}
    return found


def _listeners() -> dict[str, Address]:
    """What an open file of a listening socket is a link to -> the socket's address."""
    found: dict[str, Address] = {}
    for table, width in (("tcp", 4), ("tcp6", 16)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != "0A":
                continue
            # Words of 32 bits in the order of this machine, which is the little end first.
            stored = bytes.fromhex(fields[1].split(":")[0])
            ordered = b"".join(stored[i : i + 4][::-1] for i in range(0, width, 4))
            address = ipaddress.ip_address(ordered)
            mapped = getattr(address, "ipv4_mapped", None)
            found[f"socket:[{fields[9]}]"] = mapped or address
    return found
