"""A campaign whose child must not be published, as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.config import HealthConfig
from orchestrator.ending import Ending
from orchestrator.gates import Gate
from orchestrator.pool.calls import LocalCalls
from tests.campaigns import digests, records, run_darwin, run_joined, write_campaign
from tests.checkpoint_files import open_merger, recipe_for, rule, write_checkpoint
from workers.actors import MergeSpec, MergeWorker
from workers.checkpoints import open_checkpoint
from workers.storage import open_store


def test_a_child_that_is_its_parents_is_kept_aside_until_it_is_allowed(
    tmp_path: Path, ray_address: str
) -> None:
    """Twins have children that look well, and are nothing new: seen from the bytes alone."""
    twins = [{"name": name, "path": "shipped:strings/sort"} for name in ("one", "two")]
    campaign = str(
        write_campaign(
            tmp_path,
            parents=twins,
            base=None,
            genome={"space": "components", "method": "linear"},
            search={"optimizer": "random", "evaluations": 2, "population": 2},
            tasks=[{"name": "sort", "search_items": 12, "holdout_items": 12}],
            workers={"count": 1},
            address=ray_address,
        )
    )
    rejected = run_joined("run", campaign, expect=3)
    place = rejected["campaign"]
    store = open_store(place)
    folder = f"rejected/child-{rejected['recipe_id'][:12]}"
    assert rejected["status"] == "rejected"
    assert rejected["child"] == f"{place}/{folder}"
    assert [reason.partition(":")[0] for reason in rejected["reasons"]] == ["different"]
    assert "(wanted: " in rejected["reasons"][0]
    assert {name for name, result in rejected["gates"].items() if result == "failed"} == {
        "different"
    }
    assert not list(store.list_objects("child-"))
    open_checkpoint(rejected["child"])
    card = store.read(f"{folder}/README.md").decode()
    assert "Rejected: this child did not pass the gates different" in card
    assert "Rejected: this child" in store.read("report.html").decode()
    before = records(store)
    assert [r["kind"] for r in before][-5:] == [
        "examined", "child", "child", "publishing", "rejected",
    ]  # fmt: skip

    assert run_joined("run", campaign, expect=3) == rejected
    assert records(store) == before, "the verdict is repeated without any work"
    status = run_darwin("status", place)
    assert (status["status"], status["reasons"]) == ("rejected", rejected["reasons"])
    aside = digests(rejected["child"])

    allowed = run_joined("run", campaign, "health.allow=[different]")
    assert allowed["status"] == "done"
    assert allowed["gates"]["different"] == "failed, allowed"
    assert (
        "Published although it did not pass different"
        in store.read(f"{allowed['child'].removeprefix(place + '/')}/README.md").decode()
    )
    new = records(store)[len(before) :]
    assert not [r for r in new if r["kind"] in ("scored", "examined", "asked")]
    assert digests(allowed["child"])["model.safetensors"] == aside["model.safetensors"]

    larger = run_joined("run", campaign, "search.evaluations=3", expect=3)
    assert larger["status"] == "rejected"
    assert larger["evaluations"] == 3


def test_in_a_bucket_too_a_rejected_child_leaves_nothing_behind(
    s3_location: str, tmp_path: Path
) -> None:
    """No object moves in a bucket: what was begun as a good child is dropped, also after a kill."""
    for number, name in enumerate(("a", "b")):
        tensors = {"model.layers.0.mlp.up_proj.weight": torch.full((64, 64), 1.0 + number)}
        write_checkpoint(tmp_path / name, tensors)
    merger = open_merger({"a": tmp_path / "a", "b": tmp_path / "b"})
    worker = MergeWorker(MergeSpec({}, None, {}))
    worker.parents, worker.base = merger.parents, None
    store = open_store(f"{s3_location}/ending")
    recipe = recipe_for(merger, rule("passthrough", source="b"))
    ending = Ending(store, recipe, merger.parents, None, HealthConfig())
    gates = [Gate("layers", True, "", "")]
    folders: list[str] = []

    def record(folder: str) -> None:
        folders.append(folder)
        if folder == ending.aside and folders.count(folder) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ending.write(LocalCalls(worker), gates, record)
    keys = {info.key for info in store.list_objects()}
    assert keys
    assert all(key.startswith(f"{ending.good}/merge-in-progress/") for key in keys)
    written = ending.write(LocalCalls(worker), gates, record, folders[-1])
    written.writer.publish({})
    assert written.folder == ending.aside
    assert {info.key for info in store.list_objects()} == {
        f"{ending.aside}/{name}" for name in ("config.json", "model.safetensors")
    }
    assert store.discard_unfinished("") == 0
