"""The structured log, the status that is watched, and the dashboard's metrics."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import SHIPPED
from orchestrator.ledger.lease import LIFETIME_SECONDS, acquire_lease
from orchestrator.overview import campaign_overview
from orchestrator.watching.following import LIST_SECONDS, Follower, LeaseSign, follow
from orchestrator.watching.json_log import JsonLog
from orchestrator.watching.live_status import clock, watch_status
from orchestrator.watching.metrics import METRICS
from orchestrator.watching.pace import Pace
from orchestrator.watching.watchers import Watchers
from tests.campaigns import records
from tests.scripted_campaign import CandidateFailedError, Stages, scripted
from workers.errors import BadInputError
from workers.storage import Store, open_store
from workers.storage.folder import FolderStore
from workers.storage.traffic import TRAFFIC

SECRET_ANSWER = "an answer that belongs in the ledger alone"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[dict[str, Any]]]:
    """A finished campaign, in which one candidate failed, and its log."""
    folder = tmp_path_factory.mktemp("watched")
    failing: set[str] = set()

    def answers(recipe: Any, item: Any) -> bool:
        if recipe.id not in parents and not failing:
            failing.add(recipe.id)
        if recipe.id in failing:
            raise CandidateFailedError(SECRET_ANSWER[:9] * 1000)
        return hash((recipe.id, item.id)) % 2 == 0

    campaign = scripted(
        folder, answers, search={"optimizer": "random", "evaluations": 6, "population": 3}
    )
    parents = {recipe.id for recipe in campaign.parent_recipes.values()}
    stream = io.StringIO()
    with JsonLog(stream) as log:
        campaign.watcher = Watchers(Stages(), log)
        campaign.run()
    return campaign.store, [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_record_is_a_line_with_the_ids_that_belong_to_it(
    watched: tuple[Store, list[dict[str, Any]]],
) -> None:
    store, lines = watched
    ledger = records(store)
    told = [line for line in lines if line["event"] not in ("begun", "stage", "ended")]
    # The first record, of the epoch, is how the ledger is opened.
    assert [line["event"] for line in told] == [record["kind"] for record in ledger[1:]]
    for line, record in zip(told, ledger[1:], strict=True):
        assert line.get("candidate") == record.get("recipe", record.get("recipe_id"))
        assert (line["campaign"], line["store"]) == ("small", store.uri)
    scored = [line for line in told if line["event"] == "scored"]
    assert [line["items"] for line in scored] == [
        sum(map(len, r["items"].values())) for r in ledger if r["kind"] == "scored"
    ]
    assert {"reverse", "sort"} <= {line.get("parent") for line in scored}
    assert all("node" in line and line["worker"] == 0 for line in scored)
    (failed,) = [line for line in told if line["event"] == "failed"]
    assert failed["level"] == "error" and len(failed["error"]) == 2000
    assert lines[0]["event"] == "begun" and lines[0]["budget"] == 6
    assert lines[-1]["event"] == "ended" and lines[-1]["status"] == "done"
    assert [line["message"] for line in lines if line["event"] == "stage"][
        -1
    ] == "writing the report"


def test_the_log_has_no_answers_genomes_or_configuration(
    watched: tuple[Store, list[dict[str, Any]]],
) -> None:
    assert not any(
        isinstance(value, dict | list) and key not in ("parents", "candidates", "holdout_fitness", "gates")
        for line in watched[1]
        for key, value in line.items()
    )  # fmt: skip


def test_a_log_says_why_a_campaign_ended_and_one_that_breaks_ends_none(tmp_path: Path) -> None:
    for error, told in (
        (BadInputError("no such task"), ("failed", "no such task")),
        (KeyboardInterrupt(), ("interrupted", None)),
    ):
        stream = io.StringIO()
        with pytest.raises(type(error)), JsonLog(stream):
            raise error
        line = json.loads(stream.getvalue())
        assert (line["status"], line.get("error")) == told
    stream = io.StringIO()
    with JsonLog(stream) as log:
        log.stage("reads s3://user:password@host/bucket")
    assert "password" not in stream.getvalue() and "[hidden]@host" in stream.getvalue()
    with JsonLog.to_file("/dev/full") as log:
        log.stage("writes to a disk without room")
        log.stage("and goes on")
    with pytest.raises(BadInputError, match=f"--log {tmp_path}"):
        JsonLog.to_file(str(tmp_path))


# -- status --watch -------------------------------------------------------------------------------


def growing(store: Store, folder: Path) -> Iterator[int]:
    """A copy of a campaign whose records come one by one; how many are there."""
    files = sorted((Path(store.uri) / "ledger").iterdir())
    (folder / "ledger").mkdir(parents=True)
    for number, file in enumerate(files, 1):
        shutil.copy(file, folder / "ledger")
        yield number


def test_what_is_watched_is_at_every_record_what_the_status_says(
    watched: tuple[Store, list[dict[str, Any]]], tmp_path: Path
) -> None:
    store, _ = watched
    copy = growing(store, tmp_path / "small")
    begun = next(i for i, r in enumerate(records(store), 1) if r["kind"] == "campaign")
    while next(copy) < begun:
        with pytest.raises(BadInputError, match="before it began"):
            Follower(str(tmp_path / "small"))
    follower = Follower(str(tmp_path / "small"))
    for _ in copy:
        assert follower.poll()
        expected = campaign_overview(str(tmp_path / "small"))
        found = follower.overview()
        assert {key: found[key] for key in expected} == expected
    assert not follower.poll()


def test_only_what_is_new_is_read(
    watched: tuple[Store, list[dict[str, Any]]], tmp_path: Path
) -> None:
    store, _ = watched
    copy = growing(store, tmp_path / "small")
    while next(copy) < 8:
        pass
    now = [0.0]
    follower = Follower(str(tmp_path / "small"), lambda: now[0])
    before = TRAFFIC.read
    assert not follower.poll()
    assert before == TRAFFIC.read
    newest = tmp_path / "small" / "ledger" / f"{next(copy) - 1:08d}.json"
    assert follower.poll()
    assert TRAFFIC.read - before == newest.stat().st_size
    # Also when the next record is not there by itself any more.
    now[0] += LIST_SECONDS
    assert not follower.poll()


def test_watching_ends_with_the_campaign(
    watched: tuple[Store, list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, _ = watched
    total = len(records(store))
    for as_json in (True, False):
        folder = tmp_path / str(as_json) / "small"
        copy = growing(store, folder)
        while next(copy) < 4:
            pass
        watch_status(str(folder), as_json, lambda seconds, copy=copy: next(copy) and None)
        out = capsys.readouterr().out.splitlines()
        if as_json:
            seen = [json.loads(line) for line in out]
            assert len(seen) == 1 + total - 4
            assert [s["status"] for s in seen] == ["unfinished"] * (len(seen) - 1) + ["done"]
            assert {s["driver"] for s in seen[:-1]} == {"gone"}
        else:
            assert "0/6 evaluations · no candidate yet" in out[0] and "driver gone" in out[0]
            assert re.search(r"status +done", "\n".join(out))


def test_the_pace_is_that_of_the_present_drivers_last_ten_minutes() -> None:
    pace = Pace()

    def scored(time: float, items: int, complete: bool = True) -> dict[str, Any]:
        return {"kind": "scored", "time": time, "split": "search", "complete": complete,
                "items": {"t": [{}] * items}}  # fmt: skip

    def apply(*given: dict[str, Any]) -> None:
        for record in given:
            pace.apply(record)

    apply({"kind": "epoch", "time": 0}, scored(5, 100))
    assert pace.rates() is None and pace.stage == "starting"
    apply({"kind": "asked", "time": 10}, scored(20, 40, complete=False), scored(30, 40))
    assert pace.rates() == (80 / 20, 1 / 20)
    assert pace.to_dict(candidates_left=6)["seconds_left"] == 6 * 20
    # A day later another driver goes on: the time between was nobody's.
    day = 86400.0
    apply({"kind": "epoch", "time": day}, {"kind": "asked", "time": day + 1})
    apply(scored(day + 5, 8), scored(day + 9, 8))
    assert pace.rates() == (16 / 8, 2 / 8)
    apply(*(scored(day + 9 + 10 * step, 10) for step in range(1, 101)))
    items, candidates = pace.rates() or (0, 0)
    assert (items, candidates) == pytest.approx((1.0, 0.1))
    apply({"kind": "selected", "time": day + 2000})
    told = pace.to_dict(candidates_left=0)
    assert told["stage"] == "held-out evaluation" and told["items_per_second"] is None


def test_the_pace_is_known_where_a_candidate_takes_longer() -> None:
    pace = Pace()
    pace.apply({"kind": "epoch", "time": 0})
    pace.apply({"kind": "asked", "time": 0})
    for number in range(1, 4):
        pace.apply({"kind": "scored", "time": 1800 * number, "split": "search", "complete": True,
                    "items": {"t": [{}] * 90}})  # fmt: skip
        assert pace.rates() == (90 / 1800, 1 / 1800)


def test_candidates_that_race_are_through_when_their_race_is() -> None:
    pace = Pace()
    for record in (
        {"kind": "asked", "time": 0},
        {"kind": "race", "time": 0},
        {"kind": "scored", "time": 5, "split": "search", "complete": True, "items": {}},
        {"kind": "raced", "time": 10, "told": dict.fromkeys("abcd", 0.5)},
    ):
        pace.apply(record)
    assert pace.rates() == (0.0, 0.4)


def test_a_driver_is_alive_as_long_as_its_lease_changes(tmp_path: Path) -> None:
    now = [0.0]
    store = FolderStore(tmp_path)
    sign = LeaseSign(store, lambda: now[0])
    assert sign.look() == "gone"
    lease = acquire_lease(store, lambda message: None)
    assert sign.look() == "running"
    now[0] += LIFETIME_SECONDS - 1
    assert sign.look() == "running"
    held = store.read("lease.json")
    lease.release()
    assert sign.look() == "gone"
    store.write("lease.json", held)  # what a driver leaves that is killed
    assert sign.look() == "running"
    now[0] += LIFETIME_SECONDS + 1
    assert sign.look() == "silent"
    store.write("lease.json", b'["not", "a", "lease"]')
    assert sign.look() == "gone"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59, "59 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (100_000, "1 d 3 h")],
)
def test_durations_have_two_parts(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_following_a_campaign_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no campaign here"):
        next(follow(str(tmp_path)))


# -- metrics --------------------------------------------------------------------------------------


def test_stores_count_what_is_read_and_written(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    read, written = TRAFFIC.read, TRAFFIC.written
    store.write("a", b"12345")
    store.create("b", memoryview(b"12345678").cast("I"))
    version = store.read_with_version("a")[1]
    store.replace("a", b"123", version)
    upload = store.begin_parts("c", 7)
    receipt = store.write_part("c", upload, 1, 0, b"1234567")
    store.finish_parts("c", upload, {1: receipt})
    store.read_into("c", 2, memoryview(bytearray(4)))
    assert (TRAFFIC.written - written, TRAFFIC.read - read) == (5 + 8 + 3 + 7, 5 + 4)


DASHBOARD = SHIPPED / "cluster" / "grafana.json"


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are() -> None:
    """That Ray serves them under these names: tests/integration/test_metrics.py."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    labels = {}
    for metric in METRICS:
        own = {"campaign", *metric.labels}
        if metric.kind == "Histogram":
            labels[f"{metric.served_as}_bucket"] = own | {"le"}
        else:
            labels[metric.served_as] = own
    asked = set()
    for query in queries:
        for name, selected in re.findall(r"(ray_\w+)(?:\{(.*?)\})?", query):
            assert set(re.findall(r"(\w+)=~?\"", selected)) <= labels[name], query
            assert 'campaign=~"$campaign"' in selected
            asked.add(name)
        for grouped in re.findall(r"by \((.*?)\)", query):
            known = set().union(*(labels[name] for name in re.findall(r"ray_\w+", query)))
            assert set(grouped.split(", ")) <= known, query
    assert asked == labels.keys(), "every metric is shown"


def test_the_panels_of_the_dashboard_lie_side_by_side() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert len(cells) == 24 * (1 + max(y for _, y in cells)), "24 columns, without a hole"


def test_the_documentation_names_every_metric() -> None:
    text = (SHIPPED.parent / "docs" / "watching.md").read_text()
    found = re.search(r"<!-- metrics -->\n(.*)<!-- end -->", text, re.DOTALL)
    assert found is not None
    rows = [
        f"| `{metric.served_as}` | {', '.join(metric.labels)} | {metric.what} |"
        for metric in METRICS
    ]
    heading = "| metric | labels | what |\n| --- | --- | --- |\n"
    assert found[1] == heading + "".join(f"{row}\n" for row in rows)
