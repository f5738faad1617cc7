"""What the live view says about scores."""

from __future__ import annotations

import json
import math
import shutil
import threading
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import RenderableType

from orchestrator import progress
from orchestrator.ledger.state import CampaignState
from orchestrator.progress import ProgressView, fitness_interval
from orchestrator.statistics import Results, Score, score
from tests.scripted_campaign import scripted
from workers.checkpoints import open_checkpoint


def results(right: int, n: int) -> Results:
    return {
        str(i): {"score": float(i < right), "unparsed": False, "truncated": False} for i in range(n)
    }


def test_a_single_task_keeps_its_own_interval() -> None:
    only = score(results(3, 10))
    for objective in ("mean", "worst"):
        assert fitness_interval({"t": only}, objective) == pytest.approx((only.low, only.high))


def test_the_mean_of_uneven_tasks_lies_in_its_interval() -> None:
    """Pooling the items would give the interval of another number."""
    scores = {"few": score(results(0, 2)), "many": score(results(64, 64))}
    low, high = fitness_interval(scores, "mean")
    assert low < 0.5 < high


def test_the_interval_of_a_mean_is_that_of_equal_normal_tasks() -> None:
    """Two equal symmetric intervals of half-width h: the mean's has h / sqrt(2)."""
    task = Score(0.5, 100, 0.4, 0.6, 0, 0)
    low, high = fitness_interval({"a": task, "b": task}, "mean")
    assert (low, high) == pytest.approx((0.5 - 0.1 / math.sqrt(2), 0.5 + 0.1 / math.sqrt(2)))


def test_the_last_figures_are_printed_and_parents_given_twice_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parents = [{"name": name, "path": "shipped:strings/sort"} for name in ("one", "two")]
    campaign = scripted(
        tmp_path,
        lambda recipe, item: hash((recipe.id, item.id)) % 2 == 0,
        parents=parents,
        search={"optimizer": "random", "evaluations": 5, "population": 5},
    )
    with ProgressView() as view:
        campaign.watcher = view
        campaign.run()
    printed = capsys.readouterr().err
    assert "one and two are the same checkpoint" in printed
    assert "5/5 evaluations" in printed
    assert "genes of components for dare_ties" in printed


def test_another_epsilon_of_a_parent_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "[other]"  # a name that is no markup
    shutil.copytree(open_checkpoint("shipped:strings/sort").folder or "", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    campaign = scripted(
        tmp_path,
        lambda recipe, item: True,
        parents=[
            {"name": "one", "path": "shipped:strings/sort"},
            {"name": "two", "path": str(folder)},
        ],
    )
    with ProgressView() as view:
        view.begin(campaign)
    assert f"two ({folder}): config.json has rms_norm_eps 0.5, but" in capsys.readouterr().err


def test_the_rate_is_known_where_results_come_seldom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes on by half a minute each time somebody looks at it."""
    clock = count(0, 30)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    campaign = scripted(
        tmp_path,
        lambda recipe, item: hash((recipe.id, item.id)) % 2 == 0,
        search={"optimizer": "random", "evaluations": 4, "population": 1},
    )
    with ProgressView() as view:
        campaign.watcher = view
        campaign.run()
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if any(f" {done}/4 evaluations" in line for done in (1, 2, 3))
    ]
    assert len(lines) >= 3
    assert not [line for line in lines if " 0 items/s" in line or " 0.0 items/s" in line], lines


def test_three_tasks_fit_into_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wide as a log is: each model has one line."""
    monkeypatch.delenv("COLUMNS", raising=False)
    campaign = scripted(
        tmp_path,
        lambda recipe, item: hash((recipe.id, item.id)) % 2 == 0,
        tasks=[
            {"name": name, "search_items": 8, "holdout_items": 8}
            for name in ("reverse", "sort", "shift")
        ],
        objective="worst",
        search={"optimizer": "random", "evaluations": 2, "population": 2},
    )
    with ProgressView() as view:
        campaign.watcher = view
        campaign.run()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("best child")]
    assert lines
    assert all(line.count(".") == 12 and len(line.rstrip()) <= 80 for line in lines)


def test_the_view_asks_the_campaign_on_the_main_thread_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking up how many evaluations are paid brings the state up to date, which two threads cannot do."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal
    monkeypatch.setattr(progress, "REFRESH_PER_SECOND", 200)
    campaign = scripted(
        tmp_path,
        lambda recipe, item: hash((recipe.id, item.id)) % 2 == 0,
        search={"optimizer": "random", "evaluations": 20, "population": 5},
    )
    asked, drawn = set(), threading.Event()
    of_state, of_view = CampaignState.evaluated, ProgressView._render

    def evaluated(self: CampaignState, budget: int) -> int:
        asked.add(threading.current_thread())
        return of_state(self, budget)

    def render(self: ProgressView) -> RenderableType:
        if threading.current_thread() is not threading.main_thread() and self._figures is not None:
            drawn.set()
        return of_view(self)

    monkeypatch.setattr(CampaignState, "evaluated", evaluated)
    monkeypatch.setattr(ProgressView, "_render", render)
    with ProgressView() as view:
        campaign.watcher = view
        campaign.run()
        assert drawn.wait(30)
    assert asked == {threading.main_thread()}
