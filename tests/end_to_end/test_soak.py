"""Campaigns on a cluster that breaks: killed at stages that matter, and at points that a seed draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.campaigns import count_records
from tests.faults.ground import Ground, run_to_expect
from tests.faults.soak import soak
from workers.storage import open_store

SOAK_SECONDS = 20.0
LEAST_BREAKS = 2
SEED = 7


@pytest.fixture(scope="module")
def ground(undisturbed: dict[str, Any]) -> Iterator[Ground]:
    with Ground(run_to_expect(undisturbed["campaign"])) as ground:
        yield ground


def test_killed_at_six_points_the_child_is_the_same(ground: Ground) -> None:
    """SIGKILL the driver at six stages; the same command goes on, and repeats nothing."""
    run = ground.run(random.Random(0))
    store = open_store(run.location)
    count = partial(count_records, store)
    points: list[Callable[[], bool]] = [
        lambda: count("scored") >= 1,  # while the parents are scored
        lambda: count("asked") >= 1 and count("scored") >= 6,  # within a generation
        lambda: count("asked") >= 3,  # between asking and scoring
        lambda: count("scored", split="holdout") >= 2,  # in the held-out evaluation
        lambda: count("examined") >= 1,  # between the health check and the writing
        lambda: count("child") >= 1,  # while the child is written
    ]
    for reached in points:
        if reached():
            continue  # two stages lay within one look
        driver = run.start()
        assert run.await_that(reached, driver), run.said(driver)
        run.kill(driver)
        run.broke()
    finished = count("finished") > 0  # the last stage is short: it may be over before the kill
    run.finish()
    verdict = run.judge(None)
    assert verdict.sound, verdict
    assert count("epoch") == verdict.breaks + (not finished) >= 4
    assert count("examined") == 1


def test_a_short_soak(ground: Ground) -> None:
    """Killed and frozen drivers and workers, and lost nodes, as the seed says."""
    verdicts = soak(ground, SOAK_SECONDS, SEED, least=LEAST_BREAKS)
    assert all(verdict.sound for verdict in verdicts), verdicts
