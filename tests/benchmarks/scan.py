"""What the static scan of one parent costs, beside `cat` of its files. Run by `make bench`.

Interleaved, so that a busy minute of the machine hits all of them: the ratios mean more than the seconds. The
files are read once before, so that they lie in the page cache.

    python -m tests.benchmarks.scan [--folder FOLDER] [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.models import FAMILIES, make_family
from tests.checkpoint_files import weight_files

STAGE = """
import os, sys, time
from orchestrator.pool.calls import open_calls
from orchestrator.mri.scan import scan_parents
from workers.checkpoints import open_checkpoint
parents = {f"parent{number}": open_checkpoint(place) for number, place in enumerate(sys.argv[1:])}
before = time.perf_counter(), sum(os.times()[:4])
with open_calls(parents, None, None, None) as calls:
    scan_parents(parents, None, calls, None)
print(time.perf_counter() - before[0], sum(os.times()[:4]) - before[1])
"""
"""The stage of a campaign: from opened checkpoints to the finished scan."""


@dataclass(frozen=True)
class Costs:
    wall: float
    processor: float
    """Seconds of all processes, user and system: hardly changed by what else the machine does."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scan")
    parser.add_argument("--folder", help="keeps the models for the next time; 3 GB are needed")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        base, parent = make_family(replace(FAMILIES[0], relatives=1), folder)
        measure(base, parent, arguments.rounds, Path(temporary))


def measure(base: Path, parent: Path, rounds: int, out: Path) -> None:
    """Print what each costs, and its ratios to `cat` of the same files."""
    one, two = weight_files(parent), [*weight_files(parent), *weight_files(base)]
    costs: dict[str, list[Costs]] = {}
    for turn in range(rounds + 1):
        store = str(out / f"scans-{turn}")
        found = {
            "cat, one parent": _run("cat", *map(str, one)),
            "scan of one parent": _stage(parent),
            "darwin scan, the whole command": _run(
                sys.executable, "-m", "orchestrator.cli", "scan", str(parent), "--out", store
            ),
            "cat, two parents": _run("cat", *map(str, two)),
            "scan of two parents, compared": _stage(base, parent),
        }
        if turn:  # the first one warms the cache
            for name, cost in found.items():
                costs.setdefault(name, []).append(cost)
    size = sum(file.stat().st_size for file in one)
    print(f"{size:,} bytes of bfloat16, {len(os.sched_getaffinity(0))} cores, {rounds} rounds")
    print(f"{'':32} {'best s':>8} {'x cat':>6} {'x cat, median of rounds':>24} {'CPU s':>6}")
    for name, mine in costs.items():
        cat = costs["cat, two parents" if "two" in name else "cat, one parent"]
        best = min(cost.wall for cost in mine)
        ratio = best / min(cost.wall for cost in cat)
        ratios = [own.wall / other.wall for own, other in zip(mine, cat, strict=True)]
        processor = min(cost.processor for cost in mine)
        median = statistics.median(ratios)
        print(f"{name:32} {best:8.3f} {ratio:6.1f} {median:24.1f} {processor:6.2f}")


def _run(*command: str) -> Costs:
    """The cost of a command as a process of its own."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return Costs(wall, usage.ru_utime + usage.ru_stime)


def _stage(*parents: Path) -> Costs:
    command = [sys.executable, "-c", STAGE, *map(str, parents)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall, processor = map(float, out.split())
    return Costs(wall, processor)


if __name__ == "__main__":
    main()
