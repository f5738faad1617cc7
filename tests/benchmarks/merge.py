"""`make bench-merge`: what writing a merged child costs, beside mergekit and beside `cp`.

Whole process against whole process, on the same disk, one after the other in every round, so that a busy
minute of the machine hits all of them: the ratios mean more than the seconds. A run before the rounds is
looked at for its memory, which slows it down, and leaves the parents in the page cache. mergekit is left
out where `make .venv-mergekit/installed` was not run.

    python -m tests.benchmarks.merge [--folder FOLDER] [--rounds 3] [--merges dense/ties experts/linear]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.models import FAMILIES, make_family

MERGEKIT = Path(".venv-mergekit/bin/mergekit-yaml")
SAMPLE_SECONDS = 0.05
TUNED: dict[str, dict[str, float]] = {
    "linear": {"weight": 0.4},
    "slerp": {},
    "task_arithmetic": {"weight": 0.4},
    "dare_ties": {"weight": 0.4, "density": 0.5},
    "ties": {"weight": 0.4, "density": 0.5},
}
"""Method -> parameters of each parent."""
MERGES = (*(f"dense/{method}" for method in TUNED), "experts/linear")
LARGE = tuple(f"large/{method}" for method in TUNED)
"""Only if they are asked for: they take 14 GB of disk for the parents, and a minute to make each."""


@dataclass
class Costs:
    """What a tool used for a merge: seconds of each round, and peaks of resident bytes.

    Pages that processes of one tool share are counted once.
    """

    anonymous: int
    mapped: int
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        families = {
            family.name: make_family(family, folder)
            for family in FAMILIES
            if any(merge.startswith(f"{family.name}/") for merge in arguments.merges)
        }
        work = Path(tempfile.mkdtemp(prefix="children-", dir=folder))
        try:
            costs = _measure(arguments.merges, families, work, arguments.rounds)
        finally:
            shutil.rmtree(work)
    print(_table(costs))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.merge")
    parser.add_argument(
        "--folder", help="keeps the models for the next time; 5 GB are needed, 25 for large ones"
    )
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument(
        "--merges", nargs="+", default=MERGES, choices=MERGES + LARGE, metavar="MERGE"
    )
    return parser.parse_args()


def _measure(
    merges: list[str], families: dict[str, list[Path]], work: Path, rounds: int
) -> dict[str, dict[str, Costs]]:
    """Merge -> tool -> what it cost."""
    costs: dict[str, dict[str, Costs]] = {}
    for turn in range(rounds + 1):
        for merge in merges:
            family, method = merge.split("/")
            models = families[family][:2] if method == "slerp" else families[family]
            for tool, command in _commands(method, models, work).items():
                with _started(command, work) as process:
                    if turn == 0:
                        costs.setdefault(merge, {})[tool] = Costs(*_peaks(process))
                        continue
                    started = time.monotonic()
                    _, status, usage = os.wait4(process.pid, 0)
                    wall = time.monotonic() - started
                    process.returncode = os.waitstatus_to_exitcode(status)
                costs[merge][tool].wall.append(wall)
                costs[merge][tool].processor.append(usage.ru_utime + usage.ru_stime)
                print(f"round {turn}: {merge} {tool} {wall:.2f} s", file=sys.stderr)
    return costs


def _commands(method: str, models: list[Path], work: Path) -> dict[str, list[str]]:
    """Tool -> command that makes `work/child`."""
    config = work / "merge.yml"
    config.write_text(yaml.safe_dump(_config(method, models)))
    child = str(work / "child")
    commands = {
        "cp -r of the parents": ["cp", "-r", *map(str, models), child],
        "darwin": [sys.executable, "-m", "orchestrator.cli", "merge", str(config), child],
        "mergekit": [str(MERGEKIT), str(config), child],
    }
    if not MERGEKIT.is_file():
        del commands["mergekit"]
    return commands


def _config(method: str, models: list[Path]) -> dict[str, Any]:
    """A file that both tools read."""
    first = 0 if method in ("linear", "slerp") else 1
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(m), "parameters": TUNED[method]} for m in models[first:]],
    }
    if method != "linear":
        config["base_model"] = str(models[0])
    return config | ({"parameters": {"t": 0.4}} if method == "slerp" else {})


@contextmanager
def _started(command: list[str], work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The running command, which must have succeeded at the end; what it wrote is removed then."""
    child, log = work / "child", work / "log"
    if command[0] == "cp":
        child.mkdir()
    os.sync()  # what the last one left to be written is not this one's
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        try:
            yield process
        except BaseException:
            process.kill()
            raise
    if process.wait():
        sys.exit(f"{' '.join(command)}\n{log.read_text()[-4000:]}")
    shutil.rmtree(child)


def _peaks(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """The most resident bytes of the process and its children until it ends: anonymous, and of files."""
    anonymous = mapped = 0
    while process.poll() is None:
        sizes = Counter[str]()
        for pid in process_tree(process.pid):
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue  # it has ended
            for name, size in (line.split()[:2] for line in lines if line.startswith("Pss_")):
                sizes[name] += 1024 * int(size)
        anonymous = max(anonymous, sizes["Pss_Anon:"] + sizes["Pss_Shmem:"])
        mapped = max(mapped, sizes["Pss_File:"])
        time.sleep(SAMPLE_SECONDS)
    return anonymous, mapped


def process_tree(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for parent in found:  # grows on the way
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, file.read_text().split())
            except OSError:
                continue
    return found


def _table(costs: dict[str, dict[str, Costs]]) -> str:
    """The best round of each, as markdown."""
    lines = [
        "| merge | tool | wall s (every round) | CPU s | anonymous MB | mapped MB | x cp | x mergekit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for merge, tools in costs.items():
        copy, *_ = tools.values()
        for tool, cost in tools.items():
            wall = min(cost.wall)
            faster = f"{min(tools['mergekit'].wall) / wall:.1f}" if "mergekit" in tools else ""
            cells = [
                merge,
                tool,
                f"**{wall:.2f}** ({', '.join(f'{seconds:.2f}' for seconds in cost.wall)})",
                f"{min(cost.processor):.2f}",
                f"{cost.anonymous / 1e6:.0f}",
                f"{cost.mapped / 1e6:.0f}",
                f"{wall / min(copy.wall):.1f}",
                faster,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
