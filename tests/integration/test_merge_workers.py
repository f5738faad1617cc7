"""One merge split over Ray workers on several nodes, from and to a real S3 server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from orchestrator.child_writer import MANIFEST, PROGRESS
from tests.campaigns import digests, run_darwin, start_darwin, wait_for
from tests.checkpoint_files import write_checkpoint
from tests.ray_cluster import ENVIRONMENT, RayCluster, parent_of, processes
from workers.checkpoints import open_checkpoint
from workers.errors import BadInputError
from workers.storage import Store, open_store

NODES = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head and four nodes with a CPU each."""
    with RayCluster(NODES) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def places(s3_location: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """`folder` and `s3` -> base, a and b: the same checkpoints, two shards of three parts each."""
    folder = tmp_path_factory.mktemp("family")
    found: dict[str, dict[str, str]] = {"folder": {}, "s3": {}}
    for seed, name in enumerate(("base", "a", "b")):
        found["folder"][name] = str(write_parent(folder / name, seed))
        store = open_store(f"{s3_location}/merge/{name}")
        for file in (folder / name).iterdir():
            store.write(file.name, file.read_bytes())
        found["s3"][name] = store.uri
    return found


def write_parent(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    shards = []
    for layer in range(2):
        stem = f"model.layers.{layer}"
        shards.append(
            {
                f"{stem}.mlp.experts.gate_up_proj": random(16, 1024, 1024),
                f"{stem}.mlp.experts.down_proj": random(16, 1024, 512),
                f"{stem}.self_attn.q_proj.weight": random(1024, 1024),
            }
        )
    shards[0]["model.embed_tokens.weight"] = random(5000, 1024)
    shards[1]["model.norm.weight"] = random(1024)
    config = {"model_type": "qwen3_5_moe", "num_hidden_layers": 2}
    return write_checkpoint(folder, *shards, config=config)


RULES = [
    {"where": {"components": ["expert"]}, "method": "ties",
     "parameters": {"weight": 0.8, "density": 0.4}},
    {"where": {"components": ["attention"]}, "method": "task_arithmetic",
     "parameters": {"weight": {"a": 0.3, "b": 0.7}}},
    {"method": "dare_ties", "parameters": {"weight": 0.9, "density": 0.5}},
]  # fmt: skip


def write_recipe(file: Path, places: dict[str, str]) -> Path:
    parents = [{"name": name, "path": places[name]} for name in "ab"]
    file.write_text(yaml.safe_dump({"parents": parents, "base": places["base"], "rules": RULES}))
    return file


@pytest.fixture(scope="module")
def alone(places: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder / "recipe.yaml", places["folder"])
    run_darwin("merge", str(recipe), str(folder / "child"))
    return folder / "child"


def test_four_workers_make_what_one_makes(
    cluster: RayCluster,
    places: dict[str, dict[str, str]],
    alone: Path,
    s3_location: str,
    tmp_path: Path,
) -> None:
    """Each worker reads its ranges from the server and writes its parts of the uploads. One of them is
    killed in the middle, and then the driver; the next one goes on at the parts that are missing."""
    recipe = write_recipe(tmp_path / "recipe.yaml", places["s3"])
    target = f"{s3_location}/merge/child"
    command = ("merge", str(recipe), target, "--workers", "4", "--address", cluster.address)
    environment = os.environ | ENVIRONMENT
    process = start_darwin(*command, environment=environment)
    store = open_store(target)
    wait_for(lambda: len(merge_workers()) == 4 and has_manifest(store), process)
    os.kill(merge_workers()[0], signal.SIGKILL)
    wait_for(lambda: len(written(store)) > 0, process)
    process.kill()
    process.communicate()
    before = written(store)
    assert before
    with pytest.raises(BadInputError):
        open_checkpoint(target)
    assert run_darwin(*command, environment=environment)["child"] == target
    assert digests(target) == digests(str(alone))
    verified = run_darwin("verify", target, "--parent", places["s3"]["a"])
    assert verified["status"] == "sound"
    assert verified["changed"]["a"] > 0


def test_workers_fill_a_shared_folder(
    cluster: RayCluster, places: dict[str, dict[str, str]], alone: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", places["folder"])
    target = tmp_path / "child"
    command = ("merge", str(recipe), str(target), "--workers", "2", "--address", cluster.address)
    run_darwin(*command, environment=os.environ | ENVIRONMENT)
    assert digests(str(target)) == digests(str(alone))


def test_a_node_is_lost_while_experts_are_spread_over_all(
    cluster: RayCluster, places: dict[str, dict[str, str]], alone: Path, tmp_path: Path
) -> None:
    """Its worker's place waits for another node; the others write its parts too."""
    recipe = write_recipe(tmp_path / "recipe.yaml", places["folder"])
    target = tmp_path / "child"
    process = start_darwin(
        "merge", str(recipe), str(target), "--address", cluster.address,
        "--workers", str(NODES), "--placement", "strict", environment=os.environ | ENVIRONMENT,
    )  # fmt: skip
    store = open_store(str(target))
    wait_for(lambda: has_manifest(store) and len(merge_workers()) == NODES, process)
    assert {parent_of(worker) for worker in merge_workers()} == set(cluster.raylets)
    wait_for(lambda: len(written(store)) > 0, process)
    cluster.kill_node(cluster.raylets[0])
    assert 0 < len(written(store)) < PARTS
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert digests(str(target)) == digests(str(alone))
    cluster.add_node()


def test_one_process_goes_on_after_it_was_killed(
    places: dict[str, dict[str, str]], alone: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", places["folder"])
    target = tmp_path / "child"
    process = start_darwin("merge", str(recipe), str(target))
    store = open_store(str(target))
    wait_for(lambda: len(written(store)) > 1, process)
    process.kill()
    process.communicate()
    before = written(store)
    assert 0 < len(before) < PARTS
    run_darwin("merge", str(recipe), str(target))
    assert digests(str(target)) == digests(str(alone))


PARTS = 6


def has_manifest(store: Store) -> bool:
    return any(info.key == MANIFEST for info in store.list_objects(f"{PROGRESS}/"))


def written(store: Store) -> set[tuple[str, int]]:
    """The parts that are recorded as written."""
    found = set()
    for info in list(store.list_objects(f"{PROGRESS}/")):
        if info.key != MANIFEST:
            for part in json.loads(store.read(info.key)).get("parts", ()):
                found.add((part["file"], part["number"]))
    return found


def merge_workers() -> list[int]:
    """Pids of the Ray workers that merge."""
    found = []
    for process in processes():
        try:
            if Path(f"/proc/{process}/cmdline").read_text().startswith("ray::Merge"):
                found.append(process)
        except OSError:
            continue  # it ended while one looked
    return found
