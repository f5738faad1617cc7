"""Methods on spheres and with angles: small cases worked out by hand, and what their papers promise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.checkpoint_files import open_merger, recipe_for, rule, run, write_checkpoint
from workers.errors import BadInputError
from workers.merging.methods import Slice
from workers.merging.methods.gram import (
    GramMatrix,
    parents_gram,
    row_products,
    symmetric,
    task_vectors_gram,
)

MATRIX = "model.layers.0.mlp.up_proj.weight"


def merged(
    folder: Path, method: str, parents: Sequence[Any], base: Any = None, **given: Any
) -> numpy.ndarray:
    """The child of fp32 tensors; parameters given as lists have a number for each parent."""
    names = "abcd"[: len(parents)]
    for name, values in [*zip(names, parents, strict=True), *([("base", base)] if base else [])]:
        write_checkpoint(folder / name, {MATRIX: torch.tensor(values, dtype=torch.float32)})
    given = {
        key: dict(zip(names, value, strict=True)) if isinstance(value, list) else value
        for key, value in given.items()
    }
    merger = open_merger({name: folder / name for name in names}, folder / "base" if base else None)
    (child,) = run(merger, rule(method, **given)).values()
    return child.double().numpy().reshape(numpy.shape(parents[0]))


def close(expected: Any, tolerance: float = 2e-7) -> Any:
    return pytest.approx(numpy.array(expected), abs=tolerance)


# Gram matrices


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def piece(vectors: Sequence[torch.Tensor], base: torch.Tensor | None = None) -> Slice:
    """What a statistic is given."""
    nothing: Any = None
    parents = {str(number): vector.clone() for number, vector in enumerate(vectors)}
    return Slice(parents, base, torch.empty(0), None, nothing, nothing, False)


def exact_products(vectors: Sequence[torch.Tensor]) -> list[list[float]]:
    return [
        [math.fsum((one.double() * two.double()).tolist()) for two in vectors] for one in vectors
    ]


@pytest.mark.parametrize("sizes", [[1], [7, 0], [262_144, 262_144, 13], [100_003]])
def test_products_are_exact_sums_but_for_their_last_bits(sizes: list[int]) -> None:
    """In slices, and in stretches of them that are put together in the end."""
    generator = torch.Generator().manual_seed(3)
    slices = [[torch.randn(size, generator=generator) for _ in range(3)] for size in sizes]
    gram, others = parents_gram({}), [parents_gram({}) for _ in slices[1:]]
    for part, vectors in zip([gram, *others], slices, strict=True):
        part.update(piece(vectors))
    for other in others:
        gram.merge(other)
    whole = [torch.cat(parts) for parts in zip(*slices, strict=True)]
    scale = max(map(max, exact_products([vector.abs() for vector in whole])))
    assert numpy.array(gram.finish()) == close(exact_products(whole), 1e-15 * scale)


def test_products_are_the_same_bits_with_any_threads(torch_threads: None) -> None:
    """Rounded sums in another order would reach a child now and then."""
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(262_144 + 13, generator=generator) for _ in range(3)]
    found = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        gram = parents_gram({})
        gram.update(piece(vectors))
        found.add(gram.finish())
    assert len(found) == 1


def test_products_of_values_that_fp32_cannot_square() -> None:
    tiny, huge = torch.tensor([1e-30, 2e-30]), torch.tensor([1e30, -1e30])
    gram = parents_gram({})
    gram.update(piece([tiny, huge]))
    (small, mixed), (_, large) = gram.finish()
    assert (small, mixed, large) == pytest.approx((5e-60, -1.0, 2e60))


def test_task_vectors_are_differences_to_the_base_and_parents_are_not() -> None:
    base, one, two = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0])
    for make, expected in (
        (task_vectors_gram, ((4.0, 0.0), (0.0, 9.0))),
        (parents_gram, ((10.0, 7.0), (7.0, 17.0))),
    ):
        gram = make({})
        gram.update(piece([one, two], base))
        assert gram.finish() == expected


def test_a_tensor_without_elements_has_an_empty_matrix() -> None:
    assert GramMatrix(of_task_vectors=False).finish() == ()


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (700, 33), (3, 1000), (200, 512), (2, 40_000)])
def test_products_row_by_row(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(4)
    vectors = [torch.randn(shape, generator=generator) for _ in range(3)]
    found = numpy.array(
        [[row.numpy() for row in rows] for rows in symmetric([*row_products(vectors)])]
    )
    stacked = torch.stack(vectors).double()
    assert found == close(torch.einsum("irc,jrc->ijr", stacked, stacked).numpy(), 1e-12 * shape[1])
    for start in range(0, shape[0], 2):
        alone = row_products([vector[start : start + 1] for vector in vectors])
        assert torch.equal(alone[:, 0], row_products(vectors)[:, start])


# Parameters that cannot go together


@pytest.mark.parametrize(
    ("method", "given", "problem"),
    [
        ("linear", {"weight": {"a": 1.0, "b": -1.0}}, "sum to 0"),
        ("nuslerp", {"weight": {"a": 0.5, "b": -0.5}}, "sum to 0"),
        ("multislerp", {"weight": 0.0}, "sum to 0"),
        ("karcher", {"weight": {"a": 1.0, "b": -1.0}}, "sum to 0"),
        ("karcher", {"max_iter": 2.5}, "2.5 is not a whole number"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(
    method: str, given: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    for name in "ab":
        write_checkpoint(tmp_path / name, {MATRIX: torch.zeros(2)})
    merger = open_merger({name: tmp_path / name for name in "ab"})
    with pytest.raises(BadInputError, match=f"method {method}: .*{problem}"):
        merger.start(recipe_for(merger, rule(method, **given)))


def test_weights_need_a_sum_in_each_tensor_not_in_each_corner(tmp_path: Path) -> None:
    """Weights that rise against each other cancel nowhere, though one begins and one ends with 0."""
    tensors = {MATRIX.replace("0", str(layer)): torch.zeros(2) for layer in range(2)}
    for name in "ab":
        write_checkpoint(tmp_path / name, tensors)
    merger = open_merger({name: tmp_path / name for name in "ab"})
    merger.start(recipe_for(merger, rule("linear", weight={"a": [0, 1], "b": [1, 0]})))
    falling = rule("linear", weight={"a": [1, 0], "b": [1, 0]})
    with pytest.raises(BadInputError, match=r"layers\.1\..*method linear: the weights sum to 0"):
        merger.start(recipe_for(merger, falling))


@pytest.mark.parametrize("method", ["linear", "multislerp"])
def test_weights_that_cancel_are_fine_where_nothing_is_divided(method: str, tmp_path: Path) -> None:
    flag = "normalize" if method == "linear" else "normalize_weights"
    found = merged(tmp_path, method, [[2.0, 0.0], [0.0, 2.0]], weight=[1.0, -1.0], **{flag: 0})
    expected = [2.0, -2.0] if method == "linear" else [0.0, 0.0]  # the mean length is 2 - 2
    assert found == close(expected)


# nuslerp


def test_nuslerp_takes_its_ratio_from_the_weights(tmp_path: Path) -> None:
    for number, (weights, t) in enumerate(
        [([3.0, 1.0], 0.25), ([0.2, 0.2], 0.5), ([-1.0, 2.0], 2.0)]
    ):
        found = merged(tmp_path / str(number), "nuslerp", [[1.0, 0.0], [0.0, 1.0]], weight=weights)
        assert found == close([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)])


def test_nuslerp_of_task_vectors(tmp_path: Path) -> None:
    """At right angles and of length 2, seen from the base."""
    found = merged(tmp_path, "nuslerp", [[7.0, 3.0], [5.0, 5.0]], [5.0, 3.0], weight=1.0)
    assert found == close([5.0 + math.sqrt(2), 3.0 + math.sqrt(2)], 1e-6)


def test_nuslerp_row_by_row(tmp_path: Path) -> None:
    """Rows at 90 and at 120 degrees, a parallel one and one with a zero: each has its own angle."""
    one = [[1.0, 0.0], [1.0, 0.0], [1.0, 2.0], [0.0, 0.0]]
    two = [[0.0, 1.0], [-0.5, math.sqrt(0.75)], [3.0, 6.0], [4.0, -2.0]]
    found = merged(tmp_path, "nuslerp", [one, two], weight=1.0, flatten=0)
    half = math.sqrt(0.5)
    expected = [[half, half], [0.5, math.sqrt(0.75)], [2.0, 4.0], [2.0, -1.0]]
    assert found == close(expected, 5e-7)


def test_nuslerp_goes_straight_to_a_parent_that_did_not_move(tmp_path: Path) -> None:
    found = merged(tmp_path, "nuslerp", [[1.0, 1.0], [1.0, 5.0]], [1.0, 1.0], weight=[3.0, 1.0])
    assert found == close([1.0, 2.0])


# multislerp


def test_multislerp_of_axes_is_their_diagonal(tmp_path: Path) -> None:
    """Of lengths 1, 2 and 3: the direction does not know them, the length is their mean."""
    axes = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]
    found = merged(tmp_path, "multislerp", axes, weight=5.0)
    assert found == close([2.0 / math.sqrt(3)] * 3, 1e-6)


def test_multislerp_has_its_origin_in_the_base(tmp_path: Path) -> None:
    parents, base = [[2.0, 1.0], [1.0, 2.0]], [1.0, 1.0]
    found = merged(tmp_path, "multislerp", parents, base, weight=1.0)
    assert found == close([1.0 + math.sqrt(0.5)] * 2)


def test_multislerp_without_a_direction_is_the_weighted_mean(tmp_path: Path) -> None:
    parents = [[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -1.0]]
    assert merged(tmp_path, "multislerp", parents, weight=1.0) == close([0.25, 0.5])


# karcher


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_karcher_of_two_is_slerp(t: float, tmp_path: Path) -> None:
    """Its direction; and its length too, for parents of one length."""
    generator = numpy.random.default_rng(5)
    one, two = generator.normal(size=(2, 50))
    one, two = ((x / numpy.linalg.norm(x)).tolist() for x in (one, two))
    found = merged(tmp_path / "k", "karcher", [one, two], weight=[1 - t, t], max_iter=50, tol=1e-9)
    assert found == close(merged(tmp_path / "s", "slerp", [one, two], t=t))


def test_karcher_finds_the_least_squared_angles(tmp_path: Path) -> None:
    """No direction nearby is better, whatever the order of the parents."""
    generator = numpy.random.default_rng(6)
    parents, weights = generator.normal(size=(4, 6)), [0.5, 1.0, 0.25, 0.75]
    units = parents / numpy.linalg.norm(parents, axis=1, keepdims=True)

    def spread(direction: numpy.ndarray) -> float:
        angles = numpy.arccos(units @ (direction / numpy.linalg.norm(direction)))
        return float(weights @ angles**2)

    found = merged(
        tmp_path / "a", "karcher", parents.tolist(), weight=weights, max_iter=200, tol=1e-9
    )
    for step in 0.01 * generator.normal(size=(200, 6)):
        assert spread(found + step) > spread(found)
    assert numpy.linalg.norm(found) == pytest.approx(
        numpy.average(numpy.linalg.norm(parents, axis=1), weights=weights)
    )
    turned = merged(
        tmp_path / "b",
        "karcher",
        parents[::-1].tolist(),
        weight=weights[::-1],
        max_iter=200,
        tol=1e-9,
    )
    assert turned == close(found, 1e-6)


def test_karcher_of_a_zero_and_of_opposites(tmp_path: Path) -> None:
    """A zero shortens the result without turning it; opposites leave the first where it is."""
    with_zero = merged(tmp_path / "zero", "karcher", [[3.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    assert with_zero == close([math.sqrt(2), math.sqrt(2)], 1e-6)
    opposite = merged(tmp_path / "opposite", "karcher", [[3.0, 0.0], [-1.0, 0.0]])
    assert opposite == close([2.0, 0.0])
    nothing = merged(tmp_path / "nothing", "karcher", [[0.0, 0.0], [0.0, 0.0]])
    assert nothing == close([0.0, 0.0])


# model_stock


def turned(degrees: float, length: float = 1.0) -> list[float]:
    angle = math.radians(degrees)
    return [length * math.cos(angle), length * math.sin(angle)]


@pytest.mark.parametrize(("degrees", "t"), [(0, 1.0), (60, 2 / 3), (90, 0.0), (150, 0.0)])
def test_model_stock_of_two(degrees: float, t: float, tmp_path: Path) -> None:
    """t = 2 cos / (1 + cos); nothing where they point apart."""
    one, two = turned(0), turned(degrees)
    found = merged(tmp_path, "model_stock", [one, two], [0.0, 0.0])
    assert found == close([t * (x + y) / 2 for x, y in zip(one, two, strict=True)])


def test_model_stock_of_three_uses_the_mean_cosine(tmp_path: Path) -> None:
    """Pairs at 60, 60 and 0 degrees, lengths that do not matter: cos = 2/3, t = 2 / (1 + 4/3)."""
    changes = [turned(0), turned(60, 2.0), turned(0, 3.0)]
    parents = [[1.0 + x, 2.0 + y] for x, y in changes]
    mean = numpy.mean(changes, axis=0)
    found = merged(tmp_path, "model_stock", parents, [1.0, 2.0])
    assert found == close(numpy.array([1.0, 2.0]) + 6 / 7 * mean, 1e-6)


def test_model_stock_row_by_row(tmp_path: Path) -> None:
    """Rows at 60 degrees, parallel, at 120 degrees, and one that only one parent has changed."""
    one = [turned(0), turned(30), turned(0), turned(0)]
    two = [turned(60), turned(30, 3.0), turned(120), [0.0, 0.0]]
    found = merged(tmp_path, "model_stock", [one, two], [[0.0, 0.0]] * 4, filter_wise=1)
    expected = [[0.5, turned(60)[1] / 3], turned(30, 2.0), [0.0, 0.0], [0.0, 0.0]]
    assert found == close(expected, 1e-6)


def test_model_stock_reads_angles_of_the_smallest_changes(tmp_path: Path) -> None:
    """A product of lengths of 1e-10 is no reason to go less far."""
    changes = [turned(0, 1e-5), turned(60, 1e-5)]
    found = merged(tmp_path, "model_stock", changes, [0.0, 0.0])
    assert found == close(2 / 3 * numpy.mean(changes, axis=0), 1e-12)


# nearswap and arcee_fusion


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0.0, [1.0, 1.0, 1.0, 1.0]),
        (0.25, [1.25, 0.875, 1.0, 1.25]),
        (9.0, [2.0, 0.875, 1.0, 1.25]),
    ],
)
def test_nearswap_goes_to_the_mother_but_no_further_than_t(
    t: float, expected: list[float], tmp_path: Path
) -> None:
    father, mother = [1.0, 1.0, 1.0, 1.0], [2.0, 0.875, 1.0, 1.25]
    assert merged(tmp_path, "nearswap", [father, mother], t=t).tolist() == expected


def test_arcee_fusion_takes_outliers(tmp_path: Path) -> None:
    """In one row importance is |d| times a constant: quartiles 3, 6 and 10 make a threshold of 16.5."""
    father = [1.0] * 9
    steps = [4.0, -100.0, 8.0, 2.0, -6.0, 10.0, 1.0, -3.0, 12.0]
    mother = [1.0 + 0.01 * step for step in steps]
    found = merged(tmp_path, "arcee_fusion", [father, mother])
    assert found == close([1.0, mother[1], *[1.0] * 7])


def test_arcee_fusion_weighs_rows_by_what_they_say(tmp_path: Path) -> None:
    """A row that moves by one number has the same softmax, and matters less than smaller changes."""
    generator = numpy.random.default_rng(7)
    father = generator.normal(size=(8, 40)).astype("float32")
    mother = (father + 0.01 * generator.normal(size=father.shape)).astype("float32")
    mother[2] = father[2] + 4.0
    found = merged(tmp_path, "arcee_fusion", [father.tolist(), mother.tolist()])
    taken = found != father
    assert not taken[2].any()
    assert 0 < taken.sum() < 0.2 * taken.size
    assert found[taken] == pytest.approx(mother[taken])


def test_arcee_fusion_of_equal_parents_and_of_single_numbers(tmp_path: Path) -> None:
    assert merged(tmp_path / "equal", "arcee_fusion", [[1.0, 2.0]] * 2).tolist() == [1.0, 2.0]
    assert merged(tmp_path / "single", "arcee_fusion", [[1.0], [2.0]]).tolist() == [2.0]


# passthrough


def test_passthrough_scales(tmp_path: Path) -> None:
    parents = [[1.0, 2.0], [3.0, -4.0]]
    for scale, expected in ((0.5, [1.5, -2.0]), (0.0, [0.0, 0.0]), (-1.0, [-3.0, 4.0])):
        found = merged(tmp_path / str(scale), "passthrough", parents, source="b", scale=scale)
        assert found.tolist() == expected


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_scaled_tensor_must_hold_numbers(scale: float, tmp_path: Path) -> None:
    """Copied bit by bit it may hold anything."""
    for name in "ab":
        write_checkpoint(tmp_path / name, {MATRIX: torch.tensor([1, 2, 250], dtype=torch.uint8)})
    merger = open_merger({name: tmp_path / name for name in "ab"})
    way = rule("passthrough", source="b", scale=scale)
    if scale == 1.0:
        (child,) = run(merger, way).values()
        assert child.tolist() == [1, 2, 250]
    else:
        with pytest.raises(BadInputError, match="passthrough needs one of"):
            run(merger, way)


# What does not depend on the method


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("nuslerp", {"weight": 1.0, "flatten": 0}),
        ("model_stock", {"filter_wise": 1}),
        ("multislerp", {"weight": 1.0}),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_damaged_element_damages_no_other(
    method: str, given: dict[str, Any], value: float, tmp_path: Path
) -> None:
    generator = numpy.random.default_rng(8)
    parents = generator.normal(size=(2, 3, 4))
    parents[1, 1, 2] = value
    base = generator.normal(size=(3, 4)).tolist()
    found = merged(tmp_path, method, [x.tolist() for x in parents], base, **given)
    assert numpy.argwhere(~numpy.isfinite(found)).tolist() == [[1, 2]]
