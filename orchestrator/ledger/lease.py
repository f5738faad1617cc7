"""The lease: who owns a campaign. Taken and kept alive by compare-and-swap on one object.

A contender never compares clocks. It watches the object: a lease that changed while it watched is
alive; one that did not change for `LIFETIME_SECONDS` of the contender's own time is dead, and so is one
whose owner was a process of this very machine that is gone. The lease keeps honest drivers apart; what
stops a driver that does not know it was replaced is the ledger (`LeaseLostError`).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.ledger.stop_request import interrupt, is_requested
from workers.errors import BadInputError
from workers.storage import ObjectNotFoundError, PreconditionFailedError, StorageError, Store
from workers.storage.documents import keys, maybe, parse_json, text, whole

KEY = "lease.json"
_OWNER = keys({"machine": text, "started": text})
_LEASE = keys({"owner": maybe(_OWNER), "host": text, "pid": whole, "beat": whole, "epoch": whole})
HEARTBEAT_SECONDS = 3.0
LIFETIME_SECONDS = 15.0
POLL_SECONDS = 0.5


class Lease:
    """A campaign's lease, held until `release`. `epoch` counts the owners, from 1.

    An owner that is asked to stop (`stop_request`) has its main thread interrupted.
    """

    def __init__(self, store: Store, epoch: int, version: str, data: dict[str, Any]) -> None:
        self.store = store
        self.epoch = epoch
        self._version = version
        self._data = data
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        self._thread.start()
        # In a thread of its own: a store that is slow with this must not keep a heartbeat from coming.
        threading.Thread(target=self._listen, name="stop requests", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether another driver is known to have taken it."""
        return self._lost.is_set()

    def _keep_alive(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if not self._beat():
                    self._lost.set()
                    return
            except (StorageError, BadInputError):
                # The store, or credentials for it, may come back. Should somebody take over meanwhile,
                # the next try tells.
                continue

    def _beat(self) -> bool:
        """Renew the lease; whether it is still ours. Raises `StorageError` if that is not known."""
        data = self._data | {"beat": self._data["beat"] + 1}
        try:
            version = self.store.replace(KEY, _dump(data), self._version)
        except PreconditionFailedError:
            # It is ours after all if this was a retried request that met its own first try.
            try:
                content, version = self.store.read_with_version(KEY)
                data = _parse(content)
            except (ObjectNotFoundError, ValueError):
                return False
            if data["owner"] != self._data["owner"]:
                return False
        self._data, self._version = data, version
        return True

    def _listen(self) -> None:
        """Interrupt the main thread, once, if this owner is asked to stop."""
        token = self._data["owner"]["token"]
        while not self._stop.wait(HEARTBEAT_SECONDS) and not self.lost:
            with suppress(StorageError, BadInputError):
                if is_requested(self.store, self.epoch, token) and not self._stop.is_set():
                    interrupt()
                    return

    def release(self) -> None:
        """Let the next driver in at once. The object stays, so that epochs go on counting."""
        self._stop.set()
        self._thread.join()
        if not self._lost.is_set():
            try:
                self.store.replace(KEY, _dump(self._data | {"owner": None}), self._version)
            except StorageError:
                return


def acquire_lease(store: Store, waiting: Callable[[str], None], newest_epoch: int = 0) -> Lease:
    """Own the campaign in `store`. Raises `BadInputError` if a living driver does.

    `newest_epoch` is that of the ledger: epochs go on from there also if the lease object was removed.
    May take `LIFETIME_SECONDS` if the last owner died elsewhere; `waiting` is told why.
    """
    # The token tells this call from every other, also of a process that started in the same tick.
    owner = _this_process() | {"token": secrets.token_hex(8)}
    mine: dict[str, Any]
    mine = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "beat": 0}
    data = mine | {"epoch": newest_epoch + 1}
    try:
        return Lease(store, data["epoch"], store.create(KEY, _dump(data)), data)
    except PreconditionFailedError:
        found, version = _read(store)
    if found["owner"] == owner:  # a retried request met its own first try
        return Lease(store, data["epoch"], version, data)
    deadline = time.monotonic() + LIFETIME_SECONDS
    while _may_be_alive(found) and time.monotonic() < deadline:
        waiting(
            f"the last driver ({found['host']}, process {found['pid']}) did not say good-bye; "
            f"waiting up to {LIFETIME_SECONDS:.0f} s for a sign of life"
        )
        time.sleep(POLL_SECONDS)
        latest, latest_version = _read(store)
        if latest_version != version:
            found, version = latest, latest_version
            if found["owner"] is not None:
                raise BadInputError(_in_use(store, found))
    data = mine | {"epoch": max(found["epoch"], newest_epoch) + 1}
    try:
        return Lease(store, data["epoch"], store.replace(KEY, _dump(data), version), data)
    except PreconditionFailedError:
        latest, version = _read(store)
        if latest["owner"] == owner:
            return Lease(store, data["epoch"], version, data)
        raise BadInputError(_in_use(store, latest)) from None


@dataclass(frozen=True)
class Sighting:
    """A lease as it was seen once, by somebody who does not want it."""

    epoch: int
    token: str | None
    """Of its owner; None if nobody owns it."""
    host: str
    process: int
    version: str
    may_live: bool
    """False if nobody owns it, or a process of this machine that is gone."""


def look_at_lease(store: Store) -> Sighting | None:
    """The campaign's lease; None if there is none. Raises `BadInputError` if it is damaged."""
    try:
        found, version = _read(store)
    except BadInputError as error:
        if isinstance(error.__cause__, ObjectNotFoundError):
            return None
        raise
    owner = found["owner"]
    return Sighting(
        epoch=found["epoch"],
        token=None if owner is None else str(owner.get("token", "")),
        host=str(found["host"]),
        process=found["pid"],
        version=version,
        may_live=_may_be_alive(found),
    )


def _in_use(store: Store, found: dict[str, Any]) -> str:
    return (
        f"{store.uri}: is being run by process {found['pid']} on {found['host']}; stop that driver first, or "
        "start a campaign of another name, or an evaluation into another --out"
    )


def _may_be_alive(found: dict[str, Any]) -> bool:
    """False if the lease was released or its owner is a process of this machine that is gone."""
    owner = found["owner"]
    if owner is None:
        return False
    if owner["machine"] != _this_process()["machine"]:
        return True
    return bool(_start_of(found["pid"]) == owner["started"])


def _this_process() -> dict[str, str]:
    """What tells this process from all others; `machine` also tells containers apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = f"{socket.gethostname()} {os.urandom(8).hex()}"
    return {"machine": machine, "started": _start_of(os.getpid()) or "?"}


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _read(store: Store) -> tuple[dict[str, Any], str]:
    try:
        data, version = store.read_with_version(KEY)
        return _parse(data), version
    except (ObjectNotFoundError, ValueError) as error:
        raise BadInputError(f"{store.uri}/{KEY}: removed or damaged ({error})") from error


def _parse(data: bytes) -> dict[str, Any]:
    """The content of a lease. Raises `ValueError` if it is none."""
    found: dict[str, Any] = parse_json(data)
    _LEASE(found)
    return found


def _dump(data: dict[str, Any]) -> bytes:
    return json.dumps(data).encode()
