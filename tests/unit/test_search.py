"""Optimizers: what every registered one promises, and that CMA-ES searches.

The conformance part runs on all of `OPTIMIZERS`: a new optimizer inherits it by registering itself.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import pytest

from orchestrator.search import OPTIMIZERS, Optimizer, build_optimizer
from workers.errors import BadInputError

Points = list[list[float]]
Fitness = Callable[[Sequence[float]], float]

START = [0.3, 0.6, 0.5, 0.9, 0.1]
GENERATIONS = 6

every_optimizer = pytest.mark.parametrize("name", sorted(OPTIMIZERS))


def sphere(point: Sequence[float]) -> float:
    """Its best point is 0.2, 0.3, ...; fitness is larger the nearer."""
    return -sum((x - 0.2 - 0.1 * n) ** 2 for n, x in enumerate(point))


def few_values(point: Sequence[float]) -> float:
    """As accuracies are: many points are equally fit."""
    return float(round(sum(point) * 2))


def run(
    optimizer: Optimizer, fitness: Fitness = sphere, generations: int = GENERATIONS
) -> list[Points]:
    """What the optimizer asks for, generation by generation, used as a campaign does."""
    asked = []
    for _ in range(generations):
        optimizer.stopped()
        points = optimizer.ask()
        asked.append([list(point) for point in points])
        optimizer.tell(points, [fitness(point) for point in points])
    return asked


def build(
    name: str,
    genes: int = len(START),
    population: int | None = None,
    seed: int = 3,
    step: float = 0.25,
) -> Optimizer:
    return build_optimizer(name, START[:genes], step, population, seed)


# -- conformance -----------------------------------------------------------------------------


@every_optimizer
def test_a_seed_decides_everything(name: str) -> None:
    assert run(build(name)) == run(build(name))
    assert run(build(name, seed=4)) != run(build(name))
    run(build(name, seed=0), generations=1)
    run(build(name, seed=2**40), generations=1)


@every_optimizer
@pytest.mark.parametrize("fitness", [sphere, few_values])
def test_a_replay_comes_to_the_same_next_question(name: str, fitness: Fitness) -> None:
    """A resumed campaign asks again and tells what was recorded, then goes on."""
    whole = run(build(name), fitness, GENERATIONS)
    for kept in range(1, GENERATIONS):
        resumed = build(name)
        for points in whole[:kept]:
            assert resumed.stopped() is None
            assert resumed.ask() == points
            resumed.tell(points, [fitness(point) for point in points])
        assert resumed.ask() == whole[kept]


@every_optimizer
@pytest.mark.parametrize("genes", [1, 2, 5])
@pytest.mark.parametrize("population", [None, 2, 3, 9])
def test_points_lie_in_the_unit_cube_as_many_as_wanted(
    name: str, genes: int, population: int | None
) -> None:
    asked = run(build(name, genes, population))
    for points in asked:
        assert len(points) == population if population else len(points) > 1
    for point in itertools.chain(*asked):
        assert len(point) == genes
        assert all(type(value) is float and 0.0 <= value <= 1.0 for value in point)


@every_optimizer
@pytest.mark.parametrize("edge", [0.0, 1.0])
@pytest.mark.parametrize("step", [1e-6, 0.25, 3.0])
def test_a_search_may_begin_at_the_edge_with_any_step(name: str, edge: float, step: float) -> None:
    optimizer = build_optimizer(name, [edge] * 3, step, None, 0)
    for point in itertools.chain(*run(optimizer)):
        assert all(0.0 <= value <= 1.0 for value in point)


@every_optimizer
def test_global_random_states_are_neither_read_nor_touched(name: str) -> None:
    asked = []
    for seed in (1, 2):
        numpy.random.seed(seed)
        random.seed(seed)
        before = (
            numpy.random.get_state()[1].tolist(),
            numpy.random.get_state()[2],
            random.getstate(),
        )
        asked.append(run(build(name)))
        after = numpy.random.get_state()[1].tolist(), numpy.random.get_state()[2], random.getstate()
        assert before == after
    assert asked[0] == asked[1]


@every_optimizer
def test_time_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = run(build(name))
    clock = itertools.count(1e9, 1e6)
    for read in ("time", "monotonic", "perf_counter", "process_time"):
        monkeypatch.setattr(time, read, lambda: next(clock))
    assert run(build(name)) == asked
    stopped = build(name)
    run(stopped)
    assert stopped.stopped() is None


@every_optimizer
def test_files_of_the_current_folder_do_not_matter(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """pycma would read options, an order to stop among them, from this one."""
    asked = run(build(name))
    (tmp_path / "cma_signals.in").write_text("{'timeout': -1, 'maxiter': 0}")
    monkeypatch.chdir(tmp_path)
    optimizer = build(name)
    assert run(optimizer) == asked
    assert optimizer.stopped() is None
    assert [path.name for path in tmp_path.iterdir()] == ["cma_signals.in"]


@every_optimizer
def test_nothing_is_printed(name: str) -> None:
    """Standard output belongs to the command's one JSON object."""
    program = (
        "from orchestrator.search import build_optimizer\n"
        f"optimizer = build_optimizer({name!r}, [0.5, 0.5], 0.25, None, 1)\n"
        "for _ in range(4):\n"
        "    points = optimizer.ask()\n"
        "    optimizer.tell(points, [0.0] * len(points))\n"
        "    optimizer.stopped()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


@every_optimizer
def test_it_goes_on_when_all_are_equally_fit(name: str) -> None:
    optimizer = build(name)
    run(optimizer, lambda point: 0.0, generations=10)
    assert optimizer.stopped() is None


@every_optimizer
def test_a_started_optimizer_has_no_reason_to_stop(name: str) -> None:
    assert build(name).stopped() is None


# -- the registry ----------------------------------------------------------------------------


def test_both_optimizers_are_found() -> None:
    assert {"cma_es", "random"} <= OPTIMIZERS.keys()


def test_an_unknown_optimizer_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadInputError, match=r"search\.optimizer: 'nope' .*cma_es.*random"):
        build("nope")


# -- each by itself --------------------------------------------------------------------------


def best_of(name: str, evaluations: int, seed: int, population: int) -> float:
    optimizer = build_optimizer(name, [0.8] * 6, 0.25, population, seed)
    asked = run(optimizer, sphere, evaluations // population)
    return max(sphere(point) for point in itertools.chain(*asked))


def test_cma_es_finds_what_random_search_does_not() -> None:
    for seed in range(3):
        found, guessed = (best_of(name, 400, seed, 10) for name in ("cma_es", "random"))
        assert found > -1e-3
        assert found > guessed / 20, "20 times nearer, squared"


def test_cma_es_seeks_what_is_large() -> None:
    optimizer = build("cma_es", genes=2)
    last = run(optimizer, lambda point: point[0], generations=15)[-1]
    assert min(point[0] for point in last) > 0.9


def test_cma_es_with_one_gene_finds_its_best_value() -> None:
    last = run(build("cma_es", genes=1), sphere, generations=20)[-1]
    assert all(abs(point[0] - 0.2) < 0.05 for point in last)


def test_the_step_is_how_far_cma_es_looks_at_first() -> None:
    spreads = [
        numpy.std(build_optimizer("cma_es", [0.5] * 20, step, 50, 0).ask()) for step in (0.02, 0.1)
    ]
    assert spreads == pytest.approx([0.02, 0.1], rel=0.1)


def test_cma_es_says_when_it_has_converged() -> None:
    optimizer = build("cma_es", genes=2)
    for _ in range(500):
        run(optimizer, sphere, generations=1)
        if optimizer.stopped():
            break
    assert "tolx" in (optimizer.stopped() or "")


def test_cma_es_cannot_have_a_population_of_one() -> None:
    with pytest.raises(BadInputError, match=r"search\.population"):
        build("cma_es", population=1)


def test_random_search_begins_with_the_start_and_then_covers_the_cube() -> None:
    asked = run(build("random", population=50))
    assert asked[0][0] == START
    points = numpy.array(list(itertools.chain(*asked))[1:])
    assert len(numpy.unique(points)) == points.size
    # Of 299 even draws the mean lies within 0.5 +- 5 standard errors, and the corners are near.
    assert points.mean(axis=0) == pytest.approx(0.5, abs=5 * (1 / 12 / len(points)) ** 0.5)
    assert points.min(axis=0).max() < 0.05
    assert points.max(axis=0).min() > 0.95


def test_random_search_does_not_learn() -> None:
    assert run(build("random"), sphere) == run(build("random"), few_values)


@every_optimizer
def test_without_genes_there_is_one_candidate(name: str) -> None:
    optimizer = build_optimizer(name, [], 0.25, None, 0)
    assert optimizer.stopped() is None
    assert optimizer.ask() == [[]]
    optimizer.tell([[]], [0.5])
    assert "no genes" in str(optimizer.stopped())
