"""`darwin eval`: what it says of results, which it compares, and how the command ends."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from scipy.stats import binom

from orchestrator import cli
from orchestrator.evaluating.comparing import compare_evaluations
from orchestrator.evaluating.evaluation import RECORDS, Recorded, Wish
from orchestrator.evaluating.summary import summarize_task, warnings
from orchestrator.evaluating.threshold import fix_threshold
from orchestrator.ledger.ledger import Ledger
from tests.engine_conformance import write_parent
from tests.openai_server import Manner, serving
from tests.plain_model import PlainModel
from workers.errors import BadInputError
from workers.evaluation import Item, Task
from workers.evaluation.protocols import Greedy, Majority, Protocol
from workers.evaluation.protocols.guessing import guess_score
from workers.evaluation.protocols.retrying import OracleRetry
from workers.storage import open_store

DOCUMENTED = Path(__file__).parents[2] / "docs" / "evaluation.md"


def result(number: int, score: float, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"i{number}", "score": score, "truncated": False, "unparsed": False, "output": "",
        "category": "", "calls": 1, "tokens": 5, **changes,
    }  # fmt: skip


def by_id(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in results}


# -- the threshold -------------------------------------------------------------------------------


def test_the_threshold_tells_wrong_dev_items_best_from_right_ones() -> None:
    chance = random.Random(5)
    for _ in range(50):
        items = [
            result(n, 0.0, stages=[float(right)], doubt=round(chance.gauss(1 - right, 1), 1))
            for n, right in enumerate([chance.random() < 0.6 for _ in range(30)] + [True, False])
        ]
        items[0] |= {"doubt": None, "stages": [0.0]}  # no answer: always asked again
        found = fix_threshold("t", by_id(items))

        def index(threshold: float, items: list[dict[str, Any]] = items) -> float:
            shares = []
            for score in (0.0, 1.0):
                own = [one for one in items if one["stages"][0] == score]
                again = [1 for one in own if one["doubt"] is None or one["doubt"] >= threshold]
                shares.append(len(again) / len(own))
            return shares[0] - shares[1]

        # Every threshold there could be, not only those that are doubts of items.
        best = max(index(step / 20) for step in range(-100, 120))
        assert index(found["threshold"]) == pytest.approx(best)
        higher = [one["doubt"] for one in items if (one["doubt"] or -9) > found["threshold"]]
        assert all(index(doubt) < best - 1e-12 for doubt in higher)
        assert found["items"] == 32


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_dev_items_that_are_all_right_or_all_wrong_fix_no_threshold(score: float) -> None:
    items = by_id([result(n, score, stages=[score], doubt=0.5) for n in range(4)])
    with pytest.raises(BadInputError, match=rf"task t: of 4 dev items {int(4 * score)} were"):
        fix_threshold("t", items)


# -- what is asked in one call ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "choices", "protocol", "batch_size", "block"),
    [
        ([198], 0, Greedy(), 32, 32),  # of 13 items only 13 rows of a batch would be full
        ([198], 0, Greedy(), 8, 13),
        ([198], 4, Greedy(), 32, 13),  # each has four texts
        ([198], 0, Majority(8), 32, 13),
        ([800, 200], 0, Greedy(), 32, 63),
        ([12_000], 0, Greedy(), 32, 128),  # more are not worth what a worker's death would cost
        ([5], 0, Greedy(), 32, 32),
    ],
)
def test_blocks_are_about_sixteen_unless_batches_would_be_half_empty(
    counts: list[int], choices: int, protocol: Protocol, batch_size: int, block: int
) -> None:
    kind = "multiple_choice" if choices else "exact_match"
    answers = tuple(map(str, range(choices)))
    tasks = tuple(
        Task(f"t{n}", kind, {"holdout": (Item("i", "p", 0, answers),) * count})
        for n, count in enumerate(counts)
    )
    assert Wish(tasks, "holdout", protocol, {}, batch_size).block_items == block


# -- the summary ---------------------------------------------------------------------------------


def summarize(
    results: list[dict[str, Any]], choices: int = 0, protocol: Protocol | None = None
) -> dict[str, Any]:
    items = tuple(
        Item(one["id"], "p", "a", tuple(map(str, range(choices))), one["category"])
        for one in results
    )
    task = Task("t", "exact_match", {"search": (), "holdout": items})
    return summarize_task(task, items, by_id(results), protocol or Greedy())


def test_a_summary_counts_what_there_is() -> None:
    results = [result(n, float(n % 4 == 0), category="xy"[n % 2]) for n in range(198)]
    results[3] |= {"unparsed": True, "truncated": True, "tokens": 104}
    found = summarize(results)
    assert (found["n"], found["correct"], found["unparsed"], found["truncated"]) == (198, 50, 1, 1)
    assert found["calls_per_item"] == 1
    assert found["tokens_per_item"] == pytest.approx((197 * 5 + 104) / 198)
    # Wilson 1927, by hand: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    z, p, n = 1.959963984540054, 50 / 198, 198
    spread = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    middle, scale = p + z**2 / (2 * n), 1 + z**2 / n
    assert found["low"] == pytest.approx((middle - spread) / scale)
    assert found["high"] == pytest.approx((middle + spread) / scale)
    assert {name: (c["n"], c["correct"]) for name, c in found["categories"].items()} == {
        "x": (99, 50),
        "y": (99, 0),
    }


def test_stages_and_the_guess_baseline_are_those_of_the_card() -> None:
    """148, 166 and 176 of 198: the numbers of the card of Darwin-28B-Opus."""
    stages = [[1.0]] * 148 + [[0.0, 1.0]] * 18 + [[0.0, 0.0, 1.0]] * 10 + [[0.0, 0.0]] * 22
    results = [
        result(n, passed[-1], stages=passed, calls=[1, 9, 13][len(passed) - 1], cut=0, doubt=None)
        for n, passed in enumerate(stages)
    ]
    found = summarize(results, 4, OracleRetry(tie_samples=0))
    assert [stage["correct"] for stage in found["stages"]] == [148, 166, 176]
    assert [stage["asked"] for stage in found["stages"]] == [198, 50, 10]
    assert found["calls"] == 148 + 40 * 9 + 10 * 13
    assert found["guess"]["at_once"] == 0.25
    assert found["guess"]["with_retries"] == pytest.approx(0.25 + 0.75 * 0.25, abs=0.006)
    assert summarize(results, 0, OracleRetry())["guess"] is None  # nothing to choose


def test_more_than_two_percent_of_cut_answers_are_warned_of() -> None:
    def warned(cut: int, limit: int | None = 64) -> list[str]:
        results = [result(n, 1.0, truncated=n < cut) for n in range(200)]
        return warnings({"t": summarize(results)}, {"t": limit})

    assert warned(4) == []
    assert warned(5) == [
        "t: 5 of 200 answers (2.5%) were cut at 64 tokens and are scored as they stand: raise "
        "max_new_tokens"
    ]
    (of_lm_eval,) = warned(5, None)
    assert "cut at the token limit" in of_lm_eval and "gen_kwargs.max_gen_toks" in of_lm_eval


def test_more_than_two_percent_of_unread_answers_are_warned_of() -> None:
    def warned(unread: int) -> list[str]:
        results = [result(n, 0.0, unparsed=n < unread) for n in range(200)]
        return warnings({"t": summarize(results)}, {"t": 64})

    assert warned(4) == []
    (warning,) = warned(5)
    assert warning.startswith("t: in 5 of 200 items (2.5%) no answer could be read")


# -- comparisons ---------------------------------------------------------------------------------


def recorded(scores: list[float], **identity: Any) -> Recorded:
    known = {
        "split": "holdout", "protocol": {"name": "greedy", "seed": 0}, "tasks": {"t": "f00d"},
        "engine": {"dtype": "float32"},
    }  # fmt: skip
    items = by_id([result(n, score) for n, score in enumerate(scores)])
    return Recorded("place", known | identity, "model", {"torch": "2"}, {"t": items})


def test_two_evaluations_are_compared_item_by_item() -> None:
    ours = [1.0] * 30 + [0.0] * 3 + [1.0] * 40 + [0.0] * 27
    theirs = [0.0] * 30 + [1.0] * 3 + [1.0] * 40 + [0.0] * 27
    found = compare_evaluations(recorded(ours), recorded(theirs))
    own = found["tasks"]["t"]
    assert (own["only_this"], own["only_other"]) == (30, 3)
    assert own["p_value"] == pytest.approx(2 * binom.cdf(3, 33, 0.5))
    assert own["difference"] == pytest.approx(0.27)
    deviation = math.sqrt((0.33 - 0.27**2) / 100)
    assert own["low"] == pytest.approx(0.27 - 1.96 * deviation, abs=0.011)
    assert own["high"] == pytest.approx(0.27 + 1.96 * deviation, abs=0.011)
    assert found["scores"] == {"t": 0.43}
    assert found["warnings"] == []


def test_over_tasks_of_different_sizes_test_and_interval_are_of_the_same_mean() -> None:
    """Worse on 20 of 200 items, better on 8 of 10: by items it lost, by tasks it won."""
    own, other = recorded([]), recorded([])
    for one, first, second in ((own, 0.0, 1.0), (other, 1.0, 0.0)):
        one.results["t"] = by_id([result(n, first if n < 20 else 1.0) for n in range(200)])
        one.results["u"] = by_id([result(n, second if n < 8 else 1.0) for n in range(10)])
    found = compare_evaluations(own, other)["tasks"]["all"]
    assert (found["only_this"], found["only_other"]) == (8, 20)
    assert found["difference"] == pytest.approx((8 / 10 - 20 / 200) / 2)
    assert found["low"] > 0
    # All ways in which the signs of the differences may fall, each as likely as any other.
    exact = sum(
        binom.pmf(a, 20, 0.5) * binom.pmf(b, 8, 0.5)
        for a in range(21)
        for b in range(9)
        if abs((2 * b - 8) / 10 + (2 * a - 20) / 200) >= 0.7 - 1e-9
    )
    assert found["p_value"] == pytest.approx(exact, abs=0.006)
    assert found["p_value"] < 0.05


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        ({"split": "search"}, "split"),
        ({"protocol": {"name": "greedy", "seed": 1}}, "protocol.seed"),
        ({"protocol": {"name": "majority", "seed": 0}}, "protocol.name"),
        ({"tasks": {"t": "beef"}}, "tasks.t"),
        ({"tasks": {"t": "f00d", "u": "f00d"}}, "tasks.u"),
    ],
)
def test_what_was_asked_in_another_way_is_not_compared(
    identity: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadInputError, match=rf"place: cannot be compared .* differ in {named}"):
        compare_evaluations(recorded([1.0]), recorded([1.0], **identity))


def test_another_engine_is_told() -> None:
    other = recorded([1.0], engine={"dtype": "bfloat16"})
    other.description = {"torch": "1"}
    (warning,) = compare_evaluations(recorded([1.0]), other)["warnings"]
    assert "engine_settings.dtype, torch differ" in warning


# -- the command ---------------------------------------------------------------------------------


class Darwin:
    """Runs `darwin eval` in this process, as the installed script does."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capture = patch, capture

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """What it printed on standard output; on standard error if it failed."""
        self.capture.readouterr()
        self.patch.setattr(sys, "argv", ["darwin", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = self.capture.readouterr()
        assert caught.value.code == code, printed.err
        self.told = printed.err
        return printed.err if code else printed.out


@pytest.fixture
def darwin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Darwin:
    monkeypatch.chdir(tmp_path)
    return Darwin(monkeypatch, capsys)


SMALL = ("--task", "reverse", "--items", 48, "--dtype", "float32", "--batch-size", 16)


def test_a_model_is_evaluated_once_and_compared_with_what_is_stored(darwin: Darwin) -> None:
    first = json.loads(darwin("shipped:strings/sort", *SMALL, "--json"))
    assert first["evaluation"].startswith(f"{Path.cwd()}/runs/eval/sort-")
    assert first["tasks"]["reverse"]["n"] == 48
    assert (first["seed"], first["uses_gold_labels"]) == (0, False)
    stored = json.loads(Path(first["evaluation"], "result.json").read_text())
    assert stored.items() <= (first | {"warnings": []}).items()

    second = json.loads(
        darwin("shipped:strings/reverse", *SMALL, "--against", first["evaluation"], "--json")
    )
    (other,) = second["against"]
    only = other["tasks"]["reverse"]
    correct = [one["tasks"]["reverse"]["correct"] for one in (first, second)]
    assert only["only_this"] - only["only_other"] == correct[1] - correct[0]
    assert other["scores"]["reverse"] == correct[0] / 48

    # Nothing is asked again: there is no model any more that could be.
    ledger = Ledger(open_store(first["evaluation"]).substore(RECORDS))
    again = json.loads(darwin("shipped:strings/sort", *SMALL, "--json"))
    assert again == first
    after = Ledger(open_store(first["evaluation"]).substore(RECORDS))
    assert after.records == ledger.records
    assert "all of it is recorded" in darwin.told


def test_retries_by_gold_labels_are_flagged_on_every_output(darwin: Darwin) -> None:
    asked = ("shipped:strings/sort", *SMALL, "--protocol", "oracle_retry")
    text = darwin(*asked)
    assert "uses gold labels" in text
    assert "reverse (uses gold labels)" in text
    assert "no guess baseline" in text
    data = json.loads(darwin(*asked, "--json"))
    assert data["uses_gold_labels"] is True
    assert json.loads(Path(data["evaluation"], "result.json").read_text())["uses_gold_labels"]
    table = pyarrow.parquet.read_table(Path(data["evaluation"], "items.parquet"))
    assert set(table["protocol"].to_pylist()) == {"oracle_retry (uses gold labels)"}
    assert sum(table["score"].to_pylist()) == data["tasks"]["reverse"]["correct"]
    task = data["tasks"]["reverse"]
    assert next(stage["asked"] for stage in task["stages"]) == 48
    assert task["stages"][-1]["correct"] == task["correct"]


def test_a_served_checkpoint_has_the_scores_of_a_live_one(darwin: Darwin, tmp_path: Path) -> None:
    parent = write_parent(tmp_path / "parent", "llama", {})
    prompts = ["abc", "the quick", "zebra =", "hello"]
    task = {"kind": "exact_match", "items": {}, "max_new_tokens": 6}
    for split, own in {"search": prompts[:1], "holdout": prompts[1:]}.items():
        file = tmp_path / f"{split}.jsonl"
        items = [{"id": prompt, "prompt": prompt, "answer": "x"} for prompt in own]
        file.write_text("\n".join(map(json.dumps, items)))
        task["items"][split] = str(file)  # type: ignore[index]
    (tmp_path / "letters.yaml").write_text(json.dumps(task))
    asked = (parent, "--task", "letters.yaml", "--dtype", "float32")
    live = json.loads(darwin(*asked, "--json"))
    plain = PlainModel(parent)
    with serving(plain, Manner()) as address:
        asked = (*asked, "--engine", "openai", "--model", "tiny", "--base-url", address)
        served = json.loads(darwin(*asked, "--json"))
    with serving(plain, Manner()) as address:  # at another port: what is known is known
        again = json.loads(darwin(*asked[:-1], address, "--json"))
    assert again == served

    # The other would be asked at the same server, and its answers kept as those of another checkpoint.
    refused = darwin(*asked, "--against", "shipped:strings/base", code=2)
    assert "--against shipped:strings/base: the server at --base-url has one checkpoint" in refused
    compared = json.loads(darwin(*asked, "--against", live["evaluation"], "--json"))
    assert compared["against"][0]["scores"] == {"letters": live["tasks"]["letters"]["score"]}

    def outputs(place: str) -> dict[str, str]:
        ledger = Ledger(open_store(place).substore(RECORDS))
        blocks = [record["items"]["letters"] for record in ledger.of_kind("scored")]
        return {item["id"]: item["output"] for block in blocks for item in block}

    assert outputs(served["evaluation"]) == outputs(live["evaluation"])
    assert served["tasks"]["letters"]["tokens"] == live["tasks"]["letters"]["tokens"]


@pytest.mark.parametrize(
    "command", re.findall(r"^darwin eval (shipped:.*)$", DOCUMENTED.read_text(), re.MULTILINE)
)
def test_what_the_documentation_shows_can_be_run(darwin: Darwin, command: str) -> None:
    result = json.loads(darwin(*command.split(), "--items", 8, "--json"))
    assert all(task["n"] == 8 for task in result["tasks"].values())


def test_the_documented_worth_of_a_guess_is_what_is_computed() -> None:
    figures = re.search(r"gives it a quarter of that, (.*?); with .*? it has (.*?)\. ",
                        " ".join(DOCUMENTED.read_text().split()))  # fmt: skip
    assert figures is not None
    assert [float(figure) for figure in figures.groups()] == [
        round(guess_score(8, ties, 1, 4), 2) for ties in (0, 4)
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--task", "nothing"), "'nothing' is no task that ships"),
        ((*SMALL, "--task", "reverse"), "--task: the names"),
        ((*SMALL, "--protocol", "best"), "--protocol: 'best' is none of"),
        ((*SMALL, "--protocol", "three_stage"), "--dev-items"),
        ((*SMALL, "--protocol", "three_stage", "--dev-items", 500), "has 128 search items"),
        (
            (*SMALL, "--protocol", "three_stage", "--dev-items", 5, "--split", "search"),
            "items that fix it cannot be judged",
        ),
        ((*SMALL, "--protocol", "majority@8", "--parameter", "hot"), "is not KEY=VALUE"),
        ((*SMALL, "--dev-items", 8), "--dev-items: are for --protocol three_stage"),
        ((*SMALL, "--split", "train"), "--split: 'train' is none of search, holdout"),
        ((*SMALL, "--engine", "magic"), "--engine: 'magic' is none of"),
        ((*SMALL, "--engine", "openai"), "needs --base-url and --model"),
        ((*SMALL, "--model", "m"), "are for --engine openai"),
        ((*SMALL, "--device", "tpu"), "--device: 'tpu'"),
        ((*SMALL, "--dtype", "int8"), "--dtype: 'int8'"),
        ((*SMALL, "--workers", -1), "--workers: -1 must be 0 or more"),
        ((*SMALL, "--address", "auto"), "--address: is for Ray workers"),
        ((*SMALL, "--against", "no/such/folder"), "no/such/folder"),
        ((), "Missing option '--task'"),
    ],
)
def test_what_cannot_work_ends_with_2_and_one_line(
    darwin: Darwin, arguments: tuple[object, ...], problem: str
) -> None:
    error = darwin("shipped:strings/sort", *arguments, code=2)
    assert error.startswith("darwin: ")
    assert error.count("\n") == 1
    assert problem in error
    assert not Path("runs").exists()  # nothing was begun


def test_an_evaluation_that_is_not_finished_is_not_compared_with(darwin: Darwin) -> None:
    first = json.loads(darwin("shipped:strings/sort", *SMALL, "--json"))
    records = Path(first["evaluation"], RECORDS, "ledger")
    sorted(records.iterdir())[-1].unlink()
    error = darwin(
        "shipped:strings/sort", *SMALL, "--seed", 1, "--against", first["evaluation"], code=2
    )
    assert "this evaluation is not finished" in error


def test_an_evaluation_goes_on_only_with_an_engine_that_is_alike(darwin: Darwin) -> None:
    first = json.loads(darwin("shipped:strings/sort", *SMALL, "--json"))
    records = sorted(Path(first["evaluation"], RECORDS, "ledger").iterdir())
    for file in records:
        record = json.loads(file.read_text())
        if record["kind"] in ("scored", "evaluated"):
            file.unlink()
        elif record["kind"] == "engine":
            record["description"]["torch"] = "0.1"
            file.write_text(json.dumps(record))
    error = darwin("shipped:strings/sort", *SMALL, code=2)
    assert "torch '0.1' -> " in error
