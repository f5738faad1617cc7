"""What a campaign costs: the driver's meter, and the sums over a ledger."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import load_config
from orchestrator.ledger.record_shapes import CAMPAIGN
from orchestrator.overview import campaign_overview
from orchestrator.pool.pool import Progress
from orchestrator.reporting.card import COST_LINE
from orchestrator.watching.meter import SPENDING_KINDS, Meter
from orchestrator.watching.spending import Seconds, Spending, cost_words, hours
from tests.campaigns import digests, records, write_campaign
from tests.scripted_campaign import ScriptedPool, scripted
from workers.errors import BadInputError
from workers.evaluation_worker import Scored
from workers.storage import open_store


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def started(number: int, loading: float = 0.0, members: int = 1, gpus: float = 1) -> dict[str, Any]:
    return {
        "worker": number,
        "state": "in service",
        "node": f"n{number}",
        "loading_seconds": loading,
        "members": members,
        "cpus": 4.0 * members,
        "gpus": gpus * members,
    }


def test_what_tells_of_time_are_records_that_there_are() -> None:
    assert CAMPAIGN.keys() >= SPENDING_KINDS


def test_the_meter_runs_from_a_workers_start_until_it_is_replaced() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.apply(started(0, loading=30))
    meter.apply(started(1, members=3))
    clock.now += 10
    assert meter.read() == Seconds(30 + 10 + 3 * 10, 4 * 40 + 12 * 10, 40 + 3 * 10)
    clock.now += 5
    meter.apply({"worker": 1, "state": "replaced"})
    clock.now += 20  # the place is empty, or loading
    assert meter.read() == Seconds(25 + 3 * 5, 4 * 25 + 12 * 5, 25 + 3 * 5)
    meter.apply({"worker": 1, "state": "not started", "error": "no room"})
    meter.apply(started(1, loading=7, members=3))
    assert meter.read() == Seconds(3 * 7, 12 * 7, 3 * 7)
    assert meter.read() == Seconds()
    assert meter.node(1) == "n1" and meter.node(5) is None


def test_time_that_a_lost_worker_has_used_counts() -> None:
    """Its failure is recorded after it was replaced."""
    meter = Meter(Clock())
    meter.apply(started(2, members=2, gpus=0.5))
    meter.apply({"worker": 2, "state": "replaced"})
    assert meter.used(2, 10) == Seconds(20, 80, 10)
    assert meter.used(3, 10) == Seconds()


LEDGER: list[dict[str, Any]] = [
    {"kind": "price", "per_hour": 9.0, "currency": "USD"},
    {"kind": "scored", "split": "search", "recipe": "p", "used": {"worker": 5, "cpu": 20, "gpu": 10}},
    {"kind": "asked", "candidates": [{"recipe": "c"}]},
    {"kind": "scored", "split": "search", "recipe": "c", "used": {"worker": 100, "cpu": 400, "gpu": 200},
     "reserved": {"worker": 1000, "cpu": 4000, "gpu": 2000}},
    {"kind": "failed", "split": "search", "used": {"worker": 50, "cpu": 200, "gpu": 100}},
    {"kind": "scored", "split": "holdout", "used": {"worker": 10, "cpu": 40, "gpu": 20}},
    {"kind": "child", "reserved": {"worker": 800, "cpu": 3200, "gpu": 1600}},
    {"kind": "price", "per_hour": 2.0, "currency": "EUR"},
]  # fmt: skip


def test_costs_are_summed_over_the_ledger() -> None:
    """The newest price is that of everything."""
    cost = Spending(LEDGER).to_dict(candidates=4)
    assert cost == {
        "unit": "GPU",
        "used_seconds": 330.0,
        "reserved_seconds": 3600.0,
        "worker_seconds": 1800.0,
        "used_for": {"candidates": 200.0, "failed": 100.0, "holdout": 20.0, "parents": 10.0},
        "seconds_per_candidate": 50.0,
        "price": {"per_hour": 2.0, "currency": "EUR"},
        "money": 1.0,
    }
    assert cost_words(cost) == (
        "1 GPU-hours reserved, 330 GPU-seconds used, 50 GPU-seconds a candidate, 100 GPU-seconds in "
        "attempts that failed; EUR 1.00 at 2 a worker-hour (0.5 worker-hours)"
    )


def test_without_gpus_cpus_are_counted_and_without_a_price_no_money() -> None:
    ledger = [{k: v for k, v in record.items() if k != "gpu"} for record in LEDGER[3:4]]
    ledger[0]["reserved"] = {"worker": 10, "cpu": 20}
    cost = Spending(ledger).to_dict(candidates=0)
    assert cost is not None
    assert (cost["unit"], cost["used_seconds"], cost["reserved_seconds"]) == ("CPU", 400.0, 20.0)
    assert cost["money"] is None and cost["seconds_per_candidate"] is None
    assert "worker-hour" not in cost_words(cost)


def test_a_ledger_of_an_earlier_version_tells_of_no_cost() -> None:
    old = [{k: v for k, v in r.items() if k not in ("used", "reserved")} for r in LEDGER]
    assert Spending(old).to_dict(candidates=4) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 GPU-seconds"), (0.0001, "under 0.001 GPU-seconds"), (3.14159, "3.14 GPU-seconds"),
     (359, "359 GPU-seconds"), (3600, "1 GPU-hours"), (4.5e6, "1,250 GPU-hours"),
     (7.2e9, "2,000,000 GPU-hours")],
)  # fmt: skip
def test_amounts_have_few_digits(seconds: float, text: str) -> None:
    assert hours(seconds, "GPU") == text


def test_the_card_and_the_report_say_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A campaign whose one worker, a gang of two, takes 2 s for each evaluation."""
    run = ScriptedPool.run

    def timed(pool: ScriptedPool, *given: Any) -> Any:
        for progress in run(pool, *given):
            assert progress.scored is not None
            scored = Scored(progress.scored.items, progress.scored.complete, 0.5, 1.5)
            yield Progress(progress.job, 0, scored, seconds=9.0, waited=0.25)

    monkeypatch.setattr(ScriptedPool, "run", timed)
    campaign = scripted(
        tmp_path,
        lambda recipe, item: hash((recipe.id, item.id)) % 2 == 0,
        search={"optimizer": "random", "evaluations": 3, "population": 3},
        cost={"per_hour": 3600.0, "currency": "EUR"},
    )
    campaign._hear(started(0, loading=100.0, members=2))
    result = campaign.run()
    scored = [r for r in records(campaign.store) if r["kind"] == "scored"]
    assert [r["used"] for r in scored] == [{"worker": 4, "cpu": 16, "gpu": 4}] * len(scored)
    assert {r["waited_seconds"] for r in scored} == {0.25}
    child = open_store(result["child"])
    card = child.read("README.md").decode()
    (line,) = [line for line in card.splitlines() if line.startswith(COST_LINE)]
    assert "4 GPU-seconds a candidate; EUR " in line
    page = campaign.store.read("report.html").decode()
    assert "A candidate took 4 GPU-seconds (median of 3)" in page
    assert "<dt>Cost</dt><dd>EUR " in page
    status = campaign_overview(campaign.store.uri)["cost"]
    # 3 candidates, 2 parents; on held-out items the parents and the child.
    assert status["used_for"] == {"candidates": 12, "parents": 8, "holdout": 12}
    assert status["worker_seconds"] >= 2 * 100
    assert status["money"] == pytest.approx(status["worker_seconds"], abs=1e-3)
    before = digests(child.uri)
    child.write("README.md", card.replace(line, f"{COST_LINE}more.").encode())
    assert digests(child.uri) == before, "no two runs take the same, and their children are"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("cost.per_hour=-1", "cost.per_hour: -1.0 is not a price"),
        ("cost.per_hour=.inf", "cost.per_hour: inf is not a price"),
        ("cost.currency=dollars", "cost.currency: 'dollars' is no code"),
        ("log=xml", "log: 'xml' is none of text, json"),
    ],
)
def test_prices_and_logs_that_cannot_be_are_refused(
    tmp_path: Path, override: str, told: str
) -> None:
    with pytest.raises(BadInputError, match=re.escape(told)):
        load_config(str(write_campaign(tmp_path)), [override])
