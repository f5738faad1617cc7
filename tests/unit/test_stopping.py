"""A driver that is asked to stop through the store: it alone, wherever it runs, with its lease given back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import CampaignError
from orchestrator.jobs import listing, stopping
from orchestrator.jobs.listing import list_campaigns, render_list
from orchestrator.jobs.stopping import stop_campaign
from orchestrator.ledger import lease as lease_module
from orchestrator.ledger import stop_request
from orchestrator.ledger.lease import acquire_lease, look_at_lease
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.stop_request import is_requested, request_stop
from tests.campaigns import write_campaign
from workers.errors import BadInputError
from workers.storage.folder import FolderStore

DRIVER = """
import signal, sys, threading
from orchestrator.ledger import lease
from workers.storage.folder import FolderStore
lease.HEARTBEAT_SECONDS = 0.02
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
if sys.argv[2] == "stops":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
else:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
held = lease.acquire_lease(FolderStore(sys.argv[1]), print)
print("holds", held.epoch, flush=True)
try:
    while True:
        threading.Event().wait(0.05)
except KeyboardInterrupt:
    held.release()
    print("interrupted", flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store" / "small")


@pytest.fixture
def drivers() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for driver in started:
        driver.kill()
        driver.wait()
        assert driver.stdout is not None
        driver.stdout.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(listing, "POLL_SECONDS", 0.01)


def start(store: FolderStore, drivers: list[subprocess.Popen[str]], does: str = "stops") -> Any:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, store.uri, does], stdout=subprocess.PIPE, text=True
    )
    drivers.append(driver)
    assert driver.stdout is not None
    assert driver.stdout.readline().startswith("holds")
    return driver


def change_lease(store: FolderStore, **changes: Any) -> None:
    """Alter the lease behind everybody's back."""
    store.write(
        lease_module.KEY, json.dumps(json.loads(store.read(lease_module.KEY)) | changes).encode()
    )


def begin_campaign(store: FolderStore, folder: Path) -> None:
    """A ledger with nothing in it but its beginning."""
    from orchestrator.config import config_to_dict, load_config

    ledger = Ledger(store)
    ledger.open_epoch(1)
    config = config_to_dict(load_config(str(write_campaign(folder))))
    ledger.append("campaign", identity={}, config=config)


def test_a_driver_is_interrupted_and_lets_go(
    store: FolderStore, drivers: list[subprocess.Popen[str]]
) -> None:
    driver = start(store, drivers)
    said: list[str] = []
    result = stop_campaign(store, None, said.append)
    assert (result["status"], result["driver"], result["job"]) == ("stopped", "stopped", None)
    assert driver.communicate(timeout=30)[0] == "interrupted\n"
    assert str(driver.pid) in said[0]
    # The next one is not meant, whatever lies in the store.
    held = acquire_lease(store, print)
    assert not is_requested(
        store, held.epoch, json.loads(store.read(lease_module.KEY))["owner"]["token"]
    )
    held.release()
    assert stop_campaign(store, None, said.append)["driver"] == "not running"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"7", b'{"epoch": 1}', b"\xff", b"[" * 9999]
)
def test_what_is_no_request_asks_nobody(store: FolderStore, content: bytes) -> None:
    store.write(stop_request.KEY, content)
    assert not is_requested(store, 1, "token")


def test_a_request_names_one_owner(store: FolderStore) -> None:
    request_stop(store, 3, "token")
    assert is_requested(store, 3, "token")
    assert not is_requested(store, 4, "token")
    assert not is_requested(store, 3, "other")


def test_a_driver_without_a_sign_of_life_is_not_waited_for_long(
    store: FolderStore, drivers: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LIFETIME_SECONDS", 0.3)
    driver = start(store, drivers)
    os.kill(driver.pid, signal.SIGSTOP)
    assert stop_campaign(store, None, lambda text: None)["driver"] == "no sign of life"


def test_a_driver_that_goes_on_is_told_of(
    store: FolderStore, drivers: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "ANSWER_SECONDS", 0.5)
    driver = start(store, drivers, "goes on")
    with pytest.raises(
        CampaignError, match=f"its driver \\(process {driver.pid} on .*was asked to stop"
    ):
        stop_campaign(store, None, lambda text: None)


def test_a_driver_that_died_here_needs_no_stop(
    store: FolderStore, drivers: list[subprocess.Popen[str]]
) -> None:
    driver = start(store, drivers)
    driver.kill()
    driver.wait()
    assert stop_campaign(store, None, lambda text: None)["driver"] == "not running"


def test_where_there_is_no_campaign_there_is_nothing_to_stop(store: FolderStore) -> None:
    with pytest.raises(BadInputError, match="there is no campaign here"):
        stop_campaign(store, None, lambda text: None)
    assert look_at_lease(store) is None


# -- listing ---------------------------------------------------------------------------------


def test_campaigns_are_listed_with_what_became_of_them(
    tmp_path: Path, drivers: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = FolderStore(tmp_path / "store")
    for name in ("damaged", "dead", "gone", "owned", "runs"):
        begin_campaign(root.substore(name), tmp_path)
    root.write(f"owned/{lease_module.KEY}", b"")  # what says who runs it is damaged
    (tmp_path / "store" / "damaged" / "ledger" / "00000001.json").write_bytes(b"{")
    (tmp_path / "store" / "eval" / "one").mkdir(parents=True)
    (tmp_path / "store" / "eval" / "one" / "evaluation.json").write_text("{}")
    for name in ("dead", "gone", "runs"):
        start(root.substore(name), drivers)
    # One whose end nobody can see from here, and one that died on this machine.
    for driver in drivers[:2]:
        driver.kill()
        driver.wait()
    owner = json.loads(root.read(f"dead/{lease_module.KEY}"))["owner"]
    change_lease(root.substore("dead"), owner=owner | {"machine": "elsewhere"})
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.4)
    rows = {row["campaign"].rpartition("/")[2]: row for row in list_campaigns(root.uri)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "damaged": "damaged", "dead": "stopped", "gone": "stopped", "owned": "damaged",
        "runs": "running",
    }  # fmt: skip
    assert (rows["runs"]["evaluations"], rows["runs"]["budget"]) == (0, 14)
    assert "00000001.json" in rows["damaged"]["error"]
    assert f"owned/{lease_module.KEY}" in rows["owned"]["error"]
    assert render_list({"campaigns": list(rows.values()), "jobs": []})


def test_an_empty_store_lists_nothing(tmp_path: Path) -> None:
    assert list_campaigns(str(tmp_path / "nothing")) == []
