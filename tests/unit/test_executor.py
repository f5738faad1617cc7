"""The executor: counts of what changed, rounding to the father's dtype, and failures half way."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from tests.checkpoint_files import (
    RemoteStore,
    assert_same_bits,
    merge,
    open_merger,
    read_tensors,
    recipe_for,
    rule,
    run,
    tensor_bytes,
    to_float64,
    write_checkpoint,
    write_weights,
)
from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor, open_checkpoint
from workers.errors import BadInputError
from workers.merging import METHODS, MergeMethod, Rule, Selector
from workers.merging import executor as executor_module
from workers.merging import parts as parts_module
from workers.merging import plan as plan_module
from workers.merging.executor import Merger
from workers.merging.methods import Slice
from workers.merging.plan import CHUNK_ELEMENTS, UNIT_BYTES, Plan
from workers.merging.sources import TORCH_DTYPES
from workers.storage.folder import FolderStore

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
NORM, HEAD, VISION = "model.norm.weight", "lm_head.weight", "model.visual.proj.weight"
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
CONFIG = {"model_type": "qwen3_5_moe", "num_hidden_layers": 2}
SHAPES = {
    UP: (20, 30),
    DOWN: (30, 20),
    NORM: (20,),
    HEAD: (7, 20),
    VISION: (5,),
    EXPERTS: (2, 6, 20),
}


def write_parent(folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }
    return write_checkpoint(folder, tensors, config=CONFIG)


@pytest.fixture
def parents(tmp_path: Path) -> dict[str, Path]:
    """Father, mother and donor; the mother has some of the father's values and no vision tower."""
    father = write_parent(tmp_path / "a", 1)
    mother = read_tensors(write_parent(tmp_path / "b0", 2))
    same = torch.arange(20 * 30).reshape(20, 30) % 3 == 0
    mother[UP][same] = read_tensors(father)[UP][same]
    del mother[VISION]
    write_checkpoint(tmp_path / "b", mother, config=CONFIG)
    return {"a": father, "b": tmp_path / "b", "c": write_parent(tmp_path / "c", 3)}


TRUNK = Selector(components=("mlp", "norm"))


def report_of(parents: dict[str, Path], *rules: Rule, **arguments: Any) -> dict[str, Any]:
    merger = open_merger(parents)
    with TemporaryDirectory() as folder:
        recipe = recipe_for(merger, *rules)
        reports = write_weights(merger, recipe, FolderStore(folder), **arguments).tensors
    assert [report["name"] for report in reports] == [t.name for t in merger.plan.father.tensors]
    return {report["name"]: SimpleNamespace(**report) for report in reports}


@pytest.mark.parametrize("threads", [1, 3])
def test_changes_are_counted_element_by_element(
    parents: dict[str, Path], tmp_path: Path, threads: int
) -> None:
    rules = (
        rule("linear", TRUNK, weight={"a": 0.0, "b": 0.5, "c": 0.5}),
        rule("passthrough", Selector(components=("lm_head", "expert")), source="c"),
    )
    child = merge(tmp_path / "child", parents, rules)
    stored = {name: read_tensors(folder) for name, folder in parents.items()}
    found = report_of(parents, *rules, threads=threads)
    for name in (UP, DOWN, NORM, HEAD, VISION):
        report = found[name.removeprefix("model.")]
        assert report.elements == child[name].numel()
        assert report.not_finite == 0
        assert report.changed == {
            parent: int((to_float64(child[name]) != to_float64(tensors[name])).sum())
            for parent, tensors in stored.items()
            if name in tensors
        }
    assert 0 < found["layers.0.mlp.up_proj.weight"].changed["a"] <= 600
    assert found["lm_head.weight"].changed["c"] == 0
    assert found["visual.proj.weight"].changed == {"a": 0, "c": 5}


def test_the_report_says_how_each_tensor_was_merged(parents: dict[str, Path]) -> None:
    rules = (
        rule("linear", TRUNK, weight=0.5),
        rule("passthrough", Selector(components=("expert",)), source="b"),
    )
    found = report_of(parents, *rules)
    up, expert = (
        found["layers.0.mlp.up_proj.weight"],
        found["layers.1.mlp.experts.1.up_proj.weight"],
    )
    weights = {"weight": {"a": 0.5, "b": 0.5, "c": 0.5}, "normalize": 1.0}
    assert (up.component, up.layer, up.method, up.parameters) == ("mlp", 0, "linear", weights)
    assert (expert.component, expert.layer, expert.method) == ("expert", 1, "passthrough")
    assert expert.parameters == {"source": "b", "scale": 1.0}
    assert expert.elements == 60
    assert (found["lm_head.weight"].method, found["lm_head.weight"].parameters) == (
        "passthrough",
        {"source": "a", "scale": 1.0},
    )


def test_counts_add_up_over_units(
    parents: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = report_of(parents, rule("linear", TRUNK, weight=0.5))
    monkeypatch.setattr(plan_module, "CHUNK_ELEMENTS", 64)
    monkeypatch.setattr(plan_module, "UNIT_BYTES", 128)
    plan = open_merger(parents).plan
    units = [unit for tensor in plan.child.tensors for unit in plan.units(tensor, "element")]
    assert max(unit.count for unit in units) == 64
    monkeypatch.setattr(parts_module, "PART_BYTES", 300)
    assert report_of(parents, rule("linear", TRUNK, weight=0.5), threads=2) == whole


def test_a_child_in_lower_precision_is_compared_after_rounding(tmp_path: Path) -> None:
    """Else every element of an fp32 mother would count as changed in a bf16 child that is she."""
    parents = {
        "a": write_parent(tmp_path / "a", 1),
        "b": write_parent(tmp_path / "b", 2, torch.float32),
    }
    found = report_of(parents, rule("passthrough", source="b"))
    assert all(report.changed["b"] == 0 for report in found.values())
    assert found["layers.0.mlp.up_proj.weight"].changed["a"] > 550


@pytest.mark.parametrize(
    ("dtype", "values", "broken"),
    [
        (torch.float32, [1.0, torch.nan, torch.inf, -torch.inf], 3),
        (torch.float16, [65504.0, torch.inf, 0.0, -0.0], 1),
        (torch.float64, [1e300, -1e300, 1e-300, torch.nan], 1),
        (torch.float8_e4m3fn, [1.0, torch.nan, 448.0, 0.0], 1),
        (torch.float8_e5m2, [1.0, torch.inf, torch.nan, 0.0], 2),
        (torch.int64, [1.0, 2.0, 3.0, 4.0], 0),
        (torch.bool, [1.0, 0.0, 1.0, 1.0], 0),
    ],
)
def test_what_is_not_finite_is_counted(
    tmp_path: Path, dtype: torch.dtype, values: list[float], broken: int
) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    folder = write_checkpoint(tmp_path / "a", {NORM: tensor})
    (report,) = report_of({"a": folder}).values()
    assert report.not_finite == broken


def nearest_even(values: numpy.ndarray, mantissa_bits: int, least_exponent: int) -> numpy.ndarray:
    """The nearest numbers with so many bits; of two that are as near, the one whose last bit is 0."""
    _, exponents = numpy.frexp(values)
    units = numpy.ldexp(1.0, numpy.maximum(exponents - mantissa_bits, least_exponent))
    return numpy.rint(values / units) * units


FORMATS = {torch.float16: (11, -24), torch.bfloat16: (8, -133), torch.float32: (24, -149)}


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_is_to_the_nearest_even(dtype: torch.dtype, tmp_path: Path) -> None:
    """An fp32 mother into a father of another dtype; most values lie right between two numbers of it."""
    generator = torch.Generator().manual_seed(4)
    bits, least = FORMATS[dtype]
    steps = torch.randint(-(2 ** (bits + 2)), 2 ** (bits + 2), (4000,), generator=generator)
    powers = torch.randint(least + 4, least + 20, (4000,), generator=generator)
    mother = torch.ldexp(steps.double() / 4, powers.double()).float()
    mother[:2] = torch.tensor([0.0, -0.0])
    parents = {
        "a": write_checkpoint(tmp_path / "a", {NORM: torch.ones(4000, dtype=dtype)}),
        "b": write_checkpoint(tmp_path / "b", {NORM: mother}),
    }
    expected = nearest_even(mother.double().numpy(), bits, least)
    for number, way in enumerate(
        (rule("passthrough", source="b"), rule("linear", weight={"a": 0.0, "b": 1.0}))
    ):
        child = merge(tmp_path / f"child{number}", parents, [way])[NORM]
        assert child.dtype == dtype
        assert numpy.array_equal(to_float64(child), expected)


@pytest.mark.parametrize("father", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parents_of_different_dtypes_meet_in_fp32(father: torch.dtype, tmp_path: Path) -> None:
    parents = {
        "a": write_parent(tmp_path / "a", 1, father),
        "b": write_parent(tmp_path / "b", 2, torch.float32),
        "c": write_parent(tmp_path / "c", 3, torch.float16),
    }
    child = merge(tmp_path / "child", parents, [rule("linear", weight=1.0)])
    stored = [read_tensors(folder) for folder in parents.values()]
    for name, tensor in child.items():
        one, two, three = (tensors[name].float().numpy() for tensors in stored)
        third = numpy.float32(1 / 3)
        expected = (one * third + two * third) + three * third  # fp32 all through
        assert expected.dtype == numpy.float32
        assert tensor.dtype == father
        assert torch.equal(tensor, torch.from_numpy(expected).to(father)), name


def test_copies_keep_bits_that_fp32_has_not(tmp_path: Path) -> None:
    """float64 and NaN payloads go through unread."""
    exact = torch.tensor([1 + 2.0**-50, 1e300, 2.0**-1074], dtype=torch.float64)
    payloads = torch.tensor([0x7F81, 0xFFC3, 0x8000], dtype=torch.uint16).view(torch.bfloat16)
    for number, tensor in enumerate((exact, payloads)):
        folder = write_checkpoint(tmp_path / str(number), {NORM: tensor})
        child = run(open_merger({"a": folder}))
        assert tensor_bytes(child["norm.weight"]) == tensor_bytes(tensor)


def test_single_elements_and_none_at_all(tmp_path: Path) -> None:
    def write(name: str, value: float) -> Path:
        tensors = {
            UP: torch.full((), value),
            DOWN: torch.empty(0, 3),
            NORM: torch.full((1, 1, 1), value),
            "model.layers.0.mlp.experts.gate_up_proj": torch.empty(0, 4, 2),
            "model.layers.1.mlp.experts.gate_up_proj": torch.empty(2, 0, 2),
        }
        return write_checkpoint(tmp_path / name, tensors, config=CONFIG)

    parents, base = {"a": write("a", 1.0), "b": write("b", 2.0)}, write("base", 0.0)
    ways = [
        (rule("linear", weight=0.5), 1.5),
        (rule("slerp", t=0.5), 1.5),
        (rule("task_arithmetic", weight=1.0), 3.0),
        (rule("ties", weight=1.0, density=0.5), 1.5),
        (rule("dare_ties", weight=1.0, density=1.0), 3.0),
        (rule("passthrough", source="b"), 2.0),
    ]
    for way, value in ways:
        child = merge(tmp_path / way.method, parents, [way], base)
        expected = {name: torch.full_like(t, value) for name, t in read_tensors(base).items()}
        assert_same_bits(child, expected)


def test_hashes_are_those_of_the_files(parents: dict[str, Path], tmp_path: Path) -> None:
    merger = open_merger(parents)
    recipe = recipe_for(merger, rule("linear", TRUNK, weight=0.5))
    report = write_weights(merger, recipe, FolderStore(tmp_path / "child"), 2)
    files = {file.name: file.read_bytes() for file in (tmp_path / "child").glob("*.safetensors")}
    assert report.files == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_a_live_model_takes_what_it_has(parents: dict[str, Path]) -> None:
    """And nothing else is merged for it."""
    merger = open_merger(parents)
    view = torch.zeros(600)
    recipe = recipe_for(merger, rule("linear", TRUNK, weight=1.0))
    merger.realize(recipe, {"layers.0.mlp.up_proj.weight": view})
    whole = run(merger, rule("linear", TRUNK, weight=1.0))
    assert torch.equal(view, whole["layers.0.mlp.up_proj.weight"].float())


# Units


def test_units_cover_every_tensor_in_order(
    parents: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "CHUNK_ELEMENTS", 32)
    monkeypatch.setattr(plan_module, "UNIT_BYTES", 200)
    father = ArchitectureMap(open_checkpoint(str(parents["a"])))
    plan = Plan({"a": father}, None)
    units = [unit for tensor in father.tensors for unit in plan.units(tensor, "element")]
    for tensor in father.tensors:
        position = 0
        while position < tensor.elements:
            unit = units.pop(0)
            assert (unit.tensor, unit.first) == (tensor, position)
            assert unit.count * 2 <= 200
            position += unit.count
            assert position == tensor.elements or position % 32 == 0  # on the grid of the chunks
        assert position == tensor.elements
    assert units == []


@pytest.mark.parametrize("grain", ["element", "row"])
@pytest.mark.parametrize(("dtype", "size"), [("BF16", 2), ("F32", 4), ("F64", 8), ("U8", 1)])
def test_no_unit_is_larger_than_its_limit(
    parents: dict[str, Path], dtype: str, size: int, grain: Any
) -> None:
    shape = (512 * 2048, 4095)
    tensor = LogicalTensor("t", "mlp", 0, None, shape, dtype, "t", 0)
    plan = Plan({"a": ArchitectureMap(open_checkpoint(str(parents["a"])))}, None)
    units = list(plan.units(tensor, grain))
    assert sum(unit.count for unit in units) == 512 * 2048 * 4095
    assert all(UNIT_BYTES * 0.99 < unit.count * size <= UNIT_BYTES for unit in units[:-1])
    step = CHUNK_ELEMENTS if grain == "element" else 4095
    assert all(unit.first % step == 0 for unit in units)


# Failures


class BreakError(Exception):
    """What goes wrong in the middle."""


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> MergeMethod:
    """A method that fails at the fourth tensor it sees."""
    calls: list[int] = []

    def merge_or_fail(piece: Slice, values: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise BreakError
        piece.out.zero_()

    method = MergeMethod("fragile", "fails", (), merge_or_fail)
    monkeypatch.setitem(METHODS, "fragile", method)
    return method


@pytest.mark.parametrize("threads", [1, 3])
def test_a_merge_that_fails_leaves_no_checkpoint(
    fragile: MergeMethod, parents: dict[str, Path], tmp_path: Path, threads: int
) -> None:
    merger = open_merger({"a": parents["a"], "c": parents["c"]})
    recipe = recipe_for(merger, rule(fragile.name))
    with pytest.raises(BreakError):
        write_weights(merger, recipe, FolderStore(tmp_path / "child"), threads)
    assert list((tmp_path / "child").glob("*.safetensors")) == []
    with pytest.raises(BadInputError):
        open_checkpoint(str(tmp_path / "child"))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_merger_works_on_after_a_failure(
    fragile: MergeMethod, parents: dict[str, Path], threads: int
) -> None:
    merger = open_merger({"a": parents["a"], "c": parents["c"]})
    with pytest.raises(BreakError):
        run(merger, rule(fragile.name), threads=threads)
    after = run(merger, rule("linear", weight=0.5), threads=threads)
    fresh = open_merger({"a": parents["a"], "c": parents["c"]})
    assert_same_bits(after, run(fresh, rule("linear", weight=0.5)))


def test_a_rule_that_cannot_work_is_refused_before_anything_is_written(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    """Here the last tensor of the father is of a dtype that cannot be averaged."""
    quantized = read_tensors(parents["a"])
    quantized[VISION] = quantized[VISION].to(torch.float8_e4m3fn)
    folder = write_checkpoint(tmp_path / "q", quantized, config=CONFIG)
    merger = open_merger({"a": folder, "c": parents["c"]})
    with pytest.raises(BadInputError, match=f"{folder}.*{VISION}"):
        write_weights(
            merger,
            recipe_for(merger, rule("linear", weight=0.5)),
            FolderStore(tmp_path / "child"),
            1,
        )
    assert not (tmp_path / "child").exists()


class CountingStore(RemoteStore):
    """Counts the bytes that are read from it."""

    count = 0

    def read_into(
        self, key: str, start: int, buffer: memoryview, version: str | None = None
    ) -> None:
        self.count += len(buffer)
        super().read_into(key, start, buffer, version)


def test_statistics_are_taken_once(parents: dict[str, Path]) -> None:
    """They do not depend on parameters, so a search pays for them with its first candidate only."""
    stores = {name: CountingStore(parents[name]) for name in "ac"}
    opened = {
        name: replace(open_checkpoint(str(parents[name])), store=stores[name]) for name in "ac"
    }
    merger = Merger(opened, open_checkpoint(str(parents["c"])), keep_statistics=True)
    assert merger.references  # fingerprints are read once, too
    size, counts = opened["a"].total_bytes, []
    for way in (
        rule("ties", weight=1.0, density=0.5),
        rule("ties", weight=0.7, density={"a": 0.1, "c": 0.9}),
    ):
        before = stores["a"].count
        run(merger, way)
        counts.append(stores["a"].count - before)
    assert counts == [2 * size, size]


@pytest.mark.parametrize("method", ["linear", "ties", "passthrough"])
def test_remote_parents_are_read_in_large_pieces_and_once(
    method: str, parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request of its own for each cache-sized chunk would wait for the store most of the time."""
    monkeypatch.setattr(executor_module, "CHUNK_ELEMENTS", 50)
    monkeypatch.setattr(executor_module, "STATISTIC_CHUNK_ELEMENTS", 50)
    reads: list[tuple[str, int, int]] = []

    class CountingStore(RemoteStore):
        def read_into(self, key: str, start: int, buffer: Any, version: Any = None) -> None:
            reads.append((self.uri + key, start, buffer.nbytes))
            super().read_into(key, start, buffer, version)

    def opened(name: str) -> Checkpoint:
        folder = parents[name]
        return replace(open_checkpoint(str(folder)), store=CountingStore(folder))

    merger = Merger({"a": opened("a"), "b": opened("b")}, opened("c"))
    given = {
        "linear": {"weight": 0.5},
        "ties": {"weight": 0.5, "density": 0.5},
        "passthrough": {"source": "b"},
    }[method]
    where = Selector(names=(UP.removeprefix("model."),))
    recipe = recipe_for(merger, rule(method, where, **given))
    (up,) = (t for t in merger.plan.child.tensors if where.matches(t))
    reads.clear()
    values = torch.empty(up.elements, dtype=TORCH_DTYPES[up.dtype])
    merger.realize(recipe, {up.name: values})
    scans = 2 if method == "ties" else 1
    inputs = {"linear": 2, "ties": 3, "passthrough": 1}[method]
    assert len(reads) == len(set(reads)) * scans == inputs * scans
