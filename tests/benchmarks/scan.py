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
from pathlib import Path

from tests.benchmarks.models import FAMILIES, make_family
from tests.checkpoint_files import weight_files

STAGE = """
import sys, time
from orchestrator.calls import open_calls
from orchestrator.scan import scan_parents
from workers.checkpoints import open_checkpoint
parents = {f"parent{number}": open_checkpoint(place) for number, place in enumerate(sys.argv[1:])}
started = time.perf_counter()
with open_calls(parents, None, None, None) as calls:
    scan_parents(parents, None, calls, None)
print(time.perf_counter() - started)
"""
"""The stage of a campaign: from opened checkpoints to the finished scan."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scan")
    parser.add_argument("--folder", help="keeps the models for the next time; 4 GB are needed")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        base, *relatives = make_family(FAMILIES[0], folder)
        measure(base, relatives[0], arguments.rounds, Path(temporary))


def measure(base: Path, parent: Path, rounds: int, out: Path) -> None:
    """Print the seconds of each round, best and median ratio to `cat` of the same files."""
    one, two = weight_files(parent), [*weight_files(parent), *weight_files(base)]
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        store = str(out / f"scans-{turn}")
        found = {
            "cat, one parent": _cat(one),
            "scan of one parent": _stage(parent),
            "darwin scan, the whole command": _command(parent, store),
            "cat, two parents": _cat(two),
            "scan of two parents, compared": _stage(base, parent),
        }
        if turn:  # the first one warms the cache
            for name, taken in found.items():
                seconds.setdefault(name, []).append(taken)
    size = sum(file.stat().st_size for file in one)
    print(f"{size:,} bytes of bfloat16, {len(os.sched_getaffinity(0))} cores, {rounds} rounds")
    print(f"{'':32} {'best s':>8} {'x cat':>6} {'median x cat of the round':>26}")
    for name, taken in seconds.items():
        cat = seconds["cat, two parents" if "two" in name else "cat, one parent"]
        ratios = [mine / other for mine, other in zip(taken, cat, strict=True)]
        best = min(taken) / min(cat)
        print(f"{name:32} {min(taken):8.3f} {best:6.1f} {statistics.median(ratios):26.1f}")


def _cat(files: list[Path]) -> float:
    return _run(["cat", *map(str, files)])


def _command(parent: Path, store: str) -> float:
    return _run([sys.executable, "-m", "orchestrator.cli", "scan", str(parent), "--out", store])


def _run(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def _stage(*parents: Path) -> float:
    command = [sys.executable, "-c", STAGE, *map(str, parents)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
