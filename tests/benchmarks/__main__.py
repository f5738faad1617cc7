"""`make bench`: what a candidate costs, on the shipped family and this machine.

Runs the demo campaign with a smaller budget as the real command, and reads the figures from outside:
the ledger, the clock, and /proc.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import yaml

from orchestrator.config import SHIPPED
from orchestrator.ledger.ledger import Record
from tests.campaigns import records, start_darwin
from workers.storage import Store, open_store

EVALUATIONS = 72


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        demo = yaml.safe_load((SHIPPED / "campaign" / "demo.yaml").read_text())
        demo |= {"store": folder, "search": demo["search"] | {"evaluations": EVALUATIONS}}
        campaign = Path(folder) / "campaign.yaml"
        campaign.write_text(yaml.safe_dump(demo))
        run(campaign, open_store(folder).substore(demo["name"]))


def run(campaign: Path, store: Store) -> None:
    """Run the campaign while watching it, and print the table."""
    started = time.monotonic()
    process = start_darwin("run", str(campaign))
    peaks: dict[str, float] = {}
    first_candidate = None
    while process.poll() is None:
        for name, megabytes in peak_memory(process.pid).items():
            peaks[name] = max(peaks.get(name, 0.0), megabytes)
        if first_candidate is None:
            if candidate_records(records(store)):
                first_candidate = time.monotonic() - started
            time.sleep(0.02)
        else:
            time.sleep(0.5)
    total = time.monotonic() - started
    _, err = process.communicate()
    if process.returncode:
        sys.exit(err)
    ledger = records(store)
    candidates = candidate_records(ledger)
    search = next(r for r in ledger if r["kind"] == "searched")
    rows = {
        "time to first candidate told": f"{first_candidate:.1f} s",
        "realize, per candidate (median)": milliseconds([r["realize_seconds"] for r in candidates]),
        "evaluate, per candidate (median)": milliseconds([r["score_seconds"] for r in candidates]),
        "driver overhead, per candidate": f"{1000 * search['driver_seconds'] / len(candidates):.1f} ms",
        "search, wall per candidate": f"{1000 * search['seconds'] / len(candidates):.0f} ms",
        "whole campaign": f"{total:.1f} s",
        **{f"peak memory, {name}": f"{mb:.0f} MB" for name, mb in sorted(peaks.items())},
    }
    print(f"{len(candidates)} candidates, 2 workers, {sum(map(items_of, candidates))} items")
    for name, figure in rows.items():
        print(f"{name:36} {figure:>10}")


def candidate_records(ledger: list[Record]) -> list[Record]:
    """The `scored` records of candidates on the search items."""
    asked = {c["recipe"] for r in ledger if r["kind"] == "asked" for c in r["candidates"]}
    return [
        r for r in ledger
        if r["kind"] == "scored" and r["split"] == "search" and r["recipe"] in asked
    ]  # fmt: skip


def items_of(record: Record) -> int:
    return sum(map(len, record["items"].values()))


def milliseconds(seconds: list[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f} ms"


def peak_memory(driver: int) -> dict[str, float]:
    """Peak resident megabytes of the driver and of the largest worker, so far."""
    peaks: dict[str, float] = {}
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_text()
            status = (entry / "status").read_text()
        except OSError:
            continue
        is_driver = entry.name == str(driver)
        if not is_driver and not title.startswith("ray::EvaluationWorker"):
            continue
        sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        if not sizes:
            continue  # it has ended and is not reaped yet
        name = "driver" if is_driver else "worker"
        peaks[name] = max(peaks.get(name, 0.0), int(sizes[0]) / 1024)
    return peaks


if __name__ == "__main__":
    main()
