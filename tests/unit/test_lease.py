"""The lease: one owner, who is found out when it dies and is never robbed while it lives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ledger import lease as lease_module
from orchestrator.ledger.lease import KEY, Lease, acquire_lease
from workers.errors import BadInputError
from workers.storage import PreconditionFailedError, StorageError
from workers.storage.folder import FolderStore

NEVER = 60.0
PATIENCE = 30.0


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


@pytest.fixture
def leases() -> Iterator[list[Lease]]:
    """Those that a test took, so that their threads end with it."""
    taken: list[Lease] = []
    yield taken
    for lease in taken:
        lease.release()


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the module's times: by default no heartbeat, and no end of patience with a silent owner."""

    def set_pace(heartbeat: float = NEVER, lifetime: float = NEVER) -> None:
        monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", heartbeat)
        monkeypatch.setattr(lease_module, "LIFETIME_SECONDS", lifetime)
        monkeypatch.setattr(lease_module, "POLL_SECONDS", 0.005)

    set_pace()
    return set_pace


def not_waiting(message: str) -> None:
    raise AssertionError(f"waited: {message}")


def content(store: FolderStore) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.read(KEY))
    return found


def change(store: FolderStore, **changes: Any) -> None:
    """Alter the lease behind everybody's back."""
    store.write(KEY, json.dumps(content(store) | changes).encode())


def owner_elsewhere(store: FolderStore) -> None:
    """Make the owner a process of another machine."""
    change(store, owner=content(store)["owner"] | {"machine": "elsewhere"}, host="far", pid=7)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


HOLDER = """
import sys
from orchestrator.ledger import lease
from workers.storage.folder import FolderStore
lease.HEARTBEAT_SECONDS, lease.LIFETIME_SECONDS, lease.POLL_SECONDS = 0.02, 600, 0.02
print("ready", flush=True)
sys.stdin.readline()
try:
    held = lease.acquire_lease(FolderStore(sys.argv[1]), lambda message: None)
    print(held.epoch, flush=True)
except ValueError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


def start_holders(store: FolderStore, count: int) -> list[subprocess.Popen[str]]:
    """Processes that all try to take the lease at once, say what came of it, and live on."""
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, store.uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    for holder in holders:
        assert read_line(holder) == "ready"
    for holder in holders:
        tell(holder)
    return holders


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


# -- taking and letting go -------------------------------------------------------------------


def test_epochs_count_the_owners(store: FolderStore, pace: Any) -> None:
    for epoch in (1, 2, 3):
        lease = acquire_lease(store, not_waiting)
        assert (lease.epoch, content(store)["epoch"]) == (epoch, epoch)
        assert not lease.lost
        lease.release()


def test_a_living_driver_is_not_robbed_and_named(
    store: FolderStore, pace: Any, leases: list[Lease]
) -> None:
    pace(heartbeat=0.01)
    leases.append(acquire_lease(store, not_waiting))
    with pytest.raises(BadInputError) as caught:
        acquire_lease(store, lambda message: None)
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
    assert store.uri in str(caught.value)
    assert not leases[0].lost
    assert content(store)["epoch"] == 1


def test_a_released_lease_does_not_beat_and_can_be_released_again(
    store: FolderStore, pace: Any, leases: list[Lease]
) -> None:
    pace(heartbeat=0.005)
    first = acquire_lease(store, not_waiting)
    wait_until(lambda: content(store)["beat"] > 1)
    first.release()
    after = content(store)
    assert after["owner"] is None
    leases.append(acquire_lease(store, not_waiting))
    first.release()
    assert content(store)["owner"] is not None


def test_releasing_a_lease_that_was_taken_over_leaves_the_new_one_alone(
    store: FolderStore, pace: Any
) -> None:
    lease = acquire_lease(store, not_waiting)
    owner_elsewhere(store)
    before = store.read(KEY)
    lease.release()
    assert store.read(KEY) == before


# -- owners that died ------------------------------------------------------------------------


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_driver_of_this_machine_is_not_waited_for(
    store: FolderStore, pace: Any, leases: list[Lease], reaped: bool
) -> None:
    (holder,) = start_holders(store, 1)
    assert read_line(holder) == "1"
    wait_until(lambda: content(store)["beat"] > 0)
    os.kill(holder.pid, signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        wait_until(
            lambda: Path(f"/proc/{holder.pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
        )
    leases.append(acquire_lease(store, not_waiting))
    assert leases[0].epoch == 2
    holder.communicate()


def test_another_process_under_the_dead_drivers_number_is_not_the_driver(
    store: FolderStore, pace: Any, leases: list[Lease]
) -> None:
    leases.append(acquire_lease(store, not_waiting))
    change(store, owner=content(store)["owner"] | {"started": "1"})
    leases.append(acquire_lease(store, not_waiting))
    assert leases[1].epoch == 2


def test_a_silent_driver_elsewhere_is_waited_for_and_then_replaced(
    store: FolderStore, pace: Any, leases: list[Lease]
) -> None:
    leases.append(acquire_lease(store, not_waiting))
    owner_elsewhere(store)
    pace(lifetime=0.1)
    messages: list[str] = []
    begun = time.monotonic()
    leases.append(acquire_lease(store, messages.append))
    assert time.monotonic() - begun >= 0.1
    assert leases[1].epoch == 2
    assert len(messages) > 1
    assert all("far" in message and "process 7" in message for message in messages)


def test_a_hung_driver_of_this_machine_is_waited_for_and_then_replaced(
    store: FolderStore, pace: Any, leases: list[Lease]
) -> None:
    leases.append(acquire_lease(store, not_waiting))
    pace(lifetime=0.1)
    messages: list[str] = []
    leases.append(acquire_lease(store, messages.append))
    assert leases[1].epoch == 2
    assert messages


def test_a_driver_elsewhere_that_beats_is_not_robbed(
    store: FolderStore, pace: Any, leases: list[Lease]
) -> None:
    leases.append(acquire_lease(store, not_waiting))
    owner_elsewhere(store)
    with pytest.raises(BadInputError, match="process 7 on far"):
        acquire_lease(store, lambda message: change(store, beat=content(store)["beat"] + 1))
    assert content(store)["epoch"] == 1


def test_a_driver_elsewhere_that_lets_go_meanwhile_is_followed_at_once(
    store: FolderStore, pace: Any, leases: list[Lease]
) -> None:
    leases.append(acquire_lease(store, not_waiting))
    owner_elsewhere(store)
    leases.append(acquire_lease(store, lambda message: change(store, owner=None)))
    assert leases[1].epoch == 2


# -- losing it -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["replaced", "removed", "damaged"])
def test_an_owner_notices_that_its_lease_is_gone(
    store: FolderStore, pace: Any, leases: list[Lease], how: str
) -> None:
    pace(heartbeat=0.01)
    leases.append(acquire_lease(store, not_waiting))
    if how == "replaced":
        owner = {"machine": "elsewhere", "started": "1", "token": "x"}
        lease = {"owner": owner, "host": "far", "pid": 7, "beat": 0, "epoch": 2}
        store.write(KEY, json.dumps(lease).encode())
    elif how == "removed":
        store.delete(KEY)
    else:
        store.write(KEY, b"{")
    wait_until(lambda: leases[0].lost)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[]", b"5", b"{}", b'{"owner": null}'])
def test_a_damaged_lease_is_named(store: FolderStore, pace: Any, damage: bytes) -> None:
    store.write(KEY, damage)
    with pytest.raises(BadInputError) as caught:
        acquire_lease(store, not_waiting)
    assert f"{store.uri}/{KEY}" in str(caught.value)


def test_a_lease_with_a_broken_owner_is_named(store: FolderStore, pace: Any) -> None:
    acquire_lease(store, not_waiting).release()
    for owner in ("somebody", {}, {"machine": "here"}):
        change(store, owner=owner)
        with pytest.raises(BadInputError, match=KEY):
            acquire_lease(store, not_waiting)


# -- stores that fail ------------------------------------------------------------------------


class UnsteadyStore(FolderStore):
    """A folder whose next few calls of an operation go wrong, as `plan` says."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.plan: dict[str, list[str]] = {"create": [], "replace": [], "read_with_version": []}

    def _fault(self, operation: str) -> str:
        return self.plan[operation].pop(0) if self.plan[operation] else "none"

    def create(self, key: str, data: bytes | bytearray | memoryview) -> str:
        if self._fault("create") == "answer lost":
            super().create(key, data)
        return super().create(key, data)

    def replace(self, key: str, data: bytes | bytearray | memoryview, version: str) -> str:
        fault = self._fault("replace")
        if fault == "down":
            raise StorageError("the store is down")
        if fault == "answer lost":
            super().replace(key, data, version)
        return super().replace(key, data, version)

    def read_with_version(self, key: str) -> tuple[bytes, str]:
        if self._fault("read_with_version") == "down":
            raise StorageError("the store is down")
        return super().read_with_version(key)


@pytest.fixture
def unsteady(tmp_path: Path) -> UnsteadyStore:
    return UnsteadyStore(tmp_path)


def test_the_unsteady_store_does_what_the_tests_below_build_on(unsteady: UnsteadyStore) -> None:
    unsteady.plan["create"] = ["answer lost"]
    with pytest.raises(PreconditionFailedError):
        unsteady.create("x", b"1")
    unsteady.plan["replace"] = ["answer lost"]
    with pytest.raises(PreconditionFailedError):
        unsteady.replace("x", b"2", unsteady.info("x").version)
    assert unsteady.read("x") == b"2"


@pytest.mark.parametrize(
    "plan",
    [
        {"replace": ["down", "down", "down"]},
        {"replace": ["answer lost", "answer lost"]},
        {"replace": ["answer lost"], "read_with_version": ["down"]},
    ],
    ids=["down for a while", "answers lost", "answer lost and then down"],
)
def test_a_store_that_fails_for_a_while_costs_no_lease(
    unsteady: UnsteadyStore, pace: Any, leases: list[Lease], plan: dict[str, list[str]]
) -> None:
    pace(heartbeat=0.005)
    leases.append(acquire_lease(unsteady, not_waiting))
    unsteady.plan |= plan
    wait_until(lambda: not any(unsteady.plan.values()) or leases[0].lost)
    # What others read while it beats on.
    plain = FolderStore(unsteady.uri)
    beat = content(plain)["beat"]
    wait_until(lambda: content(plain)["beat"] > beat + 2 or leases[0].lost)
    assert not leases[0].lost
    leases[0].release()
    assert content(plain)["owner"] is None


def test_a_first_lease_whose_answer_was_lost_is_ours(
    unsteady: UnsteadyStore, pace: Any, leases: list[Lease]
) -> None:
    unsteady.plan["create"] = ["answer lost"]
    leases.append(acquire_lease(unsteady, not_waiting))
    assert leases[0].epoch == 1
    leases[0].release()
    assert content(unsteady)["owner"] is None


def test_a_later_lease_whose_answer_was_lost_is_ours(
    unsteady: UnsteadyStore, pace: Any, leases: list[Lease]
) -> None:
    acquire_lease(unsteady, not_waiting).release()
    unsteady.plan["replace"] = ["answer lost"]
    leases.append(acquire_lease(unsteady, not_waiting))
    assert leases[0].epoch == 2
    leases[0].release()
    assert content(unsteady)["owner"] is None


# -- races -----------------------------------------------------------------------------------


class RivalIsFaster(FolderStore):
    """Before the first `replace` gets through, another driver takes the lease."""

    rival: Lease | None = None

    def replace(self, key: str, data: bytes | bytearray | memoryview, version: str) -> str:
        if self.rival is None:
            self.rival = acquire_lease(FolderStore(self.uri), not_waiting)
        return super().replace(key, data, version)


def test_a_rival_of_the_same_process_and_moment_is_not_taken_for_oneself(
    tmp_path: Path, pace: Any, leases: list[Lease]
) -> None:
    """Two drivers that started in one clock tick must not both think that they own the lease."""
    store = RivalIsFaster(tmp_path)
    acquire_lease(FolderStore(tmp_path), not_waiting).release()
    with pytest.raises(BadInputError, match="is being run by"):
        leases.append(acquire_lease(store, not_waiting))
    assert store.rival is not None
    leases.append(store.rival)


@pytest.mark.parametrize("before", ["nothing", "released", "dead"])
def test_of_processes_that_race_exactly_one_wins(
    store: FolderStore, pace: Any, before: str
) -> None:
    if before != "nothing":
        acquire_lease(store, not_waiting).release()
    if before == "dead":
        here = lease_module._this_process()
        change(store, owner=here | {"started": "1", "token": "x"}, pid=os.getpid())
    holders = start_holders(store, 4)
    answers = {holder.pid: read_line(holder) for holder in holders}
    winners = [pid for pid, answer in answers.items() if answer.isdecimal()]
    assert len(winners) == 1, answers
    assert answers.pop(winners[0]) == ("1" if before == "nothing" else "2")
    for answer in answers.values():
        assert f"process {winners[0]} on {socket.gethostname()}" in answer
    for holder in holders:
        tell(holder)
        holder.communicate(timeout=PATIENCE)
