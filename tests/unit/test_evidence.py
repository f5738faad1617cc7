"""A whole campaign with scripted answers, judged twice: what its store then says of the evidence."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas
import pytest

from orchestrator.ledger.ledger import read_records
from orchestrator.reporting.evidence import shrinkage_note, shrinkage_words, warnings_of
from orchestrator.reporting.items import COLUMNS
from orchestrator.reporting.report import write_report
from orchestrator.reporting.result_lines import result_lines
from tests.benchmarks.null_campaigns import PAGE
from tests.duckdb_rows import rows_of
from tests.scripted_campaign import scripted
from workers.evaluation.task import Item
from workers.merging import Recipe
from workers.storage import Store

SEARCH = {"optimizer": "random", "population": 4}


def answers(recipe: Recipe, item: Item) -> bool:
    """Right or wrong by the toss of a coin, for each recipe and item its own: nobody is better."""
    key = int(recipe.id[:8], 16) ^ int.from_bytes(item.prompt.encode(), "big")
    return key * 0x9E3779B97F4A7C15 % 2**64 / 2**64 < 0.5


@pytest.fixture(scope="module")
def judged_twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any]]:
    """The store of a campaign that went on with a larger budget, and its result."""
    folder = tmp_path_factory.mktemp("campaign")
    results = []
    for evaluations in (4, 8, 16, 24):
        campaign = scripted(folder, answers, search=SEARCH | {"evaluations": evaluations})
        results.append(campaign.run())
        if len({result["recipe_id"] for result in results}) > 1:
            return campaign.store, results[-1]
    raise AssertionError("the first candidates were the best")


def child_file(store: Store, result: dict[str, Any], name: str) -> str:
    return store.read(f"child-{result['recipe_id'][:12]}/{name}").decode()


def test_the_second_child_pays_for_the_first(judged_twice: tuple[Store, dict[str, Any]]) -> None:
    store, result = judged_twice
    assert result["judged"] == 2
    lineage = json.loads(child_file(store, result, "lineage.json"))
    for claim in lineage["claims"]:
        assert claim["p_adjusted"] >= min(1.0, 3 * max(claim["p_items"], claim["p_objective"]))
    card = child_file(store, result, "README.md")
    for text in (card, store.read("report.html").decode()):
        assert (
            "adjusted for 2 parents (Holm) and times 3, because these items have judged 2" in text
        )


def test_search_and_held_out_scores_stand_side_by_side(
    judged_twice: tuple[Store, dict[str, Any]],
) -> None:
    store, result = judged_twice
    lineage = json.loads(child_file(store, result, "lineage.json"))
    curse = lineage["winners_curse"]
    assert curse["models"].keys() == {"child", "reverse", "sort"}
    child = curse["models"]["child"]
    assert child["search"]["objective"] == lineage["search"]["fitness"]
    assert child["holdout"]["objective"] == lineage["holdout_fitness"]["child"]
    assert (
        child["shrinkage"]["objective"]
        == child["search"]["objective"] - child["holdout"]["objective"]
    )
    # Of so few items and candidates, all alike: luck makes a good part of the best score.
    assert 0.03 < curse["expected"] < 0.2
    words = shrinkage_words(curse)
    assert f"was to be expected of the best of {curse['candidates']} candidates that " in words
    for text in (
        child_file(store, result, "README.md"),
        store.read("report.html").decode().replace("&#39;", "'"),
        "\n".join(result_lines(result)),
    ):
        assert words in text
    score = child["search"]["tasks"]["sort"], child["holdout"]["tasks"]["sort"]
    assert f"{score[0]:.3f} to {score[1]:.3f}" in child_file(store, result, "README.md")


def test_what_cannot_be_expected_is_not_told(judged_twice: tuple[Store, dict[str, Any]]) -> None:
    store, result = judged_twice
    lineage = json.loads(child_file(store, result, "lineage.json"))
    unknown = lineage | {"winners_curse": lineage["winners_curse"] | {"expected": None}}
    note = shrinkage_note(unknown)
    assert "With a single search item in a task, what to expect is not known. Parents" in note
    assert "The estimate chooses again" in shrinkage_note(lineage)


def test_overlaps_are_in_store_lineage_card_and_report(
    judged_twice: tuple[Store, dict[str, Any]],
) -> None:
    store, result = judged_twice
    found = json.loads(store.read("contamination.json"))
    assert found["texts"] == {"calibration": 0, "search": 72, "holdout": 144}
    lineage = json.loads(child_file(store, result, "lineage.json"))
    (overlap,) = lineage["contamination"]["overlaps"]
    assert (overlap["of"], overlap["in"], overlap["near"]) == ("holdout", "search", 0)
    assert "| held-out items | search items | 144 | 0 | 0 |" in child_file(
        store, result, "README.md"
    )
    assert re.search(
        r"<th>held-out items</th><td[^>]*>search items</td><td[^>]*>144<",
        store.read("report.html").decode(),
    )


def test_every_item_of_the_ledger_is_in_the_table(
    judged_twice: tuple[Store, dict[str, Any]],
) -> None:
    store, result = judged_twice
    records = list(read_records(store))
    wanted = Counter(
        (record["recipe"], record["split"], task, item["id"], item["score"])
        for record in records
        if record["kind"] == "scored"
        for task, items in record["items"].items()
        for item in items
    )
    place = f"'{store.uri}/items.parquet'"
    columns = rows_of(f"describe select * from {place}")
    assert [column for column, *_ in columns] == list(COLUMNS)
    rows = rows_of(f"select recipe, split, task, item, score from {place}")
    assert Counter(rows) == wanted
    assert set(rows_of(f"select distinct campaign from {place}")) == {("small",)}
    roles = dict(rows_of(f"select distinct recipe, role from {place}"))
    asked = {c["recipe"] for r in records if r["kind"] == "asked" for c in r["candidates"]}
    assert [recipe for recipe, role in roles.items() if role == "child"] == [result["recipe_id"]]
    assert {recipe for recipe, role in roles.items() if role == "candidate"} == asked - {
        result["recipe_id"]
    }
    named = rows_of(f"select distinct name from {place} where role = 'parent'")
    assert set(named) == {("reverse",), ("sort",)}
    generations = dict(rows_of(f"select distinct recipe, generation from {place}"))
    first = {c["recipe"] for c in next(r for r in records if r["kind"] == "asked")["candidates"]}
    assert {recipe for recipe, generation in generations.items() if generation == 0} == first


def test_the_table_can_be_written_again(judged_twice: tuple[Store, dict[str, Any]]) -> None:
    store, _ = judged_twice
    before = store.read("items.parquet")
    store.delete("items.parquet")
    write_report(store)
    assert store.read("items.parquet") == before


@pytest.mark.parametrize("language", ["sql", "python"])
def test_the_documented_queries_work(
    language: str,
    judged_twice: tuple[Store, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, _ = judged_twice
    (tmp_path / "runs").mkdir()
    os.symlink(store.uri, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    queries = [
        text for text in re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
        if "items.parquet" in text
    ]  # fmt: skip
    assert len(queries) == {"sql": 2, "python": 1}[language]
    if language == "python":
        exec(queries[0], {})
        assert "sort" in capsys.readouterr().out
        return
    items = pandas.read_parquet(f"{store.uri}/items.parquet")
    held_out = items[items.split == "holdout"]
    right = held_out.pivot_table(
        index=["task", "item"], columns="role", values="score", aggfunc="max"
    )
    alone = right[(right.child == 1) & (right.parent == 0)]
    assert [row[:2] for row in rows_of(queries[0])] == sorted(alone.index)
    rows = rows_of(queries[1])
    assert len(rows) == 3 * held_out[["role", "name"]].drop_duplicates().shape[0]
    assert all(row[5] in (48, 96) for row in rows)


def test_answers_that_were_cut_off_are_warned_of() -> None:
    def told(truncated: int, unparsed: int) -> list[str]:
        score = {"truncated": truncated, "unparsed": unparsed, "n": 200}
        return warnings_of({"holdout": {"child": {"t": score}}})

    assert told(4, 4) == []
    (warning,) = told(5, 0)
    assert warning.startswith("Answers were cut off at the token limit")
    assert warning.endswith("child on t 5 of 200 (2.5%)")
    assert "count as wrong" in told(0, 7)[0]
    lines = result_lines(
        {"beaten": ["a"], "child": "c", "report": "r", "holdout_fitness": {"child": 1.0, "a": 0.0},
         "warnings": told(5, 0)}
    )  # fmt: skip
    assert lines[-1] == f"warning  {warning}"
    assert "beats    a (p < 0.05 on held-out items)" in lines
