"""A model spread over a gang is the model in one process: the same weights, the same scores, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.checkpoint_files import (
    RemoteStore,
    read_tensors,
    recipe_for,
    rule,
    tensor_bytes,
    write_checkpoint,
    write_child,
)
from tests.families import (
    EXPERTS,
    SLIDING_LAYERS,
    SMALL,
    build_model,
    write_family,
    write_tokenizer,
)
from tests.unit.test_fp8 import fp8_config, quantize
from tests.unit.test_transformers_engine import dare_ties_recipe
from workers.actors import MergeWorker
from workers.checkpoints import ArchitectureMap, Checkpoint, open_checkpoint
from workers.errors import BadInputError
from workers.evaluation import Decoding
from workers.evaluation.engines.sharded_engine import LEADER, GangMember, ShardedEngine
from workers.evaluation.engines.transformers_engine import TransformersEngine
from workers.evaluation_worker import WorkerSpec
from workers.gang import GangLeader, GangWorker
from workers.merging.executor import Merger
from workers.merging.sources import Source

KINDS = ["qwen3_moe", "qwen3_5_moe", "mixtral"]
PAIRS = [("abc", " def"), ("a", "b"), ("what is this? ", "a long answer"), ("zz", "top")]
PROMPTS = ["abc", "what is it", "z"]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    root = tmp_path_factory.mktemp("families")
    return {kind: write_family(root / kind, kind) for kind in [*KINDS, "llama"]}


class Gang:
    """Members in this process. `calls` counts what they were asked."""

    def __init__(
        self,
        parents: dict[str, Checkpoint],
        base: Checkpoint | None,
        members: int,
        **settings: Any,
    ) -> None:
        self.members = {
            f"member-{number}": GangMember(parents, base, **settings) for number in range(members)
        }
        self.calls: list[tuple[str, str]] = []
        self.engine = ShardedEngine(parents, base, list(self.members), self.ask, **settings)

    def ask(self, member: str, method: str, *arguments: Any) -> Callable[[], Any]:
        self.calls.append((member, method))
        result = getattr(self.members[member], method)(*arguments)
        return lambda: result

    def views(self) -> dict[str, torch.Tensor]:
        """The live weights of everybody; nobody has another's."""
        found = dict(self.engine.views)
        for member in self.members.values():
            assert member.shard is not None
            assert not found.keys() & member.shard.views.keys()
            found |= member.shard.views
        return found


def opened(paths: Sequence[Path]) -> tuple[dict[str, Checkpoint], Checkpoint]:
    base, first, second = (open_checkpoint(str(path)) for path in paths)
    return {"a": first, "b": second}, base


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("members", [1, 3])
def test_a_gang_is_the_engine(
    kind: str, dtype: str, members: int, families: dict[str, list[Path]]
) -> None:
    parents, base = opened(families[kind])
    whole = TransformersEngine(parents, base, dtype=dtype)
    gang = Gang(parents, base, members, dtype=dtype)
    recipe = dare_ties_recipe(whole.merger)
    whole.realize(recipe)
    gang.engine.realize(recipe)

    views = gang.views()
    assert views.keys() == whole.views.keys()
    for name, view in whole.views.items():
        assert view.dtype == views[name].dtype, name
        assert torch.equal(view, views[name]), name
    assert gang.engine.loglikelihood(PAIRS) == whole.loglikelihood(PAIRS)
    assert gang.engine.generate(PROMPTS, Decoding(8, ("q",))) == whole.generate(
        PROMPTS, Decoding(8, ("q",))
    )
    assert {member for member, method in gang.calls if method == "compute"} == set(gang.members)
    assert gang.engine.expresses("abc") == whole.expresses("abc")
    assert gang.engine.describe("abc") == whole.describe("abc")
    one, two = (e.read([("", "what is it"), ("ab", "cd")]) for e in (gang.engine, whole))
    assert replace(one, outputs=[]) == replace(two, outputs=[])
    assert all(torch.equal(a, b) for a, b in zip(one.outputs, two.outputs, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_way_transformers_computes_experts(
    implementation: str, kind: str, families: dict[str, list[Path]]
) -> None:
    """The other ways than the one that it chooses by itself; in bf16, where roundings differ most."""
    parents, base = opened(families[kind])
    engines = [TransformersEngine(parents, base), Gang(parents, base, 2).engine]
    recipe = dare_ties_recipe(engines[0].merger)
    scores = []
    for engine in engines:
        engine.realize(recipe)
        engine.model.set_experts_implementation(implementation)
        scores.append(engine.loglikelihood(PAIRS))
    assert scores[0] == scores[1]


@pytest.mark.parametrize("kind", KINDS)
def test_gathered_weights_are_the_written_child(
    kind: str, families: dict[str, list[Path]], tmp_path: Path
) -> None:
    parents, base = opened(families[kind])
    gang = Gang(parents, base, 2)
    recipe = dare_ties_recipe(gang.engine.merger)
    gang.engine.realize(recipe)
    child = open_checkpoint(
        str(write_child(Merger(parents, base), recipe, tmp_path / "child", threads=2))
    )
    source, written = Source(child), ArchitectureMap(child).by_name
    views = gang.views()
    assert views.keys() == written.keys()
    for name, tensor in written.items():
        assert tensor_bytes(source.read(tensor, 0, tensor.elements)) == tensor_bytes(views[name])


def test_a_tied_head_follows_the_embedding(tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        model = build_model("qwen3_moe", number)
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        model.save_pretrained(tmp_path / str(number))
        write_tokenizer(tmp_path / str(number))
        paths.append(tmp_path / str(number))
    parents = {n: open_checkpoint(str(p)) for n, p in zip("ab", paths, strict=True)}
    assert "lm_head.weight" not in parents["a"].tensors
    whole, gang = TransformersEngine(parents, None), Gang(parents, None, 1)
    recipe = recipe_for(whole.merger, rule("linear", weight={"a": 1.0, "b": 2.0}))
    for engine in (whole, gang.engine):
        engine.realize(recipe)
    assert gang.engine.loglikelihood(PAIRS) == whole.loglikelihood(PAIRS)


def test_matched_experts_come_from_where_they_are(families: dict[str, list[Path]]) -> None:
    """A place's expert may lie, in a donor, among those that another worker has in the father."""
    parents, base = opened(families["qwen3_5_moe"])
    whole, gang = TransformersEngine(parents, base), Gang(parents, base, 3)
    plain = dare_ties_recipe(whole.merger)
    recipe = replace(plain, experts={"b": {0: (2, 3, 0, 1), 3: (3, 0, 1, 2)}})
    for engine in (whole, gang.engine):
        engine.realize(recipe)
    views = gang.views()
    assert all(torch.equal(view, views[name]) for name, view in whole.views.items())
    assert gang.engine.loglikelihood(PAIRS) == whole.loglikelihood(PAIRS)
    whole.realize(plain)
    assert not all(torch.equal(view, views[name]) for name, view in whole.views.items())


def test_a_father_of_fp8_codes(families: dict[str, list[Path]], tmp_path: Path) -> None:
    """Whose child is stored in BF16, and whose scales are of blocks of the experts' matrices."""
    plain, mother = families["qwen3_moe"][1:]
    father = tmp_path / "father"
    shutil.copytree(plain, father)
    weights = read_tensors(plain)
    codes = quantize({name: w for name, w in weights.items() if "_proj" in name}, (16, 16))
    safetensors.torch.save_file(weights | codes, father / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (father / "config.json").write_text(
        json.dumps(fp8_config((16, 16), activation_scheme="dynamic") | config)
    )
    parents = {"a": open_checkpoint(str(father)), "b": open_checkpoint(str(mother))}
    whole, gang = TransformersEngine(parents, None), Gang(parents, None, 2)
    recipe = recipe_for(whole.merger, rule("linear", weight={"a": 0.4, "b": 0.6}))
    for engine in (whole, gang.engine):
        engine.realize(recipe)
    views = gang.views()
    assert views.keys() == whole.views.keys()
    assert all(torch.equal(view, views[name]) for name, view in whole.views.items())
    assert gang.engine.loglikelihood(PAIRS) == whole.loglikelihood(PAIRS)


class CountedStore(RemoteStore):
    """Keeps what was read: (file, first byte, last byte)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ranges: list[tuple[str, int, int]] = []

    def read_into(
        self, key: str, start: int, buffer: memoryview, version: str | None = None
    ) -> None:
        self.ranges.append((key, start, start + len(buffer)))
        super().read_into(key, start, buffer, version)


def test_everybody_reads_what_it_holds_and_no_more(
    families: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parents in a store that cannot be mapped: nothing is copied, no byte is read that is not merged."""
    monkeypatch.setenv("DARWIN_CACHE", str(tmp_path / "cache"))
    paths = families["qwen3_5_moe"][1:]

    def remote() -> dict[str, Checkpoint]:
        return {
            name: replace(open_checkpoint(str(path)), store=CountedStore(path))
            for name, path in zip("ab", paths, strict=True)
        }

    gang = Gang(remote(), None, 3)
    workers: dict[str, Any] = {LEADER: gang.engine}
    for name in gang.members:
        # In this process they were given the leader's stores: each gets its own, to count.
        workers[name] = gang.members[name]
        workers[name].merger = Merger(remote(), None, keep_statistics=True)
    recipe = recipe_for(gang.engine.merger, rule("linear", weight={"a": 0.4, "b": 0.6}))
    for worker in workers.values():
        for parent in worker.merger.parents.values():
            parent.fingerprint  # noqa: B018 - reads samples, once
            parent.store.ranges.clear()
    gang.engine.realize(recipe)
    shards = gang.engine.shard_map
    for name, worker in workers.items():
        assert shards.bytes_of(name) > 0
        for parent in worker.merger.parents.values():
            own = {
                position
                for tensor in shards.tensors_of(name)
                for entry in [parent.tensors[tensor.stored]]
                for first in [entry.start + 2 * tensor.offset]
                for position in range(first, first + 2 * tensor.elements)
            }
            read = [n for _, first, last in parent.store.ranges for n in range(first, last)]
            assert len(read) == len(own) == shards.bytes_of(name)
            assert set(read) == own
    assert not (tmp_path / "cache").exists()


def test_nobody_has_memory_for_the_experts_of_others(tmp_path: Path) -> None:
    """A model of 48 MiB of experts, in a process of its own: what is allocated, against the shard map."""
    config = transformers.Qwen3MoeConfig(
        **SMALL | {"hidden_size": 256},
        **EXPERTS | {"num_experts": 32, "moe_intermediate_size": 256},
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    tensors = {n: torch.zeros(t.shape, dtype=torch.bfloat16) for n, t in model.state_dict().items()}
    parents = {}
    for name in "ab":
        folder = write_checkpoint(tmp_path / name, tensors, config=config.to_dict())
        write_tokenizer(folder)
        parents[name] = str(folder)
    command = [sys.executable, "-m", "tests.gang_memory", json.dumps(parents)]
    # What was freed goes back to the system, so that it is not counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    total = sum(tensor.numel() for tensor in tensors.values()) * 2
    for worker, found in json.loads(done.stdout).items():
        assert found["tensors"] == found["shard"], worker
        assert 0.2 * total < found["shard"] < 0.3 * total, worker
        assert found["grown"] < found["shard"] + (4 << 20) < 0.4 * total, worker


def test_everybody_takes_a_part_of_a_scan(families: dict[str, list[Path]]) -> None:
    base, father, mother = (str(path) for path in families["mixtral"])
    places = {"a": father, "b": mother}
    prints = {name: open_checkpoint(place).fingerprint for name, place in places.items()}
    spec = WorkerSpec(places, base, prints)
    workers = [GangWorker(spec), GangWorker(spec)]
    asked: list[list[str]] = []

    class Here:
        names = ("member-1", "member-2")

        def ask(self, member: str, method: str, *arguments: Any) -> Callable[[], Any]:
            asked.append(arguments[-1])
            result = getattr(workers[self.names.index(member)], method)(*arguments)
            return lambda: result

    leader, alone = GangLeader(spec, []), MergeWorker(spec)
    for worker in (leader, alone, *workers):
        worker.open(lambda checkpoint: checkpoint)
    leader._members = Here()  # type: ignore[assignment]
    names = [tensor.name for tensor in ArchitectureMap(alone.parents["a"]).tensors]
    for count in (1, 2, 3, 7, len(names)):
        assert leader.scan_tensors(names[:count]) == alone.scan_tensors(names[:count])
    assert [len(given) for given in asked[-2:]] == [len(names[1::3]), len(names[2::3])]


def test_what_cannot_be_spread_is_refused_by_name(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    parents, base = opened(families["llama"])
    with pytest.raises(
        BadInputError, match=r"LlamaForCausalLM has no routed experts.*workers\.gang"
    ):
        Gang(parents, base, 1)
    config = transformers.GptOssConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, layer_types=SLIDING_LAYERS
    )
    folder = tmp_path / "gpt"
    transformers.GptOssForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    parents = {"a": open_checkpoint(str(folder))}
    with pytest.raises(BadInputError, match="GptOssExperts"):
        Gang(parents, None, 1)


def test_a_father_without_a_head_is_refused(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    tensors = read_tensors(families["qwen3_moe"][1])
    del tensors["lm_head.weight"]
    config = json.loads((families["qwen3_moe"][1] / "config.json").read_text())
    folder = write_checkpoint(tmp_path / "headless", tensors, config=config)
    write_tokenizer(folder)
    with pytest.raises(BadInputError, match=r"lacks weights of Qwen3MoeForCausalLM: lm_head"):
        Gang({"a": open_checkpoint(str(folder))}, None, 1)
