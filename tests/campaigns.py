"""Run the real `darwin` command on small campaigns of the shipped family, and look at what it left."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from orchestrator.ledger.ledger import Record, read_records
from orchestrator.reporting.card import COST_LINE
from tests.ray_cluster import ENVIRONMENT
from workers.storage import Store, open_store

SKILLS = ("reverse", "sort", "shift")
START_SECONDS = 180.0


def write_campaign(folder: Path, **changes: Any) -> Path:
    """A campaign file like the demo's but small; `changes` replace top-level keys."""
    campaign = {
        "name": "small",
        "store": str(folder / "store"),
        "parents": [{"name": skill, "path": f"shipped:strings/{skill}"} for skill in SKILLS],
        "base": "shipped:strings/base",
        "tasks": [{"name": skill, "search_items": 24, "holdout_items": 48} for skill in SKILLS],
        "objective": "mean",
        "genome": {"space": "components", "method": "dare_ties"},
        "search": {"optimizer": "cma_es", "evaluations": 14, "population": 4},
        "engine": {"dtype": "float32", "batch_size": 24},
        "workers": {"count": 2},
        **changes,
    }
    file = folder / "campaign.yaml"
    file.write_text(yaml.safe_dump(campaign))
    return file


def start_darwin(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=(environment or dict(os.environ)) | {"HF_HUB_OFFLINE": "1"},
    )


def run_darwin(
    *arguments: str, expect: int = 0, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a command with `--json` to its end, check its exit code; its JSON object."""
    process = start_darwin(*arguments, "--json", environment=environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err, err
    result: dict[str, Any] = json.loads(out)
    return result


run_joined = partial(run_darwin, environment=os.environ | ENVIRONMENT)
"""The same of a campaign whose `address` is a `RayCluster`'s."""
start_joined = partial(start_darwin, environment=os.environ | ENVIRONMENT)
"""The same of `start_darwin`."""


def records(store: Store) -> list[Record]:
    """The campaign's ledger as it stands."""
    return list(read_records(store))


def count_records(store: Store, kind: str, **content: Any) -> int:
    """How many records of the ledger as it stands are of this kind and have this content."""
    return sum(
        record["kind"] == kind and all(record.get(key) == value for key, value in content.items())
        for record in records(store)
    )


def ray_processes(kind: str, ancestor: int) -> list[int]:
    """Pids of the Ray actors of a class that a process has started, itself or through others."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_text()
            if title.startswith(f"ray::{kind}") and ancestor in ancestors(int(entry.name)):
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue  # it ended while one looked
    return found


def ancestors(pid: int) -> list[int]:
    """The parent, its parent, and so on."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def wait_for(
    condition: Callable[[], bool],
    process: subprocess.Popen[str] | None = None,
    seconds: float = START_SECONDS,
) -> None:
    """Until the condition holds. Fails if `process` ends first, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        if process is not None and process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"ended with {process.returncode} too early\n{out}\n{err}")
        time.sleep(0.002)


def digests(location: str) -> dict[str, str]:
    """SHA-256 of every file of a child; of the card without the line of what it took, which no two runs
    share."""
    store = open_store(location)
    contents = {info.key: store.read(info.key) for info in store.list_objects()}
    if "README.md" in contents:
        lines = contents["README.md"].splitlines(keepends=True)
        kept = (line for line in lines if not line.startswith(COST_LINE.encode()))
        contents["README.md"] = b"".join(kept)
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def scored_items(ledger: list[Record]) -> list[tuple[str, str, str, str]]:
    """(recipe, split, task, item) of every item that was ever scored, with repetitions."""
    return [
        (record["recipe"], record["split"], task, item["id"])
        for record in ledger
        if record["kind"] == "scored"
        for task, items in record["items"].items()
        for item in items
    ]
