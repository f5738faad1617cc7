"""`darwin plan`: its numbers against what real merges do, and what it says would fit against what fits."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from orchestrator.child_writer import ChildWriter
from orchestrator.config import SHIPPED, load_config, read_yaml
from orchestrator.planning.cluster import GB, load_cluster
from orchestrator.planning.command import plan_campaign, render_plan
from orchestrator.planning.estimate import estimate
from orchestrator.planning.inputs import PlannedInputs, open_planned
from orchestrator.planning.traffic import live_tensors, total
from tests.campaigns import run_darwin
from tests.checkpoint_files import RemoteStore, local_calls, write_checkpoint
from tests.plan_tables import PAGE, with_tables
from workers.checkpoints import Checkpoint, open_checkpoint
from workers.errors import BadInputError
from workers.merging import Recipe
from workers.merging.executor import Merger
from workers.merging.sources import TORCH_DTYPES
from workers.storage.folder import FolderStore

EXPERTS, HIDDEN, INNER, LAYERS = 8, 32, 16, 2
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5_moe",
    "text_config": {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_experts_per_tok": 2},
}


class CountingStore(RemoteStore):
    """A remote store that remembers what was asked of its weight files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[tuple[str, int, int]] = []

    def read_into(
        self, key: str, start: int, buffer: memoryview, version: str | None = None
    ) -> None:
        self.asked.append((key, start, start + len(buffer)))
        super().read_into(key, start, buffer, version)

    @property
    def total(self) -> int:
        return sum(stop - start for _, start, stop in self.asked)

    @property
    def distinct(self) -> int:
        """Bytes that were asked for once or more."""
        found, reached, file = 0, 0, ""
        for key, start, stop in sorted(self.asked):
            reached = 0 if key != file else reached
            file = key
            found += max(0, stop - max(start, reached))
            reached = max(reached, stop)
        return found


def write_mixture(folder: Path, seed: int) -> Path:
    """A small fused mixture of experts in two files, with a tower and an MTP layer."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    outer = {
        "model.language_model.embed_tokens.weight": values(40, HIDDEN),
        "model.language_model.norm.weight": values(HIDDEN),
        "lm_head.weight": values(40, HIDDEN),
        "model.visual.patch_embed.proj.weight": values(8, 3, 2, 2),
        "mtp.layers.0.mlp.experts.0.gate_proj.weight": values(INNER, HIDDEN),
    }
    inner = {}
    for layer in range(LAYERS):
        prefix = f"model.language_model.layers.{layer}"
        inner |= {
            f"{prefix}.input_layernorm.weight": values(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": values(2 * HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate.weight": values(EXPERTS, HIDDEN),
            f"{prefix}.mlp.experts.gate_up_proj": values(EXPERTS, 2 * INNER, HIDDEN),
            f"{prefix}.mlp.experts.down_proj": values(EXPERTS, HIDDEN, INNER),
        }
    return write_checkpoint(folder, outer, inner, config=CONFIG)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    return {name: write_mixture(folder / name, seed) for seed, name in enumerate(("a", "b", "c"))}


def write_plan(folder: Path, mixtures: dict[str, Path], **changes: Any) -> str:
    campaign = {
        "name": "planned",
        "store": str(folder / "store"),
        "parents": [{"name": name, "path": str(mixtures[name])} for name in "ab"],
        "base": str(mixtures["c"]),
        "tasks": [{"name": "sort"}],
        "genome": {"space": "components", "method": "task_arithmetic"},
        "engine": {"device": "cuda"},
        "workers": {"count": 1, "cpus": 1, "gpus": 1},
    }
    for key, value in changes.items():
        if isinstance(value, dict):
            campaign[key] = campaign.get(key, {}) | value  # type: ignore[operator]
        else:
            campaign[key] = value
    file = folder / "campaign.yaml"
    file.write_text(yaml.safe_dump(campaign))
    return str(file)


def open_counted(inputs: PlannedInputs, mixtures: dict[str, Path]) -> Merger:
    """The same parents, read by requests that are counted."""

    def counted(name: str) -> Checkpoint:
        return replace(open_checkpoint(str(mixtures[name])), store=CountingStore(mixtures[name]))

    return Merger({name: counted(name) for name in inputs.parents}, counted("c"))


def asked(merger: Merger) -> list[CountingStore]:
    opened = [*merger.parents.values(), *([merger.base] if merger.base else [])]
    stores = [checkpoint.store for checkpoint in opened]
    assert all(isinstance(store, CountingStore) for store in stores)
    return stores  # type: ignore[return-value]


def start_recipe(config: Any, inputs: PlannedInputs, merger: Merger) -> Recipe:
    """The recipe that the plan has laid out, for these parents."""
    from orchestrator.genomes.build import build_space

    space = build_space(
        config.genome, inputs.plan.father, merger.references, merger.base_reference, config.seed
    )
    return space.decode(space.point(space.start))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp", "linear"])
def test_a_merge_reads_and_writes_what_is_planned(
    method: str, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    """Byte for byte, by requests to a store; `ties` reads whole tensors for its statistics first."""
    config = load_config(write_plan(tmp_path, mixtures, genome={"method": method}))
    inputs = open_planned(config, [])
    planned = total(inputs.traffic.values())
    merger = open_counted(inputs, mixtures)
    recipe = start_recipe(config, inputs, merger)
    for store in asked(merger):
        store.asked.clear()  # fingerprints
    target = FolderStore(tmp_path / "child")
    writer = ChildWriter.create(recipe, merger.parents, merger.base, target)
    writer.merge(local_calls(merger, target))
    stores = asked(merger)
    assert sum(store.total for store in stores) == planned.compared
    assert sum(store.distinct for store in stores) == planned.touched
    tensors = sum(entry.stop - entry.start for entry in inputs.plan.layout.tensors.values())
    assert planned.made == tensors
    result = estimate(config, inputs, load_cluster("gpu8_80gb", {}))
    of_file = Counter(part.file for part in writer.parts)
    assert result["child"]["parts_per_file"] == [min(of_file.values()), max(of_file.values())]
    (written,) = [s["written"] for s in result["stages"] if s["name"].startswith("merge and write")]
    assert written == sum(part.stop - part.start for part in writer.parts)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_a_candidate_reads_what_is_planned(
    method: str, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    config = load_config(write_plan(tmp_path, mixtures, genome={"method": method}))
    inputs = open_planned(config, [])
    live = live_tensors(inputs)
    planned = total(inputs.traffic[tensor.name] for tensor in live)
    merger = open_counted(inputs, mixtures)
    recipe = start_recipe(config, inputs, merger)
    for store in asked(merger):
        store.asked.clear()
    views = {t.name: torch.empty(t.elements, dtype=TORCH_DTYPES[t.dtype]) for t in live}
    merger.realize(recipe, views)
    assert sum(store.total for store in asked(merger)) == planned.requested
    assert sum(view.numel() * view.itemsize for view in views.values()) == planned.made


def test_a_father_who_is_the_base_is_read_once(mixtures: dict[str, Path], tmp_path: Path) -> None:
    genome = {"method": "dare_linear"}
    config = load_config(write_plan(tmp_path, mixtures, base=str(mixtures["a"]), genome=genome))
    planned = total(open_planned(config, []).traffic.values())
    size = open_checkpoint(str(mixtures["a"])).total_bytes
    assert planned.touched == 2 * size
    assert planned.requested > planned.distinct


PEAK = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import torch
from tests.checkpoint_files import RemoteStore, local_calls, open_remote
from orchestrator.child_writer import ChildWriter
from workers.merging import Recipe, Rule
from workers.merging.executor import Merger
from workers.merging.selector import Selector
from workers.storage.folder import FolderStore

folder = Path(sys.argv[1])
merger = Merger({n: open_remote(folder / n) for n in "ab"})
recipe = Recipe(merger.references, (Rule(Selector(), "linear", {"weight": 0.5}),))
store = FolderStore(folder / "child")
writer = ChildWriter.create(recipe, merger.parents, merger.base, store)
calls = local_calls(merger, store)
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
torch.ones(1 << 20).add(1)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
writer.merge(calls)
print(before, peak() - before)
"""


def test_memory_in_flight_is_as_planned(tmp_path: Path) -> None:
    """A worker that reads 100 MB of each of two parents from a store, and holds a few units of them."""
    for seed, name in enumerate("ab"):
        values = torch.full((12288, 4096), 0.5 + seed, dtype=torch.bfloat16)
        write_checkpoint(tmp_path / name, {"model.layers.0.mlp.up_proj.weight": values})
    places = {"a": tmp_path / "a", "b": tmp_path / "b", "c": tmp_path}
    config = load_config(write_plan(tmp_path, places, base=None, genome={"method": "linear"}))
    inputs = open_planned(config, [])
    bucket = {name: replace(p, kind="bucket") for name, p in inputs.parents.items()}
    remote = replace(inputs, parents=bucket)
    config.workers.gang = 2  # a gang reads by requests
    planned = estimate(config, remote, load_cluster("gpu8_80gb", {}))["memory"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True, text=True, check=True, env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    before, grown = map(int, done.stdout.split())
    assert 0.5 * planned["merging"] < grown < 1.1 * planned["merging"]
    assert before < planned["process"]


# -- how often ---------------------------------------------------------------------------------------


def stage(planned: dict[str, Any], name: str) -> dict[str, Any]:
    """The one whose name begins so."""
    (found,) = [stage for stage in planned["stages"] if stage["name"].startswith(name)]
    return found  # type: ignore[no-any-return]


def test_a_canary_costs_a_merge_on_one_core_while_its_engine_waits(
    mixtures: dict[str, Path], tmp_path: Path
) -> None:
    vllm = {"kind": "vllm"}
    machines: dict[str, Any] = {"nodes": 1, "gpus_per_node": 2}

    def planned(**engine: Any) -> Any:
        return plan(
            tmp_path, mixtures, machines, engine=vllm | engine, workers={"count": 2},
            search={"evaluations": 92},
        )  # fmt: skip

    each, tenth, start = planned(), planned(canary=10), planned(canary=0)
    realized = stage(each, "realize")["times"]
    assert realized == 92 + 3 * 2 + 2
    # 50 on each of two engines, and one of the father before them.
    assert [stage(p, "compare")["times"] for p in (each, tenth, start)] == [102, 12, 2]
    merge = each["child"]["live_bytes"] / (load_cluster("gpu8_80gb", {}).core_merge * GB)
    assert stage(each, "compare")["seconds"] == pytest.approx(51 * merge)
    assert each["seconds"] > start["seconds"] + 49 * merge
    other = plan(tmp_path, mixtures, machines)
    assert not [s for s in other["stages"] if s["name"].startswith("compare")]


def test_a_race_realizes_a_candidate_for_each_block(
    mixtures: dict[str, Path], tmp_path: Path
) -> None:
    def realized(**racing: Any) -> tuple[int, str]:
        found = stage(
            plan(tmp_path, mixtures, {}, search={"evaluations": 100}, racing=racing), "realize"
        )
        return found["times"], found["name"]

    assert realized() == (108, "realize the candidates")
    assert realized(use="race") == (308, "realize the candidates, at most")
    assert realized(use="race", last_block=1.0) == (608, "realize the candidates, at most")
    assert realized(use="irt", first_block=0.1, last_block=0.1)[0] == 208


# -- what does not fit, and what would ---------------------------------------------------------------


def plan(folder: Path, mixtures: dict[str, Path], machines: dict[str, Any], **changes: Any) -> Any:
    file = write_plan(folder, mixtures, **changes)
    return plan_campaign(file, [], "gpu8_80gb", machines, [])


def told(problems: list[str], pattern: str) -> int:
    """The number that the only problem names."""
    (problem,) = problems
    found = re.search(pattern, problem)
    assert found is not None, problem
    return int(found[1])


def test_a_plan_tells_what_the_campaign_would_warn_of(
    mixtures: dict[str, Path], tmp_path: Path
) -> None:
    assert plan(tmp_path, mixtures, {})["warnings"] == []
    for name, epsilon in (("a", 1e-6), ("b", 1e-3)):
        folder = shutil.copytree(mixtures[name], tmp_path / name)
        config = CONFIG | {"text_config": {**CONFIG["text_config"], "rms_norm_eps": epsilon}}
        (folder / "config.json").write_text(json.dumps(config))
    planned = plan(tmp_path, mixtures | {name: tmp_path / name for name in "ab"}, {})
    (warning,) = planned["warnings"]
    assert warning.startswith("b (")
    assert "rms_norm_eps 0.001" in warning
    console = Console(width=1000, record=True, file=io.StringIO())
    console.print(render_plan(planned))
    assert f"warning: {warning}" in console.export_text()


def test_an_optimizer_that_is_none_is_refused(mixtures: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"search.optimizer: 'cma' is none of .*cma_es"):
        plan(tmp_path, mixtures, {}, search={"optimizer": "cma"})


def test_workers_that_have_no_place(mixtures: dict[str, Path], tmp_path: Path) -> None:
    workers = {"count": 5, "gang": 6}
    nodes = told(
        plan(tmp_path, mixtures, {"nodes": 2}, workers=workers)["problems"], r"(\d+) nodes would"
    )
    assert plan(tmp_path, mixtures, {"nodes": nodes}, workers=workers)["status"] == "fits"
    assert plan(tmp_path, mixtures, {"nodes": nodes - 1}, workers=workers)["status"] != "fits"
    count = told(
        plan(tmp_path, mixtures, {"nodes": 2}, workers=workers)["problems"], r"count: (\d+)"
    )
    assert (
        plan(tmp_path, mixtures, {"nodes": 2}, workers=workers | {"count": count})["status"]
        == "fits"
    )
    strict = workers | {"count": 1, "placement": "strict"}
    there = plan(tmp_path, mixtures, {"nodes": 5}, workers=strict, address="auto")
    assert told(there["problems"], r"(\d+) nodes would") == 6
    with pytest.raises(BadInputError, match="this machine is one"):
        plan(tmp_path, mixtures, {"nodes": 6}, workers=strict)
    none = plan(tmp_path, mixtures, {"gpus_per_node": 0}, workers={"count": 1})
    assert "no node has room for one" in none["problems"][0]


def test_a_gpu_that_is_too_small(mixtures: dict[str, Path], tmp_path: Path) -> None:
    """The gang that is named is the smallest that fits."""
    whole = plan(tmp_path, mixtures, {})["memory"]
    of_all, buffers = whole["live"], whole["gpu"] - whole["live"]
    machines = {"gpu_memory": (buffers + 0.45 * of_all) / 0.9 / GB}
    gang = told(plan(tmp_path, mixtures, machines)["problems"], r"a gang of (\d+) workers")
    assert plan(tmp_path, mixtures, machines, workers={"gang": gang})["status"] == "fits"
    assert plan(tmp_path, mixtures, machines, workers={"gang": gang - 1})["status"] != "fits"
    tiny = {"gpu_memory": (buffers + 0.05 * of_all) / 0.9 / GB}
    (problem,) = plan(tmp_path, mixtures, tiny)["problems"]
    assert "a larger GPU" in problem
    assert "gang of" not in problem


def test_workers_with_parts_of_gpus_and_cores(mixtures: dict[str, Path], tmp_path: Path) -> None:
    """A part of a GPU is never of two of them; where it is too small, a whole one would do."""
    one = {"nodes": 1, "gpus_per_node": 5, "cores_per_node": 20}

    def fits(count: int, machines: dict[str, Any] = one, **needs: float) -> bool:
        workers = {"count": count, **needs}
        return bool(plan(tmp_path, mixtures, machines, workers=workers)["status"] == "fits")

    assert fits(10, gpus=0.5)
    assert not fits(11, gpus=0.5)
    assert fits(5, gpus=0.8)  # 6 such parts are less than 5 GPUs
    assert not fits(6, gpus=0.8)
    assert fits(10, one | {"cores_per_node": 1}, gpus=0.1, cpus=0.1)
    assert not fits(11, one | {"cores_per_node": 1}, gpus=0.1, cpus=0.1)
    needed = plan(tmp_path, mixtures, {})["memory"]["gpu"]
    small = one | {"gpu_memory": 1.2 * needed / GB}
    half = plan(tmp_path, mixtures, small, workers={"gpus": 0.5})
    assert "or workers.gpus: 1" in half["problems"][0]
    assert fits(1, small, gpus=1)


def test_workers_that_differ(mixtures: dict[str, Path], tmp_path: Path) -> None:
    """So many nodes as are named hold all of them, and one less does not."""
    machines = {"gpus_per_node": 4, "cores_per_node": 16}
    workers = {"count": 6, "pools": [{"count": 3, "cpus": 8}, {"count": 1, "cpus": 12}]}
    problems = plan(tmp_path, mixtures, machines | {"nodes": 1}, workers=workers)["problems"]
    nodes = told(problems, r"(\d+) nodes would")
    found = plan(tmp_path, mixtures, machines | {"nodes": nodes}, workers=workers)
    assert found["status"] == "fits"
    assert (found["workers"]["count"], found["workers"]["nodes"]) == (10, nodes)
    fewer = plan(tmp_path, mixtures, machines | {"nodes": nodes - 1}, workers=workers)
    assert fewer["status"] != "fits"
    spread = workers | {"placement": "spread"}
    wide = plan(tmp_path, mixtures, machines | {"nodes": 12}, workers=spread)["workers"]
    assert (wide["nodes"], wide["most_on_a_node"]) == (10, 1)


def test_memory_and_resources_that_workers_reserve(
    mixtures: dict[str, Path], tmp_path: Path
) -> None:
    one: dict[str, Any] = {"nodes": 1, "gpus_per_node": 8, "node_memory": 100}
    for memory, fits in ((25, True), (26, False)):
        found = plan(tmp_path, mixtures, one, workers={"count": 4, "memory": memory})
        assert (found["status"] == "fits") == fits
    least = told(
        plan(tmp_path, mixtures, one, workers={"memory": 0.5})["problems"], r"set it to (\d+)"
    )
    assert plan(tmp_path, mixtures, one, workers={"memory": least})["status"] == "fits"
    file = write_plan(tmp_path, mixtures, workers={"count": 2, "resources": {"fast": 1}})
    (problem,) = plan_campaign(file, [], "gpu8_80gb", {}, [])["problems"]
    assert "1 fast" in problem
    cluster = read_yaml(SHIPPED / "cluster" / "gpu8_80gb.yaml")
    own = tmp_path / "cluster.yaml"
    for there, nodes, fits in ((2, 1, True), (1, 2, True), (1, 1, False)):
        own.write_text(yaml.safe_dump(cluster | {"resources": {"fast": there}}))
        found = plan_campaign(file, [], str(own), {"nodes": nodes}, [])
        assert (found["status"] == "fits") == fits
    own.write_text(yaml.safe_dump(cluster | {"resources": {"fast": "much"}}))
    with pytest.raises(BadInputError, match="resources"):
        plan_campaign(file, [], str(own), {}, [])


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_seconds_that_are_none(seconds: float) -> None:
    with pytest.raises(BadInputError, match="is not a number of seconds"):
        plan_campaign(
            "qwen35_27b_darwin", [], "gpu8_80gb", {}, ["qwen35_27b"], score_seconds=seconds
        )


def test_a_dense_model_has_no_gang() -> None:
    arguments: tuple[Any, ...] = ("gpu8_80gb", {"gpu_memory": 40}, ["qwen35_27b"])
    (problem,) = plan_campaign("qwen35_27b_darwin", [], *arguments)["problems"]
    assert "vLLM over 2 GPUs would do" in problem
    asked = plan_campaign("qwen35_27b_darwin", ["workers.gang=2"], *arguments)["problems"]
    assert "no routed experts" in asked[0]


def test_a_gpu_that_is_too_small_for_vllm(mixtures: dict[str, Path], tmp_path: Path) -> None:
    """So many GPUs as are named hold the model, and a worker must reserve them."""
    engine = {"kind": "vllm"}
    whole = plan(tmp_path, mixtures, {}, engine=engine)["memory"]
    room = whole["gpu"] - whole["live"] + 0.4 * whole["live"]
    machines = {"gpu_memory": room / 0.9 / GB}
    gpus = told(
        plan(tmp_path, mixtures, machines, engine=engine)["problems"], r"vLLM over (\d+) GPUs"
    )
    assert gpus == 3
    over = engine | {"vllm": {"tensor_parallel_size": gpus}}
    assert plan(tmp_path, mixtures, machines, engine=over, workers={"gpus": 3})["status"] == "fits"
    assert (
        told(plan(tmp_path, mixtures, machines, engine=over)["problems"], r"set it to (\d+)") == 3
    )


def test_memory_that_is_too_small(mixtures: dict[str, Path], tmp_path: Path) -> None:
    """Streaming would do, or so many nodes; where even that is too much, only larger nodes."""
    workers = {"count": 8, "gang": 1}
    full = plan(tmp_path, mixtures, {"nodes": 1}, workers=workers)
    assert full["workers"]["keeps_parents"]
    each = full["memory"]["process"] + full["memory"]["merging"]
    machines = {"nodes": 1, "node_memory": (full["memory"]["node"] - 1000) / GB}
    streamed = plan(tmp_path, mixtures, machines, workers=workers)
    assert streamed["status"] == "fits"
    assert not streamed["workers"]["keeps_parents"]
    file = write_plan(tmp_path, mixtures, workers=workers)
    kept = plan_campaign(file, [], "gpu8_80gb", machines, [], keeps=True)
    assert "--stream" in kept["problems"][0]
    nodes = told(kept["problems"], r"(\d+) nodes with the workers spread")
    wide = ["workers.placement=spread"]
    for count, fits in ((nodes, True), (nodes - 1, False)):
        there = machines | {"nodes": count}
        found = plan_campaign(file, wide, "gpu8_80gb", there, [], keeps=True)
        assert (found["status"] == "fits") == fits
    # Where there are nodes enough, the workers need only be spread over them.
    there = machines | {"nodes": nodes}
    packed = plan_campaign(file, [], "gpu8_80gb", there, [], keeps=True)["problems"]
    assert told(packed, r"(\d+) nodes with the workers spread") == nodes
    many = machines | {"nodes": 20}
    packed = plan_campaign(file, [], "gpu8_80gb", many, [], keeps=True)["problems"]
    assert told(packed, r"(\d+) nodes with the workers spread") == 20
    too_little = plan(tmp_path, mixtures, {"node_memory": each / 2 / GB}, workers=workers)
    assert "nodes with" in too_little["problems"][0]
    assert "spread" not in too_little["problems"][0]


def test_a_gang_keeps_nothing_of_a_bucket(mixtures: dict[str, Path], tmp_path: Path) -> None:
    config = load_config(write_plan(tmp_path, mixtures, workers={"gang": 2}))
    inputs = open_planned(config, [])
    bucket = {name: replace(p, kind="bucket") for name, p in inputs.parents.items()}
    remote, cluster = replace(inputs, parents=bucket), load_cluster("gpu8_80gb", {})
    assert not estimate(config, remote, cluster)["workers"]["keeps_parents"]
    (problem,) = estimate(config, remote, cluster, keeps=True)["problems"]
    assert problem.startswith("--keep")


def test_a_disk_that_is_too_small_for_copies(mixtures: dict[str, Path], tmp_path: Path) -> None:
    parents = [{"name": n, "path": f"CHOOSE/{n}"} for n in "ab"]
    file = write_plan(tmp_path, mixtures, parents=parents, base="CHOOSE/c")
    arguments: tuple[Any, ...] = (file, [], "gpu8_80gb")
    found = plan_campaign(*arguments, {"disk_size": 166}, ["qwen35_27b"])
    assert found["memory"]["copies"] == pytest.approx(3 * 55.56e9, rel=1e-3)
    assert [problem.split(":")[0] for problem in found["problems"]] == ["disk"]
    assert plan_campaign(*arguments, {"disk_size": 167}, ["qwen35_27b"])["status"] == "fits"


# -- parents that are not here -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "likes", "message"),
    [
        ("CHOOSE/mother", [], "b: CHOOSE/mother: a model of the hub would be downloaded whole"),
        ("/nowhere/mother", [], "/nowhere/mother"),
        ("CHOOSE/mother", ["qwen"], "'qwen' is no checkpoint that ships"),
        ("CHOOSE/mother", ["x=qwen35_27b"], "there is no parent 'x'"),
        ("CHOOSE/mother", ["qwen35_397b"], "parents must be of one architecture"),
    ],
)
def test_parents_that_cannot_be_planned_with(
    path: str, likes: list[str], message: str, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    parents = [{"name": "a", "path": "Qwen/Qwen3.5-27B"}, {"name": "b", "path": path}]
    file = write_plan(tmp_path, mixtures, parents=parents, base=None)
    with pytest.raises(BadInputError) as raised:
        plan_campaign(file, ["genome.method=linear"], "gpu8_80gb", {}, likes)
    assert message in str(raised.value)


@pytest.mark.parametrize("path", ["CHOOSE/mother", "s3://choose/mother", "/nowhere/mother"])
def test_a_described_parent_stands_for_one_that_is_not_here(
    path: str, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    parents = [{"name": "a", "path": "hf://Qwen/Qwen3.5-27B@main"}, {"name": "b", "path": path}]
    file = write_plan(tmp_path, mixtures, parents=parents, base=None)
    found = plan_campaign(file, ["genome.method=linear"], "gpu8_80gb", {}, ["qwen35_27b"])
    assert [parent["like"] for parent in found["parents"]] == ["qwen35_27b"] * 2
    assert found["child"]["files"] == 11


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gpus_per_node", None, "the key 'gpus_per_node' is missing"),
        ("nodes", 1.5, "nodes: 1.5 is not a positive whole number"),
        ("nic", 0, "nic: 0 is not a positive number"),
        ("disk", "fast", "disk: 'fast' is not a positive number"),
        ("speed", 9, "there is no key speed"),
    ],
)
def test_a_cluster_of_ones_own_is_checked(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    data = read_yaml(SHIPPED / "cluster" / "gpu8_80gb.yaml") | {key: value}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    with pytest.raises(BadInputError, match=r"cluster\.yaml") as raised:
        load_cluster(str(file), {})
    assert message in str(raised.value)


# -- the documentation -----------------------------------------------------------------------------------


def test_an_option_that_replaces_a_clusters_value_is_named() -> None:
    with pytest.raises(BadInputError, match=r"^--gpu-memory: nan is not a positive number$"):
        load_cluster("gpu8_80gb", {"nodes": 2, "gpu_memory": float("nan")})


def test_the_documentation_has_what_the_command_says() -> None:
    """If this fails after a change that was meant: `python -m tests.plan_tables` writes the tables anew."""
    page = PAGE.read_text()
    assert with_tables(page) == page


# -- the command, and the campaigns that ship ----------------------------------------------------------


def test_the_27b_campaign_that_ships_fits_one_node() -> None:
    found = run_darwin("plan", "qwen35_27b_darwin", "--like", "qwen35_27b", "--nodes", "1")
    assert found["status"] == "fits"
    assert [s["name"] for s in found["stages"]][:3] == [
        "copy the parents to every node", "scan the weights", "read the parents for the probe",
    ]  # fmt: skip


def test_a_plan_that_does_not_fit_is_shown_and_ends_with_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "plan", "qwen35_27b_darwin", "--like", "qwen35_27b",
         "--gpu-memory", "40"],
        capture_output=True, text=True, env=dict(os.environ) | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "It does not fit:" in done.stdout
    assert (
        "GPU memory: a worker's part of the live model and its buffers take 53.8 GB" in done.stdout
    )
    assert "merge and write the child" in done.stdout


LARGE = """
import resource, sys
sys.argv = ["darwin", "plan", "qwen35_397b_expert_transplant", "--like", "qwen35_397b", "--json"]
from orchestrator.cli import main
try:
    main()
finally:
    loaded = [name for name in ("torch", "ray", "transformers") if name in sys.modules]
    print(loaded, resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)
"""


def test_the_397b_campaign_that_ships_fits_four_nodes_and_is_planned_quickly() -> None:
    """From headers: without torch, in a few seconds for 94,964 merge units of three parents."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == "fits"
    assert (found["child"]["files"], found["child"]["units"]) == (94, 94964)
    assert found["child"]["parts_per_file"][1] <= found["child"]["most_parts"]
    loaded, seconds = done.stderr.rsplit(maxsplit=1)
    assert loaded == "[]"
    assert float(seconds) < 15  # about 3 on an idle machine
