"""What iso_c, tsv_m, wudi and svc promise of a matrix. (Beside `test_methods.py`, where they are compared
with plain references on whole models.) Through the executor, in fp32, where no rounding hides anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.checkpoint_files import (
    after,
    open_merger,
    rule,
    run,
    to_float64,
    write_checkpoint,
    write_weights,
)
from tests.references import REFERENCES
from tests.references.matrix import nearest_orthogonal
from workers.errors import BadInputError
from workers.merging import get_method
from workers.merging.methods.wudi import ROWS
from workers.merging.recipe import Recipe, Rule
from workers.storage.folder import FolderStore

MATRIX, NORM = "layers.0.mlp.up_proj.weight", "norm.weight"
NAMES = "abcdefgh"
Matrix = numpy.ndarray

generator = numpy.random.default_rng(11)


def random(*shape: int, size: float = 1e-3) -> Matrix:
    return generator.normal(size=shape) * size


def directions(length: int, count: int) -> Matrix:
    """Orthonormal columns `[length, count]`."""
    return numpy.linalg.qr(generator.normal(size=(length, count)))[0]


def rounded(matrix: Matrix) -> Matrix:
    """As a checkpoint in fp32 has it."""
    return numpy.float64(numpy.float32(matrix))


def write_family(folder: Path, changes: list[Matrix], base: Matrix) -> None:
    """`base`, `a`, `b`, ... of one matrix, and of one vector that is 1 in the base and 1, 2, 3, ..."""
    matrices = {"base": base} | {
        name: base + change for name, change in zip(NAMES, changes, strict=False)
    }
    for number, (name, matrix) in enumerate(matrices.items()):
        tensors = {
            MATRIX: torch.from_numpy(matrix).float(),
            NORM: torch.full((3,), float(max(number, 1))),
        }
        write_checkpoint(folder / name, {f"model.{key}": value for key, value in tensors.items()})


def merged(
    folder: Path, changes: list[Matrix], how: str | Rule, base: Matrix | None = None, **given: Any
) -> Matrix:
    """child - base of a matrix, by a method or a whole rule. On a base of zeros task vectors are exact."""
    base = numpy.zeros_like(changes[0]) if base is None else base
    write_family(folder, changes, base)
    merger = open_merger({name: folder / name for name in NAMES[: len(changes)]}, folder / "base")
    child = run(merger, how if isinstance(how, Rule) else rule(how, **given))[MATRIX]
    return to_float64(child).reshape(base.shape) - rounded(base)


def calibrated(alpha: float = 1.0, weight: float = 1.0) -> Rule:
    """The sum of the task vectors, then svc."""
    return after("task_arithmetic", "svc", {"weight": weight}, {"alpha": alpha})


def singular_values(matrix: Matrix) -> Matrix:
    return numpy.linalg.svd(matrix, compute_uv=False)


def assert_near(found: Matrix, expected: Matrix, relative: float = 1e-6) -> None:
    assert abs(found - expected).max() <= relative * abs(expected).max()


SHAPES = [(48, 80), (80, 48), (40, 40), (2, 300), (300, 3), (9, 1100)]
"""Wide, tall, square, too few directions to share, and longer than what is worked on at once."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "wudi", "svc"])
def test_matrices_of_all_shapes(method: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """As the reference says, within a rounding to fp32 (wudi: and 1 % of one of Adam's steps)."""
    count = min(3, min(shape))
    changes = [random(*shape) for _ in range(count)]
    base = rounded(random(*shape, size=0.02))
    how = calibrated() if method == "svc" else rule(method)
    found = merged(tmp_path, changes, how, base)
    parents = {name: rounded(base + change) for name, change in zip(NAMES, changes, strict=False)}
    own = {"alpha": 1.0} if method == "svc" else {}
    values = get_method(method).resolve(own, tuple(parents), True)
    values |= {"shape": shape, "out": sum(parents.values(), (1 - count) * base).reshape(-1)}
    flat = {name: parent.reshape(-1) for name, parent in parents.items()}
    expected = REFERENCES[method](flat, base.reshape(-1), values, (0, MATRIX)).reshape(shape)
    tolerance = 2 * 2.0**-24 * abs(expected).max() + (1e-7 if method == "wudi" else 0.0)
    assert abs(found + base - expected).max() <= tolerance


# iso_c


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_iso_c_has_one_singular_value(count: int, shape: tuple[int, int], tmp_path: Path) -> None:
    """Their mean, in all directions; also of a single task vector."""
    changes = [random(*shape) for _ in range(count)]
    found = merged(tmp_path, changes, "iso_c", **{"lambda": 0.5})
    assert_near(
        singular_values(found),
        numpy.full(24 if 24 in shape else 32, 0.5) * singular_values(sum(changes)).mean(),
    )


def test_iso_c_is_right_where_singular_values_are_small(tmp_path: Path) -> None:
    left, right = directions(60, 60), directions(90, 60)
    change = left * numpy.logspace(0, -4, 60) @ right.T
    expected = numpy.logspace(0, -4, 60).mean() * left @ right.T
    # What fp32 has left of the smallest direction of the task vector itself: 1e-8 / 1e-4.
    assert_near(merged(tmp_path, [change], "iso_c"), expected, relative=1e-3)


def test_iso_c_invents_no_directions(tmp_path: Path) -> None:
    """A sum of rank 2 stays one; the mean is over all 20 singular values."""
    change, expected = numpy.zeros((20, 50)), numpy.zeros((20, 50))
    change[[0, 1], [0, 1]] = 3.0, 1.0
    expected[[0, 1], [0, 1]] = (3.0 + 1.0) / 20
    assert_near(merged(tmp_path, [change], "iso_c"), expected)


# tsv_m


def test_tsv_m_adds_up_what_is_orthogonal(tmp_path: Path) -> None:
    left, right = directions(30, 9), directions(50, 9)
    changes = [
        left[:, 3 * i : 3 * i + 3] * [3.0, 2.0 + i, 1.0] @ right[:, 3 * i : 3 * i + 3].T
        for i in range(3)
    ]
    assert_near(merged(tmp_path, changes, "tsv_m"), sum(changes))


def test_tsv_m_keeps_the_leading_singular_values(tmp_path: Path) -> None:
    """Its child has the first 1/K of each, whatever the directions were."""
    changes = [random(41, 70) for _ in range(4)]
    kept = numpy.concatenate([singular_values(change)[:10] for change in changes])
    found = singular_values(merged(tmp_path, changes, "tsv_m"))
    assert_near(found[:40], numpy.sort(kept)[::-1])
    assert found[40] < 1e-6 * found[0]


@pytest.mark.parametrize("method", ["tsv_m", "wudi"])
def test_one_task_vector_is_kept_as_it_is(method: str, tmp_path: Path) -> None:
    change, unchanged = random(20, 30), numpy.zeros((20, 30))
    expected = numpy.float32(change)
    for number, changes in enumerate(
        [[change], [unchanged, change], [change, unchanged, unchanged]]
    ):
        assert (merged(tmp_path / str(number), changes, method) == expected).all()
    base = random(20, 30)
    assert not merged(tmp_path / "none", [unchanged, unchanged], method, base).any()
    weights = {"a": 1.0, "b": 0.0}
    weighted = merged(tmp_path / "w", [change, random(20, 30)], method, weight=weights)
    assert (weighted == expected).all()


@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "wudi"])
def test_a_parent_that_equals_the_base_changes_nothing(method: str, tmp_path: Path) -> None:
    changes = [random(20, 30), random(20, 30)]
    without = merged(tmp_path / "without", changes, method)
    found = merged(tmp_path / "with", [numpy.zeros((20, 30)), *changes], method)
    assert (found == without).all()


@pytest.mark.parametrize("count", [2, 3])
def test_tsv_m_of_equal_parents_has_each_direction_once(count: int, tmp_path: Path) -> None:
    """The nearest orthogonal matrix is not unique there; no arbitrary direction may come of it."""
    change = random(20, 30)
    left, strengths, right = numpy.linalg.svd(change, full_matrices=False)
    share = 20 // count
    expected = left[:, :share] * strengths[:share] @ right[:share]
    assert_near(merged(tmp_path, [change] * count, "tsv_m"), expected)


def test_tsv_m_of_low_rank(tmp_path: Path) -> None:
    """As of LoRA: directions of strength zero disturb nobody's."""
    lefts, rights = ([directions(length, 2) for _ in range(2)] for length in (24, 40))
    changes = [left * [2.0, 1.0] @ right.T for left, right in zip(lefts, rights, strict=True)]
    left, right = (nearest_orthogonal(numpy.hstack(side)) for side in (lefts, rights))
    expected = left * [2.0, 1.0, 2.0, 1.0] @ right.T
    assert_near(merged(tmp_path, changes, "tsv_m"), expected, relative=1e-5)


# wudi


def objective(found: Matrix, changes: list[Matrix]) -> float:
    return sum((((found - change) @ change.T) ** 2).sum() / (change**2).sum() for change in changes)


SIDES = {"inputs": (40, 60), "outputs": (8, 60), "many rows": (ROWS + 40, 12)}
"""The gradient is worked out on the smaller side; rows in several blocks."""


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_wudi_goes_down_from_the_sum(shape: tuple[int, int], tmp_path: Path) -> None:
    common = random(*shape, size=3e-4)
    changes = [common + random(*shape, size=3e-4) for _ in range(3)]
    found = [
        merged(tmp_path / str(steps), changes, "wudi", steps=steps) for steps in (0, 10, 100, 300)
    ]
    assert_near(found[0], sum(changes))
    values = [objective(child, changes) for child in found]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.2 * values[0]


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_wudi_takes_the_steps_of_torch_and_autograd(shape: tuple[int, int], tmp_path: Path) -> None:
    changes = [random(*shape) for _ in range(3)]
    vectors = [torch.from_numpy(numpy.float32(change)).double() for change in changes]
    merging = torch.nn.Parameter(sum(vectors))
    adam = torch.optim.Adam([merging], lr=1e-5)
    for _ in range(60):
        adam.zero_grad()
        loss = sum(
            ((merging - vector) @ vector.T).square().sum() / vector.square().sum()
            for vector in vectors
        )
        loss.backward()
        adam.step()
    found = merged(tmp_path, changes, "wudi", steps=60)
    assert abs(found - merging.detach().numpy()).max() < 1e-7  # 1 % of a step


def test_wudi_leaves_a_sum_without_interference(tmp_path: Path) -> None:
    """Task vectors with inputs of their own."""
    changes = [random(30, 60) * (numpy.arange(60) % 2 == i) for i in range(2)]
    assert (merged(tmp_path, changes, "wudi") == numpy.float32(sum(changes))).all()


# svc


def spaces(shape: tuple[int, int], count: int) -> list[Matrix]:
    """Matrices of rank 2 without a direction or a singular value in common, and one of rank 1."""
    left, right = directions(shape[0], 2 * count + 1), directions(shape[1], 2 * count + 1)
    parts = [slice(start, start + 2) for start in range(0, 2 * count + 1, 2)]
    strengths = numpy.arange(1.0, 2 * count + 2)
    return [left[:, part] * strengths[part] @ right[:, part].T for part in parts]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_svc_leaves_what_is_not_shared(shape: tuple[int, int], tmp_path: Path) -> None:
    *changes, _ = spaces(shape, 3)
    for number, weight in enumerate((1.0, 0.3)):  # also if it is less than each parent's own
        found = merged(tmp_path / str(number), changes, calibrated(weight=weight))
        assert_near(found, weight * sum(changes))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_svc_counts_what_is_shared_once(shape: tuple[int, int], tmp_path: Path) -> None:
    *own, shared = spaces(shape, 3)
    found = merged(tmp_path, [change + shared for change in own], calibrated())
    assert_near(found, sum(own) + shared)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_svc_with_a_small_alpha_strengthens_what_one_parent_has(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    """K / (1 + (K - 1) alpha), the parents without a response counting as alpha."""
    *own, shared = spaces(shape, 3)
    found = merged(tmp_path, [change + shared for change in own], calibrated(alpha=0.25))
    assert_near(found, sum(own) * 3 / 1.5 + shared)


def test_svc_does_not_count_a_parent_that_equals_the_base(tmp_path: Path) -> None:
    change = random(20, 30)
    found = merged(tmp_path, [change, numpy.zeros((20, 30)), change], calibrated())
    assert_near(found, change)


def test_svc_is_idle_where_nothing_has_changed(tmp_path: Path) -> None:
    nothing = numpy.zeros((20, 30))
    assert not merged(tmp_path, [nothing, nothing], calibrated(), random(20, 30)).any()


@pytest.mark.parametrize("before", ["tsv_m", "iso_c", "ties", "linear"])
def test_svc_follows_any_method(before: str, tmp_path: Path) -> None:
    """As the reference, on what the method makes alone."""
    shape = (20, 30)
    common = random(*shape)
    changes = [common + random(*shape) for _ in range(3)]
    given = {"weight": 1.0} | ({"density": 0.5} if before == "ties" else {})
    alone = merged(tmp_path / "alone", changes, before, **given)
    found = merged(tmp_path / "post", changes, after(before, "svc", given, {"alpha": 0.1}))
    parents = {name: change.reshape(-1) for name, change in zip(NAMES, changes, strict=False)}
    values = {"shape": shape, "alpha": 0.1, "out": alone.reshape(-1)}
    expected = REFERENCES["svc"](parents, numpy.zeros(600), values, (0, MATRIX))
    assert_near(found, expected.reshape(shape), relative=1e-5)
    assert abs(found - alone).max() > 0.01 * abs(alone).max()


def test_a_post_step_has_its_place(tmp_path: Path) -> None:
    changes = [random(4, 4), random(4, 4)]
    with pytest.raises(BadInputError, match=r"svc refines .*`post`"):
        merged(tmp_path / "first", changes, "svc")
    with pytest.raises(BadInputError, match=r"linear is no post-step.*svc"):
        merged(tmp_path / "last", changes, after("linear", "linear", {"weight": 1}, {"weight": 1}))


# All of them


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize("how", ["iso_c", "tsv_m", "wudi", "svc"])
def test_inputs_are_inputs_also_where_they_are_rows(
    how: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    """Fused experts `[E, in, out]` of gpt-oss: the child is the transpose of that of others."""
    changes = [random(*shape) for _ in range(2)]
    used = calibrated(alpha=0.5) if how == "svc" else rule(how)
    expected = merged(tmp_path / "upright", changes, used)
    for name, change in zip(("base", "a", "b"), (0 * changes[0], *changes), strict=True):
        experts = torch.from_numpy(change.T.copy()).float()[None]
        write_checkpoint(
            tmp_path / name,
            {"model.layers.0.mlp.experts.down_proj": experts},
            config={"model_type": "gpt_oss", "num_hidden_layers": 1},
        )
    merger = open_merger({name: tmp_path / name for name in "ab"}, tmp_path / "base")
    (child,) = run(merger, used).values()
    assert_near(to_float64(child).reshape(shape[::-1]), expected.T, relative=1e-5)


@pytest.mark.parametrize("how", ["iso_c", "tsv_m", "wudi", "svc"])
def test_what_is_not_finite_in_a_matrix_is_found(how: str, tmp_path: Path) -> None:
    changes = [random(20, 30), random(20, 30)]
    changes[1][3, 4] = numpy.inf
    write_family(tmp_path, changes, numpy.zeros((20, 30)))
    merger = open_merger({name: tmp_path / name for name in "ab"}, tmp_path / "base")
    used = calibrated() if how == "svc" else rule(how)
    recipe = Recipe(merger.references, (used,), merger.base_reference)
    with pytest.raises(BadInputError, match=rf"{MATRIX}.* has 1 elements".replace(".", r"\.", 3)):
        write_weights(merger, recipe, FolderStore(tmp_path / "child"), 1)


@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "wudi"])
def test_what_is_no_matrix_gets_the_mean(method: str, tmp_path: Path) -> None:
    write_family(tmp_path, [random(4, 4) for _ in range(3)], random(4, 4))
    merger = open_merger({name: tmp_path / name for name in "abc"}, tmp_path / "base")
    weights = {"a": 5.0, "b": 1.0, "c": 0.5}
    child = run(merger, rule(method, weight=weights, **{"lambda": 0.5}))
    assert child[NORM].tolist() == pytest.approx([1 + 0.5 * (5.0 * 0 + 1.0 * 1 + 0.5 * 2) / 3] * 3)


def test_the_threads_of_torch_are_as_before(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        merged(tmp_path, [random(4, 4), random(4, 4)], "iso_c")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
