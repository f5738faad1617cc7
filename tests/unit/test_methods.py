"""The merge methods: each against a plain float64 reference of its formula, all against the promises
that any method makes (`TestConformance` runs on whatever is registered)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint_files import (
    after,
    digests_by_method,
    example_merger,
    example_parameters,
    example_rule,
    inexact_children,
    open_merger,
    read_tensors,
    recipe_for,
    rule,
    run,
    to_float64,
    write_checkpoint,
    write_weights,
)
from tests.families import write_family
from tests.references import CASES, REFERENCES, TOLERANCES, Vectors
from workers.checkpoints import ArchitectureMap, open_checkpoint
from workers.errors import BadInputError
from workers.merging import METHODS, MergeMethod, get_method
from workers.merging import executor as executor_module
from workers.merging import plan as plan_module
from workers.merging.executor import Merger
from workers.merging.sources import Source
from workers.storage.folder import FolderStore

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


MANTISSA_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
"""With the leading one that is not stored."""
SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}


def half_a_unit(values: numpy.ndarray, dtype: torch.dtype) -> numpy.ndarray:
    """Half of the distance between numbers of `dtype` around each value."""
    _, exponent = numpy.frexp(values)
    return numpy.maximum(numpy.ldexp(0.5, exponent - MANTISSA_BITS[dtype]), SMALLEST[dtype] / 2)


def assert_close(
    found: torch.Tensor,
    expected: numpy.ndarray,
    terms: numpy.ndarray,
    operations: int = 12,
    absolute: float = 0.0,
) -> None:
    """Equal but for the one rounding to the child's dtype, those of a few fp32 operations on numbers no
    larger than `terms`, and `absolute`."""
    child = to_float64(found)
    rounding = half_a_unit(numpy.maximum(abs(child), abs(expected)), found.dtype)
    difference = abs(child - expected) - rounding - operations * 2.0**-24 * terms - absolute
    worst = int(difference.argmax()) if difference.size else 0
    assert not (difference > 0).any(), (worst, child[worst], expected[worst], terms[worst])


def logical_vectors(merger: Merger) -> dict[str, Vectors]:
    """Logical name -> parent (and `base`) -> its values."""
    opened = merger.parents | ({"base": merger.base} if merger.base else {})
    vectors: dict[str, Vectors] = {}
    for name, checkpoint in opened.items():
        source = Source(checkpoint)
        for tensor in ArchitectureMap(checkpoint).tensors:
            found = source.read(tensor, 0, tensor.elements)
            vectors.setdefault(tensor.name, {})[name] = to_float64(found)
    return vectors


def check_against_reference(merger: Merger, method: str, seed: int = 5, **given: Any) -> None:
    """Every tensor of a whole model, merged by one rule; a post-step after a sum of task vectors."""
    before = {"weight": 0.75}
    is_post = get_method(method).post
    used = after("task_arithmetic", method, before, given) if is_post else rule(method, **given)
    child = run(merger, used, seed=seed)
    values = get_method(method).resolve(given, tuple(merger.parents), merger.base is not None)
    shapes = {tensor.name: tensor.shape for tensor in merger.plan.father.tensors}
    scale = math.prod(max(1.0, *map(abs, spread(values, key))) for key in ("weight", "lambda"))
    scale *= max(1 / max(density, 0.01) for density in spread(values, "density"))
    vectors_by_name, unchanged = logical_vectors(merger), 0
    for name, vectors in vectors_by_name.items():
        parents = {parent: vectors[parent] for parent in merger.parents}
        base = vectors.get("base", numpy.zeros_like(vectors["a"]))
        own = values | {"shape": shapes[name]}
        if is_post:
            weights = {"weight": dict.fromkeys(parents, before["weight"])}
            own["out"] = REFERENCES["task_arithmetic"](parents, base, weights, (seed, name))
        expected = REFERENCES[method](parents, base, own, (seed, name))
        terms = scale * sum(abs(x) for x in vectors.values())
        assert_close(child[name], expected, terms, absolute=TOLERANCES.get(method, 0.0))
        unchanged += numpy.array_equal(to_float64(child[name]), parents["a"])
    assert method == "passthrough" or unchanged < len(vectors_by_name) / 2


def spread(values: dict[str, Any], key: str) -> list[float]:
    value = values.get(key, 1.0)
    return list(value.values()) if isinstance(value, dict) else [value]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real architectures with random weights: `base`, `a`, `b`, `c` in a folder for each."""
    root = tmp_path_factory.mktemp("families")
    for kind in ("llama", "qwen3_5_moe"):
        for folder, name in zip(
            write_family(root / kind, kind, parents=3), ("base", *"abc"), strict=True
        ):
            folder.rename(root / kind / name)
    return {kind: root / kind for kind in ("llama", "qwen3_5_moe")}


def open_parents(folder: Path, count: int) -> Merger:
    return open_merger({name: folder / name for name in "abc"[:count]}, folder / "base")


@pytest.mark.parametrize("kind", ["llama", "qwen3_5_moe"])
@pytest.mark.parametrize(("method", "parents", "given_values"), CASES)
def test_real_models(
    kind: str, method: str, parents: int, given_values: dict[str, Any], families: dict[str, Path]
) -> None:
    check_against_reference(open_parents(families[kind], parents), method, **given_values)


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Very large and very small values, zeros among them, in each dtype; in fp32 in several chunks."""
    root = tmp_path_factory.mktemp("wide")
    generator = torch.Generator().manual_seed(0)
    for dtype_name, dtype in DTYPES.items():
        for name in ("base", *"abc"):
            tensors = {}
            for size in (1, 37, 270_001 if dtype is torch.float32 else 5000):
                powers = torch.randint(-12, 5, (size,), generator=generator)
                values = torch.randn(size, generator=generator) * torch.exp2(powers.float())
                values[torch.rand(size, generator=generator) < 0.1] = 0.0
                tensors[f"model.layers.0.mlp.t{size}"] = values.to(dtype)
            write_checkpoint(root / dtype_name / name, tensors)
    return {dtype: root / dtype for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "parents", "given_values"), CASES)
def test_wide_values_in_every_dtype(
    dtype: str, method: str, parents: int, given_values: dict[str, Any], wide: dict[str, Path]
) -> None:
    """In fp32 nothing hides behind the rounding of the child."""
    uses_base = get_method(method).uses_base
    if uses_base != "never":
        check_against_reference(open_parents(wide[dtype], parents), method, **given_values)
    if uses_base != "always":
        merger = open_merger({name: wide[dtype] / name for name in "abc"[:parents]})
        check_against_reference(merger, method, **given_values)


def test_every_method_has_a_reference_here() -> None:
    assert set(REFERENCES) == set(METHODS)
    assert {method for method, _, _ in CASES} == set(METHODS)


# Small vectors, worked out by hand


def merged(
    folder: Path,
    method: str,
    parents: list[list[float]],
    base: list[float] | None = None,
    **given: Any,
) -> list[float]:
    """The child of fp32 vectors; parameters given as lists have a number for each parent."""
    for name, vector in [*zip("abc", parents, strict=False), *([("base", base)] if base else [])]:
        write_checkpoint(folder / name, {"model.norm.weight": torch.tensor(vector)})
    names = "abc"[: len(parents)]
    given = {
        key: dict(zip(names, value, strict=True)) if isinstance(value, list) else value
        for key, value in given.items()
    }
    merger = open_merger({name: folder / name for name in names}, folder / "base" if base else None)
    return run(merger, rule(method, **given))["norm.weight"].tolist()


@pytest.mark.parametrize(
    ("one", "two", "weights", "settings_", "expected"),
    [
        # agreeing signs: the weighted mean of both
        ([2.0], [4.0], [1.0, 1.0], {}, [13.0]),
        ([2.0], [4.0], [3.0, 1.0], {}, [12.5]),
        # opposite signs: the heavier side alone, divided by its own weight
        ([2.0], [-4.0], [1.0, 1.0], {}, [6.0]),
        ([2.0], [-4.0], [3.0, 1.0], {}, [12.0]),
        # a draw goes to +
        ([2.0], [-2.0], [1.0, 1.0], {}, [12.0]),
        ([-2.0], [2.0], [1.0, 1.0], {}, [12.0]),
        ([-2.0], [4.0], [2.0, 1.0], {}, [14.0]),
        # a zero agrees with nothing and does not count in the mean
        ([0.0], [4.0], [1.0, 1.0], {}, [14.0]),
        ([0.0], [-4.0], [1.0, 1.0], {}, [6.0]),
        ([0.0], [0.0], [1.0, 1.0], {}, [10.0]),
        # neither does a parent of weight 0
        ([2.0], [-4.0], [1.0, 0.0], {}, [12.0]),
        ([2.0], [-4.0], [0.0, 0.0], {}, [10.0]),
        # sums instead of means, and lambda on top
        ([2.0], [4.0], [3.0, 1.0], {"normalize": 0}, [20.0]),
        ([2.0], [-4.0], [1.0, 1.0], {"normalize": 0, "lambda": 0.5}, [8.0]),
        ([2.0], [4.0], [1.0, 1.0], {"lambda": -1.0}, [7.0]),
        ([2.0], [4.0], [1.0, 1.0], {"lambda": 0.0}, [10.0]),
    ],
)
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_the_sign_election(
    method: str,
    one: list[float],
    two: list[float],
    weights: list[float],
    settings_: dict[str, float],
    expected: list[float],
    tmp_path: Path,
) -> None:
    parents = [[10.0 + one[0]], [10.0 + two[0]]]
    values = {"normalize": 1.0} | settings_
    found = merged(tmp_path, method, parents, [10.0], weight=weights, density=1.0, **values)
    assert found == expected


def test_three_parents_elect_together(tmp_path: Path) -> None:
    """Two small ones outvote a larger one by their sum only."""
    parents = [[3.0, 3.0], [-1.0, -2.0], [-1.0, -2.0]]
    found = merged(tmp_path, "ties", parents, [0.0, 0.0], weight=1.0, density=1.0)
    assert found == [3.0, -2.0]


def test_means_and_sums_have_their_defaults(tmp_path: Path) -> None:
    """TIES averages, DARE adds up, as in their papers."""
    parents, base = [[2.0], [4.0]], [0.0]
    ties = merged(tmp_path / "ties", "ties", parents, base, weight=1.0, density=1.0)
    dare = merged(tmp_path / "dare", "dare_ties", parents, base, weight=1.0, density=1.0)
    assert (ties, dare) == ([3.0], [6.0])


TRIMMED = "model.layers.0.mlp.up_proj.weight"


def trim(folder: Path, change: torch.Tensor, densities: list[float]) -> Iterator[torch.Tensor]:
    """What TIES leaves of one task vector (base 0, weight 1, lambda 1, so the child is just that)."""
    write_checkpoint(folder / "base", {TRIMMED: torch.zeros_like(change)})
    write_checkpoint(folder / "a", {TRIMMED: change})
    merger = open_merger({"a": folder / "a"}, folder / "base")
    for density in densities:
        (child,) = run(merger, rule("ties", weight=1.0, density=density)).values()
        assert torch.equal(child[child != 0], change[child != 0])
        yield child != 0


def bins_of(change: torch.Tensor) -> numpy.ndarray:
    """The resolution of the trimming: sign off, 8 bits of exponent, 8 of mantissa."""
    return change.abs().view(torch.int32).numpy() >> 15


MANY_DENSITIES = [0.001, 0.01, 0.07, 0.1, 0.2, 1 / 3, 0.5, 0.77, 0.9, 0.999]


@pytest.mark.parametrize("spread_", ["normal", "heavy tails", "few values"])
def test_trimming_keeps_the_largest_and_at_most_one_bin_more(spread_: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(200_000, generator=generator)
    if spread_ == "heavy tails":
        change = change**7
    elif spread_ == "few values":
        change = (change * 4).round()
    change[change == 0] = 0.25  # so that it can be told what was dropped
    largest_bin = numpy.bincount(bins_of(change)).max() / change.numel()
    for density, kept in zip(MANY_DENSITIES, trim(tmp_path, change, MANY_DENSITIES), strict=True):
        share = float(kept.double().mean())
        assert density - 1e-5 < share <= density + largest_bin
        dropped = change[~kept].abs().numpy()
        assert change[kept].abs().min() > dropped.max(initial=0.0)  # equal ones stay together
    if spread_ == "normal":
        assert largest_bin < 0.005


def test_trimming_is_the_exact_top_k_where_magnitudes_can_be_told_apart(tmp_path: Path) -> None:
    count = 3000
    generator = torch.Generator().manual_seed(2)
    magnitudes = ((torch.arange(count) + 30_000) << 15).int().view(torch.float32)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    change = (magnitudes * signs)[torch.randperm(count, generator=generator)]
    assert len(set(bins_of(change).tolist())) == count
    for density, kept in zip(MANY_DENSITIES, trim(tmp_path, change, MANY_DENSITIES), strict=True):
        k = math.floor(density * count)
        top = torch.zeros(count, dtype=torch.bool)
        top[change.abs().topk(k).indices] = True
        assert torch.equal(kept, top)


def test_trimming_to_everything_and_to_nothing(tmp_path: Path) -> None:
    change = torch.arange(1.0, 1001.0)
    everything, nothing = trim(tmp_path, change, [1.0, 0.0])
    assert everything.all()
    assert not nothing.any()


def test_trimming_counts_the_zeros_of_the_task_vector(tmp_path: Path) -> None:
    """Density is a share of the tensor, not of what a fine-tune has touched."""
    change = torch.zeros(1000)
    change[:100] = torch.arange(1, 101).float()
    half, tenth, twentieth = trim(tmp_path, change, [0.5, 0.1, 0.05])
    assert half.sum() == tenth.sum() == 100
    assert twentieth.sum() == 50


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([1.0, 2.0, -3.0], [2.0, 4.0, -6.0]),  # parallel
        ([1.0, 2.0, -3.0], [1.0, 2.0, -3.0]),  # equal
        ([1.0, 2.0, -3.0], [-1.0, -2.0, 3.0]),  # antiparallel
        ([1.0, 2.0, -3.0], [-2.0, -4.0, 6.001]),
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([1e-30, 2e-30, 0.0], [2e-30, 4e-30, 0.0]),
    ],
)
def test_slerp_is_a_line_where_there_is_no_arc(
    one: list[float], two: list[float], tmp_path: Path
) -> None:
    expected = [0.75 * x + 0.25 * y for x, y in zip(one, two, strict=True)]
    assert merged(tmp_path, "slerp", [one, two], t=0.25) == pytest.approx(expected, rel=1e-6, abs=0)


def test_slerp_follows_the_arc(tmp_path: Path) -> None:
    """Between unit vectors at right angles: cos and sin, of length 1 all along."""
    for number, t in enumerate([0.0, 0.1, 0.5, 0.9, 1.0]):
        angle = t * math.pi / 2
        found = merged(tmp_path / str(number), "slerp", [[1.0, 0.0], [0.0, 1.0]], t=t)
        assert found == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-7)


def test_slerp_of_an_obtuse_angle(tmp_path: Path) -> None:
    """At 120 degrees the middle is the bisector, as long as the two."""
    two = [math.cos(2 * math.pi / 3), math.sin(2 * math.pi / 3)]
    found = merged(tmp_path, "slerp", [[1.0, 0.0], two], t=0.5)
    assert found == pytest.approx([math.cos(math.pi / 3), math.sin(math.pi / 3)], abs=1e-7)


def test_slerp_ends_at_its_parents(wide: dict[str, Path]) -> None:
    merger = open_merger({name: wide["F32"] / name for name in "ab"})
    vectors = logical_vectors(merger)
    for t, parent in ((0.0, "a"), (1.0, "b")):
        for name, child in run(merger, rule("slerp", t=t)).items():
            assert numpy.array_equal(to_float64(child), vectors[name][parent])


# What every method promises

CONFIG = {"model_type": "qwen3_5_moe", "num_hidden_layers": 1}
LARGE = "model.layers.0.mlp.shared_expert.up_proj.weight"


def family_tensors(seed: int) -> dict[str, torch.Tensor]:
    """A tensor of several chunks, fused experts, one element, and none."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.1).bfloat16()

    return {
        LARGE: random(151, 1000),
        "model.layers.0.mlp.experts.gate_up_proj": random(3, 16, 24),
        "model.layers.0.mlp.experts.down_proj": random(3, 24, 8),
        "model.norm.weight": random(24),
        "lm_head.weight": random(1)[0],
        "model.embed_tokens.weight": random(0, 24),
    }


def expert_by_expert(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The same model in three shards, its experts one by one and its names with another prefix."""
    single: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        name = name.replace("model.", "model.language_model.")
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(tensor.unflatten(1, (2, 8))):
                stem = name.replace("gate_up_proj", f"{expert}")
                single |= {
                    f"{stem}.gate_proj.weight": gate.clone(),
                    f"{stem}.up_proj.weight": up.clone(),
                }
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                single[name.replace("down_proj", f"{expert}.down_proj.weight")] = down.clone()
        else:
            single[name] = tensor
    names = list(single)
    return [{name: single[name] for name in names[start::3]} for start in range(3)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `a`, `b`, `c`: one file each, experts fused."""
    root = tmp_path_factory.mktemp("family")
    for seed, name in enumerate(("base", *"abc")):
        write_checkpoint(root / name, family_tensors(seed), config=CONFIG)
    return root


@pytest.fixture(scope="module")
def unfused_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unfused")
    for seed, name in enumerate(("base", *"abc")):
        write_checkpoint(root / name, *expert_by_expert(family_tensors(seed)), config=CONFIG)
    return root


@pytest.fixture(scope="class")
def small_chunks() -> Iterator[None]:
    """So that a tensor of a few chunks is small. They are still large enough for torch to give each to
    several threads."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (plan_module, executor_module):
            patch.setattr(module, "CHUNK_ELEMENTS", 1 << 16)
        yield


@pytest.fixture(scope="class")
def expected(family: Path, small_chunks: None) -> dict[str, dict[str, torch.Tensor]]:
    """Method -> the child's values, with one thread."""
    children = {}
    for name, method in METHODS.items():
        merger = example_merger(method, family)
        children[name] = run(merger, example_rule(method, merger), seed=3)
    return children


def assert_same_values(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert torch.equal(values.view(torch.int16), two[name].view(torch.int16)), name


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
class TestConformance:
    def test_threads_change_nothing(
        self, method: MergeMethod, family: Path, expected: dict[str, Any], torch_threads: None
    ) -> None:
        """Neither the executor's nor those that torch takes for one operation."""
        for threads, inner in ((5, 1), (1, 2), (3, 7)):
            torch.set_num_threads(inner)
            merger = example_merger(method, family)
            child = run(merger, example_rule(method, merger), seed=3, threads=threads)
            assert_same_values(child, expected[method.name])

    def test_units_change_nothing(
        self,
        method: MergeMethod,
        family: Path,
        expected: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(plan_module, "UNIT_BYTES", 1 << 18)
        merger = example_merger(method, family)
        tensor = merger.plan.father.by_name[LARGE.removeprefix("model.")]
        units = merger.start(recipe_for(merger, example_rule(method, merger))).units(tensor)
        assert (len(list(units)) > 1) == (method.grain != "matrix")
        child = run(merger, example_rule(method, merger), seed=3, threads=2)
        assert_same_values(child, expected[method.name])

    def test_chunks_change_nothing(
        self,
        method: MergeMethod,
        family: Path,
        expected: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Statistics lie on a fixed grid, for the order of a sum counts; the elementwise pass does not."""
        merger = example_merger(method, family)
        run(merger, example_rule(method, merger))  # takes the statistics
        for elements in (5000, 40_003):
            monkeypatch.setattr(executor_module, "CHUNK_ELEMENTS", elements)
            child = run(merger, example_rule(method, merger), seed=3)
            assert_same_values(child, expected[method.name])

    def test_layouts_change_nothing(
        self, method: MergeMethod, family: Path, unfused_family: Path, expected: dict[str, Any]
    ) -> None:
        """Fused or expert by expert, one file or several: whoever stores it how."""
        for father, others in ((family, unfused_family), (unfused_family, family)):
            merger = example_merger(method, others)
            folders = {name: others / name for name in merger.parents} | {"a": father / "a"}
            merger = open_merger(folders, others / "base" if method.uses_base != "never" else None)
            child = run(merger, example_rule(method, merger), seed=3)
            assert_same_values(child, expected[method.name])

    def test_a_live_model_gets_the_values_of_the_child(
        self, method: MergeMethod, family: Path, expected: dict[str, Any]
    ) -> None:
        """In a model that computes in fp32 too: the weights are those that the child is stored with."""
        merger = example_merger(method, family)
        views = {t.name: torch.full((t.elements,), torch.nan) for t in merger.plan.father.tensors}
        merger.realize(recipe_for(merger, example_rule(method, merger), seed=3), views)
        for name, values in expected[method.name].items():
            assert torch.equal(views[name], values.float()), name

    def test_a_second_recipe_does_not_remember_the_first(
        self, method: MergeMethod, family: Path, expected: dict[str, Any]
    ) -> None:
        merger = example_merger(method, family)
        example = example_rule(method, merger)
        other = {name: spoil(value) for name, value in example.parameters.items()}
        run(merger, replace(example, parameters=other), seed=4)
        child = run(merger, example_rule(method, merger), seed=3)
        assert_same_values(child, expected[method.name])

    def test_something_is_merged(self, method: MergeMethod, expected: dict[str, Any]) -> None:
        """Lest the promises here be kept by a method that does nothing."""
        father = family_tensors(1)[LARGE].reshape(-1)
        child = expected[method.name][LARGE.removeprefix("model.")]
        assert (child != father).float().mean() > (0.5 if method.name != "arcee_fusion" else 0.02)

    def test_equal_parents_give_that_parent(self, method: MergeMethod, family: Path) -> None:
        names = list(example_merger(method, family).parents)
        merger = open_merger(dict.fromkeys(names, family / "b"), family / "b")
        child = run(merger, example_rule(method, merger))
        for name, values in logical_vectors(merger).items():
            assert numpy.array_equal(to_float64(child[name]), values["a"]), name

    @pytest.mark.parametrize("value", [math.nan, -math.inf])
    def test_what_is_not_finite_is_not_merged_away(
        self, method: MergeMethod, value: float, family: Path, tmp_path: Path
    ) -> None:
        """A damaged parent is found out, and there is no child of it."""
        merger = example_merger(method, family)
        folders = {name: family / name for name in merger.parents}
        damaged = family_tensors(7)
        damaged["model.norm.weight"][5] = value
        folders[list(folders)[-1]] = write_checkpoint(tmp_path / "damaged", damaged, config=CONFIG)
        merger = open_merger(folders, family / "base" if method.uses_base != "never" else None)
        recipe = recipe_for(merger, example_rule(method, merger))
        with pytest.raises(BadInputError, match=r"'norm\.weight'.* has 1 elements"):
            write_weights(merger, recipe, FolderStore(tmp_path / "child"), 1)
        with pytest.raises(BadInputError):
            open_checkpoint(str(tmp_path / "child"))

    def test_a_base_is_asked_for(self, method: MergeMethod, family: Path) -> None:
        names = tuple(example_merger(method, family).parents)
        values = example_parameters(method, names)
        assert method.resolve(values, names, True).keys() == {p.name for p in method.parameters}
        if method.uses_base == "always":
            with pytest.raises(BadInputError, match=f"{method.name} .*base"):
                method.resolve(values, names, False)
            merger = open_merger({name: family / name for name in names})
            with pytest.raises(BadInputError, match=r"method \w+ merges differences to a base"):
                run(merger, example_rule(method, merger))

    def test_parents_are_counted(self, method: MergeMethod) -> None:
        least, most = method.parents
        wrong = [least - 1] + ([most + 1] if most is not None else [])
        for count in wrong:
            with pytest.raises(BadInputError, match=f"{method.name} merges .* {count}"):
                method.check_inputs(tuple("abcdefghij"[:count]), True)

    def test_an_unknown_parameter_is_refused(self, method: MergeMethod) -> None:
        names = tuple("abc"[: method.parents[1] or 3])
        values = example_parameters(method, names) | {"wieght": 1.0}
        with pytest.raises(BadInputError, match=f"{method.name}.*'wieght'"):
            method.resolve(values, names, True)

    def test_every_parameter_is_checked(self, method: MergeMethod) -> None:
        """Missing, out of bounds, not a number, for a parent that is none: refused by name."""
        names = tuple("abc"[: method.parents[1] or 3])
        values = example_parameters(method, names)
        for parameter in method.parameters:
            wrong: list[Any] = ["nobody", ["a"], {"nobody": 0.5}]
            if parameter.scope != "flag":
                wrong.append(True)
            if parameter.scope in ("flag", "choice"):
                wrong += [0.5, -1, math.nan]
            elif parameter.scope != "parent_name":
                wrong += [math.nan, math.inf, -math.inf, 10**400, "0.5"]
                wrong += [parameter.low - 1e-9, parameter.high + 1e-9]
            if parameter.scope == "per_parent":
                good = 0.5 * (max(parameter.low, 0) + min(parameter.high, 1))
                per_parent = dict.fromkeys(names, good)
                wrong += [per_parent | {"nobody": good}, per_parent | {names[-1]: "x"}]
                if parameter.default is None:
                    wrong += [dict.fromkeys(names[1:], good), per_parent | {names[0]: None}]
            if parameter.default is None:
                wrong.append(None)
            for value in wrong:
                with pytest.raises(
                    BadInputError, match=f"{method.name}: parameter '{parameter.name}'"
                ):
                    method.resolve(values | {parameter.name: value}, names, True)
            if parameter.default is None:
                less = {name: value for name, value in values.items() if name != parameter.name}
                with pytest.raises(BadInputError, match=f"'{parameter.name}'"):
                    method.resolve(less, names, True)

    def test_bounds_are_allowed(self, method: MergeMethod) -> None:
        names = tuple("abc"[: method.parents[1] or 3])
        values = example_parameters(method, names)
        for parameter in method.parameters:
            for bound in (parameter.low, parameter.high):
                if math.isfinite(bound) and parameter.scope in ("shared", "per_parent"):
                    resolved = method.resolve(values | {parameter.name: bound}, names, True)
                    assert set(spread(resolved, parameter.name)) == {bound}


def spoil(value: Any) -> Any:
    """Another valid value of a parameter."""
    if isinstance(value, dict):
        return {name: spoil(number) for name, number in value.items()}
    return "a" if isinstance(value, str) else value * 0.75


PLAIN_PROCESSOR = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
"""torch and its BLAS pick their loops by what the processor offers. With the plainest, without fused
multiply-add, it stands for another machine."""


def on_a_plain_processor(program: str, *arguments: Path) -> str:
    """What a program prints that has the names of `tests.checkpoint_files`."""
    return subprocess.run(
        [sys.executable, "-c", f"from tests.checkpoint_files import *; {program}", *arguments],
        env=os.environ | PLAIN_PROCESSOR | {"PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout


def test_the_kind_of_processor_changes_nothing(family: Path) -> None:
    program = "import sys; print(json.dumps(digests_by_method(Path(sys.argv[1]))))"
    assert json.loads(on_a_plain_processor(program, family)) == digests_by_method(family)


def test_another_processor_changes_next_to_nothing_where_bits_are_not_promised(
    family: Path, tmp_path: Path
) -> None:
    """One in a thousand of the child's elements may be rounded the other way."""
    program = (
        "import sys; source, target = map(Path, sys.argv[1:]);"
        "safetensors.torch.save_file(inexact_children(source), target)"
    )
    on_a_plain_processor(program, family, tmp_path / "other.safetensors")
    other = read_tensors(tmp_path)
    for name, values in inexact_children(family).items():
        one, two = to_float64(values), to_float64(other[name])
        unit = 2 * half_a_unit(numpy.maximum(abs(one), abs(two)), values.dtype)
        assert (abs(one - two) <= unit).all(), name
        assert (one != two).sum() <= 0.001 * len(one) + 1, name


@given(st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_number_for_all_is_that_number_for_each(weight: float, density: float) -> None:
    method = get_method("ties")
    once = method.resolve({"weight": weight, "density": density}, ("a", "b"), True)
    each = {"weight": {"a": weight, "b": weight}, "density": {"a": density, "b": density}}
    assert once == method.resolve(each, ("a", "b"), True)
    assert once == each | {"lambda": 1.0, "normalize": 1.0, "rescale": "none"}


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadInputError, match=r"'lerp' is none of .*linear.*slerp"):
        get_method("lerp")
