"""`make bench-merge`: what writing a merged child costs, beside mergekit and beside `cp`.

Whole process against whole process, on the same disk, one after the other in every round, so that a busy
minute of the machine hits all of them: the ratios mean more than the seconds. `cp` goes first and leaves
the parents in the page cache. mergekit is left out where `make .venv-mergekit/installed` was not run.

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
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Cost:
    """What one process used: seconds, and peaks of resident memory in bytes."""

    wall: float
    processor: float
    anonymous: int
    mapped: int


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
    parser.add_argument("--folder", help="keeps the models for the next time; 5 GB are needed")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--merges", nargs="+", default=MERGES, choices=MERGES, metavar="MERGE")
    return parser.parse_args()


def _measure(
    merges: list[str], families: dict[str, list[Path]], work: Path, rounds: int
) -> dict[str, dict[str, list[Cost]]]:
    """Merge -> tool -> what each round cost."""
    costs: dict[str, dict[str, list[Cost]]] = {}
    for turn in range(rounds):
        for merge in merges:
            family, method = merge.split("/")
            models = families[family][:2] if method == "slerp" else families[family]
            for tool, command in _commands(method, models, work).items():
                cost = _run(command, work)
                costs.setdefault(merge, {}).setdefault(tool, []).append(cost)
                print(f"round {turn + 1}: {merge} {tool} {cost.wall:.2f} s", file=sys.stderr)
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


def _run(command: list[str], work: Path) -> Cost:
    """Run it to its end, look at its memory on the way, and remove what it wrote."""
    child, log = work / "child", work / "log"
    if command[0] == "cp":
        child.mkdir()
    os.sync()  # what the last one left to be written is not this one's
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        anonymous = mapped = 0
        try:
            while True:
                finished, status, usage = os.wait4(process.pid, os.WNOHANG)
                if finished:
                    break
                sizes = _resident(process.pid)
                anonymous, mapped = max(anonymous, sizes[0]), max(mapped, sizes[1])
                time.sleep(SAMPLE_SECONDS)
        except KeyboardInterrupt:
            process.kill()
            raise
        wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{log.read_text()[-4000:]}")
    shutil.rmtree(child)
    return Cost(wall, usage.ru_utime + usage.ru_stime, anonymous, mapped)


def _resident(pid: int) -> tuple[int, int]:
    """Resident bytes of a process and its children now: anonymous, and of mapped files.

    What they share is counted once.
    """
    anonymous = mapped = 0
    for process in _tree(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue  # it has ended
        sizes = dict(line.split(":", 1) for line in lines)
        anonymous += _kilobytes(sizes, "Pss_Anon")
        mapped += _kilobytes(sizes, "Pss_File")
    return 1024 * anonymous, 1024 * mapped


def _kilobytes(sizes: dict[str, str], name: str) -> int:
    return int(sizes[name].split()[0]) if name in sizes else 0


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:  # grows on the way
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, file.read_text().split())
            except OSError:
                continue
    return found


def _table(costs: dict[str, dict[str, list[Cost]]]) -> str:
    """The best round of each, as markdown."""
    lines = [
        "| merge | tool | wall s (every round) | CPU s | anonymous MB | mapped MB | x cp | x mergekit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for merge, tools in costs.items():
        copy, *_ = (_best(rounds, lambda cost: cost.wall) for rounds in tools.values())
        peer = _best(tools["mergekit"], lambda cost: cost.wall) if "mergekit" in tools else None
        for tool, rounds in tools.items():
            wall = _best(rounds, lambda cost: cost.wall)
            every = ", ".join(f"{cost.wall:.2f}" for cost in rounds)
            cells = [
                merge,
                tool,
                f"**{wall:.2f}** ({every})",
                f"{_best(rounds, lambda cost: cost.processor):.2f}",
                f"{max(cost.anonymous for cost in rounds) / 1e6:.0f}",
                f"{max(cost.mapped for cost in rounds) / 1e6:.0f}",
                f"{wall / copy:.1f}",
                f"{peer / wall:.1f}" if peer else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _best(rounds: list[Cost], of: Callable[[Cost], float]) -> float:
    return min(map(of, rounds))


if __name__ == "__main__":
    main()
