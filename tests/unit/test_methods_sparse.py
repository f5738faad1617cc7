"""The methods that make task vectors sparse: small vectors worked out by hand, what rescaling and random
drops do on the whole, and statistics that are taken only where they are needed.

Values marked so are also those of mergekit 0.1.5, run on the same tensors.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.checkpoint_files import open_merger, rule, run, write_checkpoint
from workers.merging import get_method
from workers.merging.methods import Slice
from workers.merging.methods.breadcrumbs import window
from workers.merging.methods.magnitudes import BinCounts
from workers.merging.methods.ram import Overlap
from workers.merging.methods.sce import VarianceTable

WEIGHT = "model.layers.0.mlp.up_proj.weight"
COUNTING = torch.arange(1.0, 11.0)


def merged(
    folder: Path, method: str, changes: list[torch.Tensor], seed: int = 0, **given: Any
) -> torch.Tensor:
    """The child of a base of zeros; parameters given as lists have a number for each parent."""
    for name, change in [
        ("base", torch.zeros_like(changes[0])),
        *zip("abc", changes, strict=False),
    ]:
        if not (folder / name).exists():
            write_checkpoint(folder / name, {WEIGHT: change})
    names = "abc"[: len(changes)]
    given = {
        key: dict(zip(names, value, strict=True)) if isinstance(value, list) else value
        for key, value in given.items()
    }
    merger = open_merger({name: folder / name for name in names}, folder / "base")
    (child,) = run(merger, rule(method, **given), seed=seed).values()
    return child.reshape(changes[0].shape)


def vectors(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


# Trimming by magnitude


@pytest.mark.parametrize(
    ("density", "gamma", "expected"),
    [
        (0.5, 0.2, [0, 0, 0, 4, 5, 6, 7, 8, 0, 0]),
        (0.9, 0.3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]),  # the density leaves room for one outlier
        (1.0, 0.3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),  # and here for none
        (0.0, 0.1, [0] * 10),
        (0.25, 0.19, [0, 0, 0, 0, 0, 0, 0, 8, 9, 0]),  # both shares are rounded down
        (0.5, 0.0, [0, 0, 0, 0, 0, 6, 7, 8, 9, 10]),
        (0.1, 1.0, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_keeps_the_middle(
    method: str, density: float, gamma: float, expected: list[float], tmp_path: Path
) -> None:
    """As mergekit."""
    found = merged(tmp_path, method, [COUNTING], weight=1.0, density=density, gamma=gamma)
    assert found.tolist() == expected


def test_breadcrumbs_treats_equal_magnitudes_alike(tmp_path: Path) -> None:
    """Two of the three largest would have to go: they stay, all three."""
    (change,) = vectors([9.0, -9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    found = merged(tmp_path, "breadcrumbs", [change], weight=1.0, density=0.3, gamma=0.2)
    assert found.tolist() == [9.0, -9.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 6.0, 7.0]


def test_breadcrumbs_of_what_is_not_finite(tmp_path: Path) -> None:
    """An outlier that is dropped, but not without a trace."""
    (change,) = vectors([math.inf, math.nan, -math.inf, *range(1, 18)])
    found = merged(tmp_path, "breadcrumbs", [change], weight=1.0, density=0.5, gamma=0.25)
    assert not found[:3].isfinite().any()
    assert found[3:].tolist() == [0.0] * 5 + [*range(6, 16)] + [0.0] * 2


@pytest.mark.parametrize(
    ("total", "density", "gamma", "expected"),
    [(6, 0.5, 0.2, (1, 4)), (1, 0.5, 0.01, (0, 0)), (24, 0.9, 0.3, (3, 24)), (0, 0.5, 0.5, (0, 0))],
)
def test_the_ranks_of_breadcrumbs(
    total: int, density: float, gamma: float, expected: tuple[int, int]
) -> None:
    assert window(total, density, gamma) == expected


@pytest.mark.parametrize("density", [0.05, 0.3, 1e-9])
def test_ties_keeps_at_least_one_element(density: float, tmp_path: Path) -> None:
    """As mergekit."""
    found = merged(tmp_path, "ties", [COUNTING], weight=1.0, density=density)
    expected = [0.0] * 10
    for number in range(max(1, int(density * 10))):
        expected[9 - number] = 10.0 - number
    assert found.tolist() == expected


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.7])
def test_l1_restores_the_norm(method: str, density: float, tmp_path: Path) -> None:
    """To what bins of 1/256 of a power of two can tell of it."""
    change = torch.randn(40_000, generator=torch.Generator().manual_seed(1)) ** 3
    given = {"weight": 1.0, "density": density}
    plain = merged(tmp_path, method, [change], **given)
    found = merged(tmp_path, method, [change], rescale="l1", **given)
    assert float(found.abs().sum()) == pytest.approx(float(change.abs().sum()), rel=2e-4)
    factor = (found / plain)[plain != 0]
    assert float(factor.max() - factor.min()) < 1e-5 * float(factor.max())
    assert torch.equal(found != 0, plain != 0)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_inverse_density_divides_by_the_density(method: str, tmp_path: Path) -> None:
    given = {"weight": 1.0, "density": 0.5, "normalize": 0}
    plain = merged(tmp_path, method, [COUNTING], **given)
    found = merged(tmp_path, method, [COUNTING], rescale="inverse_density", **given)
    assert found.tolist() == (2 * plain).tolist()


# The sign election


@pytest.mark.parametrize(
    ("weights", "normalize", "expected"),
    [
        ([1.0, 1.0], 1, [1.0, 1.0, 1.0, 2.0, 1.5]),
        ([0.5, 0.5], 0, [0.5, 0.5, 1.0, 1.0, 1.5]),
        # The sign of what is added counts, and weights that cancel are not divided by. As mergekit.
        ([1.0, -1.0], 1, [2.0, -2.0, 1.0, 4.0, 2.0]),
    ],
)
def test_sign_election_with_draws_and_negative_weights(
    weights: list[float], normalize: int, expected: list[float], tmp_path: Path
) -> None:
    changes = vectors([1.0, -1.0, 1.0, 2.0, 2.0], [-1.0, 1.0, 1.0, -2.0, 1.0])
    found = merged(
        tmp_path, "ties", changes, weight=weights, density=1.0, normalize=normalize
    ).tolist()
    assert found == expected


def test_sums_may_be_normalized(tmp_path: Path) -> None:
    one, two = vectors([1.0, 2.0], [-3.0, 4.0])
    for method in ("breadcrumbs", "dare_linear", "della_linear"):
        shape = (1, 2)
        changes = [one.reshape(shape), two.reshape(shape)]
        found = merged(tmp_path, method, changes, weight=[1.0, 0.25], density=1.0, normalize=1)
        assert found.tolist() == [[pytest.approx(0.2), pytest.approx(2.4)]]
        weights = {"weight": [1.0, -1.0], "density": 1.0, "normalize": 1}
        found = merged(tmp_path, method, changes, **weights)
        assert found.tolist() == [[4.0, -2.0]]  # weights that cancel are not divided by


# Dropping at random


SHAPE = (40, 500)


def random_change(seed: int = 3) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_the_expectation_stays(method: str, tmp_path: Path) -> None:
    """Over many rows of equal elements, what is kept and rescaled comes to what was there."""
    row, rows = torch.tensor([0.5, -1.0, 1.5, -2.0]), 20_000
    found = merged(tmp_path, method, [row.repeat(rows, 1)], weight=1.0, density=0.5, normalize=0)
    rank = torch.tensor([0.0, 1.0, 2.0, 3.0])
    wanted = 0.35 + 0.1 * rank if method.startswith("della") else torch.full((4,), 0.5)
    sigma = (wanted * (1 - wanted) / rows).sqrt()
    kept = (found != 0).float().mean(dim=0)
    assert ((kept - wanted).abs() < 5 * sigma).all()
    assert torch.allclose(found[found != 0], (row / wanted).repeat(rows, 1)[found != 0])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_l1_restores_the_norm_of_each_drawn_tensor(method: str, tmp_path: Path) -> None:
    """mergekit's `rescale: true`."""
    change, other = random_change(), random_change(4)
    for seed in (0, 1):
        given = {"weight": [1.0, 0.0], "density": 0.3, "normalize": 0, "seed": seed}
        plain = merged(tmp_path, method, [change, other], rescale="none", **given)
        assert torch.equal(plain[plain != 0], change[plain != 0])
        found = merged(tmp_path, method, [change, other], rescale="l1", **given)
        factor = float(change.abs().sum() / plain.abs().sum())
        assert torch.allclose(found, factor * plain, rtol=2e-4, atol=0)


@pytest.mark.parametrize("sizes", [[5], [250_000, 250_000, 8192], [1 << 18, 3, 1 << 18, 9000]])
def test_l1_norms_are_those_of_all_slices(sizes: list[int]) -> None:
    """Whatever their sizes; and they can be asked for twice."""
    generator = torch.Generator().manual_seed(1)
    statistic, whole, left = None, 0.0, 0.0
    for size in sizes:
        numbers = torch.randn(size, generator=generator)
        mask = (torch.rand(size, generator=generator) < 0.3).float()
        mask[0] = 1.0
        whole += float(numbers.double().abs().sum())
        left += float((numbers * mask).double().abs().sum())
        own = get_method("dare_linear").statistic({"density": {"a": 0.3}, "rescale": "l1"})
        own.update(
            Slice(
                parents={"a": numbers},
                base=torch.zeros(size),
                out=torch.empty(size),
                statistic=None,
                keep_mask=lambda name, probability, mask=mask: mask,
                scratch=lambda number, size=size: torch.empty(size),
                is_matrix=False,
            )
        )
        if statistic is None:
            statistic = own
        else:
            statistic.merge(own)
    assert statistic.finish() == statistic.finish() == {"a": pytest.approx(whole / left, rel=1e-6)}


def test_dare_keeps_its_density_and_other_elements_for_other_seeds(tmp_path: Path) -> None:
    kept = [
        merged(tmp_path, "dare_linear", [random_change()], seed, weight=1.0, density=0.3) != 0
        for seed in (0, 1)
    ]
    for mask in kept:
        assert float(mask.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float((kept[0] & kept[1]).float().mean()) == pytest.approx(0.09, abs=0.02)


def test_della_prefers_what_is_larger_in_its_row(tmp_path: Path) -> None:
    """However large the row is as a whole; rows of a kernel are all of one output."""
    change = random_change() * torch.logspace(-3, 3, SHAPE[0])[:, None]
    given = {"weight": 1.0, "density": 0.5, "epsilon": 0.4, "rescale": "none"}
    for shape in (SHAPE, (SHAPE[0], 5, 100)):
        folder = tmp_path / str(len(shape))
        found = merged(folder, "della_linear", [change.reshape(shape)], **given).reshape(SHAPE)
        rank = change.abs().argsort(dim=1).argsort(dim=1)
        for quarter in range(4):
            inside = (rank >= quarter * 125) & (rank < quarter * 125 + 125)
            wanted = 0.1 + 0.8 * (quarter * 125 + 62) / 499
            assert float((found != 0)[inside].float().mean()) == pytest.approx(wanted, abs=0.03)


def test_della_ranks_equal_magnitudes_by_their_place(tmp_path: Path) -> None:
    change = torch.ones(SHAPE)
    given = {"weight": 1.0, "density": 0.5, "epsilon": 0.5, "rescale": "none"}
    kept = merged(tmp_path, "della_linear", [change], **given)
    assert not kept[:, 0].any()  # probability 0, and 1 at the other end
    assert kept[:, -1].all()
    first, last = kept.mean(dim=0).split(250)
    assert float(first.mean()) == pytest.approx(0.25, abs=0.03)
    assert float(last.mean()) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("density", [0.05, 0.95])
def test_della_narrows_an_epsilon_that_leads_too_far(density: float, tmp_path: Path) -> None:
    kept = merged(
        tmp_path, "della_linear", [random_change()], weight=1.0, density=density, rescale="none"
    )
    assert float((kept != 0).float().mean()) == pytest.approx(density, abs=0.02)


def test_della_of_single_elements(tmp_path: Path) -> None:
    """Rows of one element have no ranks: each is kept with the density's probability."""
    change = torch.ones(5000, 1)
    found = merged(tmp_path, "della_linear", [change], weight=1.0, density=0.25)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float((found != 0).float().mean()) == pytest.approx(0.25, abs=0.04)


# SCE


def test_sce_by_hand(tmp_path: Path) -> None:
    """Two parents, squares 10 and 5 in all: weights 2/3 and 1/3."""
    changes = vectors([3.0, 0.0, -1.0, 0.0], [1.0, 0.0, 2.0, 0.0])
    found = merged(tmp_path, "sce", changes)
    assert found.tolist() == pytest.approx([(3 * 2 + 1) / 3, 0.0, 2.0, 0.0])


def test_sce_selects_by_variance(tmp_path: Path) -> None:
    """Of three elements that differ, a share of 0.7 is two; squares 9 and 5 in these."""
    changes = vectors([3.0, 7.0, 0.0, 0.5], [1.0, 7.0, 2.0, 0.0])
    found = merged(tmp_path, "sce", changes, select_topk=0.7)
    assert found.tolist() == pytest.approx([(9 * 3 + 5 * 1) / 14, 0.0, 2.0, 0.0])
    assert merged(tmp_path, "sce", changes, select_topk=0.0).tolist() == [0.0] * 4


def test_sce_weighs_small_task_vectors_too(tmp_path: Path) -> None:
    """mergekit has equal weights here."""
    changes = [change * 2.0**-12 for change in vectors([3.0, -1.0], [1.0, 2.0])]
    found = merged(tmp_path, "sce", changes) * 2.0**12
    assert found.tolist() == pytest.approx([(3 * 2 + 1) / 3, 2.0])


def test_sce_of_equal_parents_selects_nothing(tmp_path: Path) -> None:
    """Of an odd number, whose mean rounds."""
    change = random_change() * 0.1
    found = merged(tmp_path, "sce", [change, change, change], select_topk=0.9)
    assert not found.any()


# RAM


RAM_PARENTS = vectors([1e-5, 1e-4, 0.1, -0.1, 0.0, 0.0], [1e-5, 0.0, 0.3, 0.2, 0.0, 1.0])


def test_ram_by_hand(tmp_path: Path) -> None:
    """As mergekit; a change of epsilon itself is none."""
    epsilon = float(torch.tensor(1e-5))
    found = merged(tmp_path, "ram", RAM_PARENTS, epsilon=epsilon)
    assert found.tolist() == pytest.approx([0.0, 1e-4, 0.2, 0.05, 0.0, 1.0])


@pytest.mark.parametrize(
    ("r", "alpha", "unique"), [(1.0, 5.0, 3.0), (1.0, 0.5, 1.5), (0.1, 0.2, 1.02), (0.0, 5.0, 1.0)]
)
def test_ramplus_by_hand(r: float, alpha: float, unique: float, tmp_path: Path) -> None:
    """As mergekit's `ramplus_tl`: two shared elements and one unique one, so rho is 2 for both."""
    epsilon = float(torch.tensor(1e-5))
    found = merged(tmp_path, "ramplus", RAM_PARENTS, r=r, alpha=alpha, epsilon=epsilon)
    assert found.tolist() == pytest.approx([0.0, 1e-4 * unique, 0.2, 0.05, 0.0, unique])


def test_ramplus_without_a_unique_element(tmp_path: Path) -> None:
    found = merged(tmp_path, "ramplus", vectors([1.0, 0.0], [3.0, 0.0]))
    assert found.tolist() == [2.0, 0.0]


# Statistics


def counts_of(*pieces: torch.Tensor) -> BinCounts:
    found = BinCounts()
    for piece in pieces:
        own = BinCounts()
        own.add(piece.clone(), torch.empty_like(piece))
        found.merge(own)
    return found


def test_bins_are_counted_whatever_is_merged_with_what() -> None:
    numbers = random_change().reshape(-1)
    numbers[:100] = 0.0
    numbers[100:103] = torch.tensor([math.inf, -math.inf, math.nan])
    expected = numpy.bincount(numbers.abs().view(torch.int32).numpy() >> 15, minlength=1 << 16)
    assert numpy.array_equal(counts_of(numbers).counts, expected)
    assert numpy.array_equal(counts_of(*numbers.split(777)).counts, expected)


def test_norms_are_those_of_what_is_finite() -> None:
    numbers = random_change().reshape(-1) * 1e-3
    norm = float(numbers.abs().double().sum())
    numbers[:2] = torch.tensor([math.inf, math.nan])
    found = counts_of(numbers).finish()
    assert found.norms[-1] == pytest.approx(norm, rel=1e-3)
    assert found.total == numbers.numel()


def test_bounds_of_a_tensor_of_zeros() -> None:
    found = counts_of(torch.zeros(10)).finish()
    assert found.bound_keeping(0) == math.inf
    assert found.bound_keeping(5) == 0.0
    assert found.norm_ratio(5) == 1.0


@pytest.mark.parametrize(
    ("method", "given", "needed"),
    [
        ("ties", {"density": 1.0}, False),
        ("ties", {"density": {"a": 1.0, "b": 0.9}}, True),
        ("breadcrumbs", {"density": 1.0}, False),
        ("dare_ties", {"density": 0.5}, False),
        ("dare_ties", {"density": 0.5, "rescale": "none"}, False),
        ("dare_ties", {"density": 0.5, "rescale": "l1"}, True),
        ("dare_ties", {"density": 1.0, "rescale": "l1"}, False),
        ("della", {"density": 0.5}, False),
        ("della", {"density": 0.5, "rescale": "l1"}, True),
    ],
)
def test_a_tensor_is_scanned_only_if_need_be(
    method: str, given: dict[str, Any], needed: bool
) -> None:
    found = get_method(method)
    values = found.resolve({"weight": 1.0} | given, ("a", "b"), True)
    assert found.statistic is not None
    assert (found.statistic(values) is not None) == needed


def test_one_table_serves_all_that_trim_by_magnitude() -> None:
    """A search over methods, weights and densities scans a tensor once."""
    statistics = {
        get_method(name).statistic for name in ("ties", "breadcrumbs", "breadcrumbs_ties")
    }
    assert len(statistics) == 1
    assert get_method("ties").statistic_parameters == ()
    assert get_method("sce").statistic is VarianceTable
    assert get_method("sce").statistic_parameters == ()
    assert get_method("ramplus").statistic is Overlap
    assert get_method("ramplus").statistic_parameters == ("epsilon",)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs_ties", "sce"])
def test_an_election_needs_two_task_vectors(method: str) -> None:
    assert get_method(method).least_task_vectors == 2
