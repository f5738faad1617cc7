"""The shard map: every unit has one owner, all own the same bytes, and little moves when workers change."""

from __future__ import annotations

import math
import pickle
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import SHIPPED, read_yaml
from workers.checkpoints import ArchitectureMap, LogicalTensor
from workers.checkpoints.architecture import name_tensors
from workers.checkpoints.description import parse_description
from workers.checkpoints.safetensors_format import TensorEntry
from workers.experts.shard_map import SLACK, ShardMap

TOLERANCE = 0.02


def entries(shapes: dict[str, tuple[int, ...]]) -> list[TensorEntry]:
    """Headers of so many BF16 tensors."""
    return [TensorEntry(n, "BF16", shape, 0, 2 * math.prod(shape)) for n, shape in shapes.items()]


@cache
def qwen_397b() -> tuple[LogicalTensor, ...]:
    """Qwen3.5-397B-A17B: 60 layers of 512 fused experts, and an MTP layer of 512 that are stored apart."""
    data = read_yaml(SHIPPED / "checkpoint" / "qwen35_397b.yaml")
    return ArchitectureMap(parse_description("qwen35_397b", data)).tensors


def small_model(
    layers: int, experts: int, inner: int = 8, others: Sequence[int] = ()
) -> tuple[LogicalTensor, ...]:
    """Fused experts of 3 * `inner` rows of 16 elements, and other tensors of so many rows each."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp.experts"
        shapes[f"{at}.gate_up_proj"] = (experts, 2 * inner, 16)
        shapes[f"{at}.down_proj"] = (experts, 16, inner)
    for number, rows in enumerate(others):
        shapes[f"model.layers.{number % layers}.self_attn.w{number}.weight"] = (rows, 16)
    return tuple(name_tensors(entries(shapes), {"num_hidden_layers": layers}))


def names(count: int) -> list[str]:
    return [f"node-{number}" for number in range(count)]


def size_of(tensors: Sequence[LogicalTensor]) -> int:
    return sum({"BF16": 2, "F32": 4}[tensor.dtype] * tensor.elements for tensor in tensors)


def layer_counts(shard_map: ShardMap) -> dict[int, Counter[str]]:
    """Layer -> worker -> experts of it."""
    counts: dict[int, Counter[str]] = {}
    for tensor in shard_map.tensors:
        if tensor.layer is not None and tensor.name.endswith("down_proj.weight"):
            if tensor.expert is None:
                continue
            counter = counts.setdefault(tensor.layer, Counter(dict.fromkeys(shard_map.workers, 0)))
            counter[shard_map.owner(tensor)] += 1
    return counts


def spread(shard_map: ShardMap, but: str | None = None) -> int:
    """By how many experts of one layer any two workers differ, `but` the lead."""
    return max(
        max(count for worker, count in counts.items() if worker != but)
        - min(count for worker, count in counts.items() if worker != but)
        for counts in layer_counts(shard_map).values()
    )


def check_complete(shard_map: ShardMap) -> None:
    """Every tensor has one owner, the same for all matrices of an expert."""
    owned = [shard_map.tensors_of(worker) for worker in shard_map.workers]
    names = {tensor.name for tensors in owned for tensor in tensors}
    assert len(names) == sum(map(len, owned)) == len(shard_map.tensors)
    assert names == {tensor.name for tensor in shard_map.tensors}
    experts: dict[tuple[int | None, int], str] = {}
    for worker, tensors in zip(shard_map.workers, owned, strict=True):
        assert shard_map.bytes_of(worker) == size_of(tensors)
        for tensor in tensors:
            if tensor.expert is not None:
                assert experts.setdefault((tensor.layer, tensor.expert), worker) == worker


@pytest.mark.parametrize("count", [1, 4, 7, 16, 32])
def test_the_largest_model_is_balanced_in_bytes_and_in_every_layer(count: int) -> None:
    tensors = qwen_397b()
    assert round(size_of(tensors) / 1e9, 1) == 806.8
    before = time.process_time()
    shard_map = ShardMap.of(tensors, names(count))
    assert time.process_time() - before < 3.0
    check_complete(shard_map)
    share = size_of(tensors) / count
    sizes = [shard_map.bytes_of(worker) for worker in shard_map.workers]
    assert max(sizes) < share * (1 + TOLERANCE) and min(sizes) > share * (1 - TOLERANCE)
    assert shard_map.imbalance == pytest.approx(max(abs(size / share - 1) for size in sizes))
    # At 32, the embedding alone is 8 % of a share, and its owner has fewer experts for it.
    assert spread(shard_map) <= (1 if count < 32 else 2)


def test_neighbours_in_a_fused_tensor_stay_together() -> None:
    """A worker reads one stretch of each fused tensor."""
    shard_map = ShardMap.of(qwen_397b(), names(7))
    for layer in (0, 59):
        owners = [
            shard_map.owner(tensor)
            for tensor in shard_map.tensors
            if tensor.layer == layer and tensor.stored.endswith("experts.gate_up_proj")
        ]
        changes = sum(one != other for one, other in pairwise(owners))
        assert changes == 6


def test_a_lead_has_all_that_is_no_expert_and_fewer_experts() -> None:
    shard_map = ShardMap.of(qwen_397b(), names(8), lead="node-3")
    for tensor in shard_map.tensors:
        if tensor.expert is None:
            assert shard_map.owner(tensor) == "node-3"
    assert shard_map.imbalance < TOLERANCE
    assert spread(shard_map, but="node-3") <= 1
    counts = layer_counts(shard_map)
    assert all(0 < count["node-3"] < count["node-0"] for count in counts.values())
    follower = shard_map.without("node-3")
    assert follower.lead == "node-0"
    assert {follower.owner(t) for t in shard_map.tensors_of("node-3") if t.expert is None} == {
        "node-0"
    }


def check_change(before: ShardMap, after: ShardMap) -> None:
    """Only units of a worker that is gone, or for one that is new, have moved."""
    gone = set(before.workers) - set(after.workers)
    new = set(after.workers) - set(before.workers)
    for unit, owner in after.owners.items():
        assert owner == before.owners[unit] or before.owners[unit] in gone or owner in new
    assert after.tensors == before.tensors
    check_complete(after)


@pytest.mark.parametrize("count", [4, 16])
def test_only_what_must_moves_when_workers_come_and_go(count: int) -> None:
    """A lost worker's units, and a joining worker's even share: no map in balance moves less."""
    shard_map = ShardMap.of(qwen_397b(), names(count))
    for lost, joins in (("node-1", "spare"), ("spare", "other")):
        fewer = shard_map.without(lost)
        check_change(shard_map, fewer)
        assert fewer.imbalance < TOLERANCE and spread(fewer) <= 3
        more = fewer.with_worker(joins)
        check_change(fewer, more)
        assert more.imbalance < TOLERANCE and spread(more) <= 3
        shard_map = more
    grown = shard_map.with_worker("one more")
    check_change(shard_map, grown)
    assert grown.imbalance < TOLERANCE


@pytest.mark.parametrize("count", [4, 8, 16, 32])
def test_the_documented_balance(count: int) -> None:
    page = (SHIPPED.parent / "docs" / "cluster.md").read_text()
    shard_map = ShardMap.of(qwen_397b(), names(count))
    lost, joined = shard_map.without("node-1"), shard_map.with_worker("one more")
    counts = {n for layer in layer_counts(shard_map).values() for n in layer.values()}
    cells = [
        f"{count}",
        f"{max(shard_map.bytes_of(worker) for worker in shard_map.workers) / 1e9:.1f} GB",
        f"{shard_map.imbalance:.2%}",
        f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}",
        f"{shard_map.bytes_of('node-1') / 1e9:.1f} GB, {lost.imbalance:.2%}, {spread(lost)}",
        f"{joined.bytes_of('one more') / 1e9:.1f} GB, {joined.imbalance:.2%}, {spread(joined)}",
    ]
    assert f"| {' | '.join(cells)} |" in page


def test_a_small_model_is_as_even_as_its_units_allow() -> None:
    """32 equal experts on three workers: 11, 11 and 10. No other way comes nearer to the share."""
    shard_map = ShardMap.of(small_model(4, 8), names(3))
    assert sorted(Counter(shard_map.owners.values()).values()) == [10, 11, 11]
    assert shard_map.imbalance == pytest.approx(1 - 10 / (32 / 3))
    assert spread(shard_map) <= 1
    assert ShardMap.of(small_model(4, 8), names(4)).imbalance == 0


def test_a_dense_model_is_dealt_out_by_tensors() -> None:
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": (64, 16) for n in range(24)}
    tensors = tuple(name_tensors(entries(shapes), {"num_hidden_layers": 24}))
    shard_map = ShardMap.of(tensors, names(4))
    assert shard_map.imbalance == 0
    for start in range(0, 24, 4):  # neighbouring layers lie on different workers
        assert len({shard_map.owner(tensor) for tensor in tensors[start : start + 4]}) == 4


def test_a_map_is_plain_data_and_always_the_same() -> None:
    shard_map = ShardMap.of(small_model(3, 8, others=[5, 9]), names(3))
    assert shard_map == ShardMap.of(small_model(3, 8, others=[5, 9]), names(3))
    assert pickle.loads(pickle.dumps(shard_map)) == shard_map


def test_experts_of_one_number_belong_together_in_all_parents() -> None:
    """A parent that stores each expert by itself has the owners that a fused one has."""
    apart = {
        f"model.layers.0.mlp.experts.{expert}.{role}.weight": (4, 16)
        for expert in range(6)
        for role in ("down_proj", "gate_proj", "up_proj")
    }
    shard_map = ShardMap.of(small_model(1, 6), names(2))
    for tensor in name_tensors(entries(apart), {}):
        assert shard_map.owner(tensor) == shard_map.owners[0, tensor.expert or 0]


@pytest.mark.parametrize(
    ("workers", "lead"), [([], None), (["a", "a"], None), (["a", "b"], "c")]
)  # fmt: skip
def test_workers_must_be_there_and_different(workers: list[str], lead: str | None) -> None:
    with pytest.raises(ValueError, match="must be different"):
        ShardMap.of(small_model(1, 2), workers, lead)


def test_what_cannot_change_is_refused() -> None:
    shard_map = ShardMap.of(small_model(1, 2), ["a"])
    for change in (lambda: shard_map.without("a"), lambda: shard_map.without("b")):
        with pytest.raises(ValueError, match="the last one"):
            change()
    with pytest.raises(ValueError, match="there already"):
        shard_map.with_worker("a")
    with pytest.raises(KeyError):
        shard_map.owner(small_model(2, 2)[-1])


models = st.builds(
    small_model,
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([1, 4, 16]),
    st.lists(st.integers(1, 100), max_size=8),
)


def largest_unit(shard_map: ShardMap) -> int:
    units: Counter[object] = Counter()
    for tensor in shard_map.tensors:
        unit = tensor.name if tensor.expert is None else (tensor.layer, tensor.expert)
        units[unit] += 2 * tensor.elements
    return max(units.values())


@settings(max_examples=60, deadline=None)
@given(models, st.integers(1, 6), st.booleans())
def test_no_worker_is_more_than_a_unit_above_its_share(
    tensors: tuple[LogicalTensor, ...], count: int, leads: bool
) -> None:
    shard_map = ShardMap.of(tensors, names(count), "node-0" if leads else None)
    check_complete(shard_map)
    share = size_of(tensors) / count
    most = share * (1 + SLACK) + largest_unit(shard_map)
    others = size_of([tensor for tensor in tensors if tensor.expert is None])
    assert all(shard_map.bytes_of(worker) <= most for worker in shard_map.workers[leads:])
    if leads:
        assert shard_map.bytes_of("node-0") <= max(others, most)


@settings(max_examples=60, deadline=None)
@given(models, st.integers(2, 5), st.lists(st.integers(0, 9), max_size=5), st.booleans())
def test_changes_move_nothing_between_those_that_stay(
    tensors: tuple[LogicalTensor, ...], count: int, changes: list[int], leads: bool
) -> None:
    """Whatever workers are lost and join; and a worker that joins gets no more than it should."""
    shard_map = ShardMap.of(tensors, names(count), "node-0" if leads else None)
    for number, change in enumerate(changes):
        before = shard_map
        if change % 2 and len(before.workers) > 1:
            shard_map = before.without(before.workers[change % len(before.workers)])
        else:
            shard_map = before.with_worker(f"new-{number}")
            share = size_of(tensors) / len(shard_map.workers)
            assert shard_map.bytes_of(f"new-{number}") <= share * (1 + SLACK) + largest_unit(before)
        check_change(before, shard_map)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 7))
def test_equal_experts_are_spread_to_one_in_each_layer(
    layers: int, experts: int, count: int
) -> None:
    shard_map = ShardMap.of(small_model(layers, experts), names(count))
    assert spread(shard_map) <= 1
    totals = Counter(shard_map.owners.values())
    assert max(totals.values()) - min(totals[worker] for worker in shard_map.workers) <= 1
