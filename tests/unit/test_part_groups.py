"""Parts of a child go to the workers that own them, and to others when these are through or lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import workers.merging.parts as parts_module
from orchestrator.child_writer import ChildWriter
from orchestrator.part_groups import group_parts, part_owners
from orchestrator.pool.turns import Turns
from tests.checkpoint_files import (
    local_calls,
    open_merger,
    recipe_for,
    rule,
    weight_files,
    write_checkpoint,
)
from workers.actors import MergeSpec, MergeWorker
from workers.experts.shard_map import ShardMap
from workers.merging.executor import Merger
from workers.storage.folder import FolderStore

WORKERS = 4
LAYERS, EXPERTS, INNER, HIDDEN = 2, 32, 8, 16
EXPERT_BYTES = 3 * INNER * HIDDEN * 2
CONFIG = {"model_type": "qwen3_5_moe", "num_hidden_layers": LAYERS}


def write_parent(folder: Path, seed: int, fused: bool) -> Path:
    """Two layers of 32 experts, in a file each; by itself an expert has names like published ones."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    files = []
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        file = {f"{stem}.mlp.gate.weight": random(EXPERTS, HIDDEN)}
        if fused:
            file[f"{stem}.mlp.experts.gate_up_proj"] = random(EXPERTS, 2 * INNER, HIDDEN)
            file[f"{stem}.mlp.experts.down_proj"] = random(EXPERTS, HIDDEN, INNER)
        else:
            for expert in range(EXPERTS):
                at = f"{stem}.mlp.experts.{expert}"
                file[f"{at}.down_proj.weight"] = random(HIDDEN, INNER)
                file[f"{at}.gate_proj.weight"] = random(INNER, HIDDEN)
                file[f"{at}.up_proj.weight"] = random(INNER, HIDDEN)
        files.append(file)
    return write_checkpoint(folder, *files, config=CONFIG)


@pytest.fixture
def writer(tmp_path: Path, request: Any, monkeypatch: pytest.MonkeyPatch) -> ChildWriter:
    """Of a child in parts of two experts' matrices."""
    monkeypatch.setattr(parts_module, "PART_BYTES", 2 * EXPERT_BYTES // 3)
    fused = getattr(request, "param", True)
    folders = {name: write_parent(tmp_path / name, seed, fused) for seed, name in enumerate("ab")}
    return make_writer(open_merger(folders), tmp_path / "child")


def make_writer(merger: Merger, folder: Path) -> ChildWriter:
    recipe = recipe_for(merger, rule("linear", weight=0.4))
    return ChildWriter.create(recipe, merger.parents, None, FolderStore(folder))


class DividedCalls:
    """Workers that take calls in turn, in this process; some of them are lost."""

    workers = WORKERS

    def __init__(self, writer: ChildWriter, parents: dict[str, Any], lost: Sequence[int]) -> None:
        self.worker = MergeWorker(MergeSpec({}, None, {}))
        self.worker.parents = parents
        self.worker.store = lambda location: writer.target
        self.lost = lost
        self.written: Counter[tuple[int, tuple[str, int]]] = Counter()
        """(worker, part) -> how often it has written it."""

    def group_bytes(self, total: int) -> int:
        return total // (4 * WORKERS)

    def each(
        self, method: str, arguments: list[tuple[Any, ...]], preferred: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        waiting = Turns(len(arguments), preferred)
        while waiting:
            for worker in set(range(WORKERS)).difference(self.lost):
                if waiting:
                    number = waiting.take(worker)
                    if method == "write_parts":
                        self.written.update((worker, key) for key in arguments[number][3])
                    yield number, getattr(self.worker, method)(*arguments[number])


@pytest.mark.parametrize("lost", [(), (2,), (0, 1, 3)])
def test_workers_write_what_they_own_and_the_lost_ones_part(
    writer: ChildWriter, lost: Sequence[int], tmp_path: Path
) -> None:
    merger = open_merger({name: tmp_path / name for name in "ab"})
    alone = make_writer(merger, tmp_path / "alone")
    alone.write(local_calls(merger, alone.target))  # type: ignore[arg-type]
    calls = DividedCalls(writer, merger.parents, lost)
    writer.write(calls)
    contents = [
        [file.read_bytes() for file in weight_files(tmp_path / name)] for name in ("child", "alone")
    ]
    assert len(contents[0]) == LAYERS and contents[0] == contents[1]
    assert sorted(key for _, key in calls.written) == sorted(part.key for part in writer.parts)
    assert set(calls.written.values()) == {1}
    owners = part_owners(writer.parts, writer.plan.child.tensors, WORKERS)
    of_lost = sum(owners[key] in lost for _, key in calls.written)
    elsewhere = sum(owners[key] not in (*lost, worker) for worker, key in calls.written)
    assert of_lost >= len(lost) * len(writer.parts) // (WORKERS + 1)
    assert elsewhere <= len(writer.parts) // 10, "workers wrote parts of others that live"


@pytest.mark.parametrize("writer", [True, False], indirect=True, ids=["fused", "apart"])
def test_of_what_a_worker_is_given_most_is_its_own(writer: ChildWriter) -> None:
    """In bytes of merge units. Dealt out to whoever is idle, it would be a quarter."""
    tensors = writer.plan.child.tensors
    shard_map = ShardMap.of(tensors, [str(number) for number in range(WORKERS)])
    owners = part_owners(writer.parts, tensors, WORKERS)
    groups = group_parts(writer.parts, owners, writer.total_bytes // (4 * WORKERS))
    parts = {part.key: part for part in writer.parts}
    given = own = 0
    for group in groups:
        for key in group.keys:
            for unit in parts[key].units:
                given += unit.count
                own += unit.count * (shard_map.owner(unit.target) == str(group.owner))
    assert own / given > 0.9
    assert sorted(key for group in groups for key in group.keys) == sorted(parts)
    # Nobody waits at the end: several groups each.
    assert Counter(group.owner for group in groups).keys() == set(range(WORKERS))
    assert min(Counter(group.owner for group in groups).values()) > 1


def test_one_worker_takes_the_parts_as_they_lie(writer: ChildWriter) -> None:
    owners = part_owners(writer.parts, writer.plan.child.tensors, 1)
    groups = group_parts(writer.parts, owners, 1)
    assert [key for group in groups for key in group.keys] == [part.key for part in writer.parts]
    assert {group.owner for group in groups} == {0}
