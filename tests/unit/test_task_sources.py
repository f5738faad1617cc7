"""Tasks whose file says where rows are and how they become items."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from workers.errors import BadInputError
from workers.evaluation import Chat, Decoding, Item, Task, load_task, score_batch
from workers.evaluation.protocols.turning import permute_choices
from workers.evaluation.tasks.reasoning_gym_scorer import check_runs_nothing, reasoning_gym_score
from workers.evaluation.tasks.tables import share_of

Data = dict[str, Any]


def row(number: int, **changes: Any) -> Data:
    return {
        "nr": number, "text": f"What is {number}?", "good": f"it is {number}",
        "bad": ["nothing", "a lot"], "field": "even" if number % 2 == 0 else "odd",
    } | changes  # fmt: skip


FIELDS = {
    "id": "nr", "question": "text", "choices": "[good] + bad", "answer": "0", "category": "field",
}  # fmt: skip
PROMPT = "{{ question }}{% for choice in choices %}\n{{ letters[loop.index0] }}) {{ choice }}{% endfor %}"


class Folder:
    """A folder with files of rows, and a task on them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("a", [row(n) for n in range(30)])
        self.write("b", [row(n) for n in range(30, 50)])

    def write(self, name: str, rows: list[Any]) -> str:
        file = self.path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
        return str(file)

    def definition(self, **changes: Any) -> Data:
        """`None` removes a key."""
        data = {
            "kind": "generation",
            "source": {"files": {name: str(self.path / f"{name}.jsonl") for name in "ab"},
                       "search": "a", "holdout": "b"},
            "fields": FIELDS, "prompt": PROMPT, "extract": ["answer_letter"], "score": "letter",
        } | changes  # fmt: skip
        return {key: value for key, value in data.items() if value is not None}

    def load(self, limits: dict[str, int | None] | None = None, **changes: Any) -> Task:
        return load_task("t", yaml.safe_dump(self.definition(**changes)), limits)

    def refusal(self, **changes: Any) -> str:
        with pytest.raises(BadInputError) as caught:
            self.load(**changes)
        message = str(caught.value)
        assert message.startswith("task t: ")
        assert len(message) < 700
        return message

    def source(self, **changes: Any) -> Data:
        data = self.definition()["source"] | changes
        return {key: value for key, value in data.items() if value is not None}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


ONE_SPLIT = {"search": "a", "holdout": "a", "seed": 7, "search_share": 0.4}


def ids(task: Task, split: str) -> list[str]:
    return [item.id for item in task.items[split]]


# -- rows and fields -------------------------------------------------------------------------


def test_rows_become_items_by_the_fields_of_the_task(folder: Folder) -> None:
    task = folder.load()
    assert ids(task, "search") == [str(n) for n in range(30)]
    assert task.items["holdout"][0] == Item(
        "30", "What is 30?\nA) it is 30\nB) nothing\nC) a lot", "A", ("it is 30", "nothing", "a lot"),
        "even", "What is 30? a lot it is 30 nothing", (), json.dumps({"question": "What is 30?"}),
    )  # fmt: skip
    assert task.origin == "files"


def test_without_fields_columns_are_what_they_are_called(folder: Folder) -> None:
    rows = [{"question": f"q{n}", "answer": n} for n in range(3)]
    files = {"search": folder.write("s", rows[:2]), "holdout": [folder.write("h", rows[2:])]}
    task = folder.load(
        source={"files": files},
        fields=None,
        prompt="{{ question }}=",
        extract=["whole"],
        score="exact",
    )
    assert [(item.text, item.answer) for item in task.items["search"]] == [
        ("q0=", "0"),
        ("q1=", "1"),
    ]
    named = {item.id for items in task.items.values() for item in items}
    assert len(named) == 3 and all(len(name) == 16 for name in named)


def test_parquet_files_are_read(folder: Folder) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    file = folder.path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row(n) for n in range(30)]), file)
    task = folder.load(
        source=folder.source(files={"a": f"file://{file}", "b": str(folder.path / "b.jsonl")})
    )
    assert task.items == folder.load().items


def test_a_task_may_ask_in_conversations_and_sample(folder: Folder) -> None:
    task = folder.load(
        chat=True, system="Be brief.", prompt="{{ question }}",
        decoding={"max_new_tokens": 5, "stop": ["."], "temperature": 0.7, "top_p": 0.9},
    )  # fmt: skip
    assert task.items["search"][0].prompt == Chat("What is 0?", "Be brief.")
    assert task.decoding == Decoding(5, (".",), 0.7, 0.9)


def test_choices_may_be_judged_by_likelihood(folder: Folder) -> None:
    task = folder.load(
        kind="multiple_choice",
        prompt="{{ question }}",
        extract=None,
        score=None,
        length_normalized=True,
    )
    assert task.items["search"][3].choices == (" it is 3", " nothing", " a lot")
    assert task.items["search"][3].answer == 0
    letters = folder.load(
        kind="multiple_choice",
        extract=None,
        score=None,
        continuation=" ({{ letter }}) {{ question }}",
    )
    assert letters.items["search"][3].choices[1] == " (B) What is 3?"


def test_a_question_may_not_show_its_answer(folder: Folder) -> None:
    assert "t: prompt shows {{ answer }}" in folder.refusal(prompt="{{ question }} {{ answer }}")


@pytest.mark.parametrize("attempt", ["''.__class__", "row.__init__.__globals__", "[].append(1)"])
def test_a_template_is_data_and_not_code(folder: Folder, attempt: str) -> None:
    assert "SecurityError" in folder.refusal(fields=FIELDS | {"question": attempt})
    assert "SecurityError" in folder.refusal(
        prompt="{{ question }}{{ " + attempt.replace("row", "letters") + " }}"
    )


# -- shuffles and divisions ------------------------------------------------------------------


def test_a_shuffle_depends_on_seed_and_id_alone(folder: Folder) -> None:
    def shuffles(seed: int) -> dict[str, Item]:
        return {item.id: item for item in folder.load(shuffle_choices=seed).items["search"]}

    before, other = shuffles(42), shuffles(43)
    rows = [row(n) for n in range(30) if n != 5]
    random.Random(0).shuffle(rows)
    folder.write("a", rows)
    after = shuffles(42)
    assert before.keys() - after.keys() == {"5"}
    assert all(before[name] == item for name, item in after.items())
    assert any(before[name].permutation != item.permutation for name, item in other.items())
    for item in before.values():
        order = list(range(3))
        random.Random(f"42:{item.id}").shuffle(order)
        assert item.permutation == tuple(order)
        assert item.choices["ABC".index(str(item.answer))] == f"it is {item.id}"


def test_one_split_is_divided_by_the_hash_of_each_id(folder: Folder) -> None:
    def divided(**changes: Any) -> dict[str, list[str]]:
        task = folder.load(source=folder.source(**ONE_SPLIT | changes))
        return {split: ids(task, split) for split in task.items}

    found = divided()
    assert sorted(map(int, found["search"] + found["holdout"])) == list(range(30))
    assert 5 < len(found["search"]) < 20
    assert found["search"] == sorted(
        (str(n) for n in range(30) if share_of(7, str(n)) < 0.4), key=lambda name: share_of(7, name)
    )
    assert divided(seed=8)["search"] != found["search"]
    # More rows, in another order: each stays where it was.
    folder.write("a", [row(n) for n in reversed(range(60))])
    more = divided()
    assert [name for name in more["search"] if int(name) < 30] == found["search"]
    # A smaller share is a part of a larger one.
    assert set(divided(search_share=0.1)["search"]) < set(more["search"])


def test_a_share_is_the_published_hash() -> None:
    """sha256("7:3") begins with these digits (coreutils' sha256sum)."""
    digits = subprocess.run(["sha256sum"], input=b"7:3", capture_output=True, check=True).stdout[
        :16
    ]
    assert share_of(7, "3") == int(digits, 16) / 2**64


def test_a_question_that_judges_does_not_steer(folder: Folder) -> None:
    """By its own words: other ids, white space and orders of choices make no other question."""
    folder.write("a", [row(1), row(101, text="What  is\n30? ", good="it is 30", bad=["a lot", "nothing"]),
                       row(2), row(102, text="What is 2?", good="it is 2"), row(3)])  # fmt: skip
    task = folder.load(shuffle_choices=1)
    assert ids(task, "search") == ["1", "2", "3"]
    assert len(ids(task, "holdout")) == 20
    assert task.left_out == {"search": 2, "holdout": 0}
    # However few of them the campaign uses.
    assert ids(folder.load({"holdout": 1}), "search") == ["1", "2", "3"]


def test_numbers_of_items_are_the_campaigns_then_the_tasks(folder: Folder) -> None:
    source = folder.source(search_items=4, holdout_items=2)
    task = folder.load(source=source)
    assert [len(items) for items in task.items.values()] == [4, 2]
    task = folder.load({"search": 9, "holdout": None}, source=source)
    assert [len(items) for items in task.items.values()] == [9, 2]


# -- examples --------------------------------------------------------------------------------

SHOT = {"template": "{{ question }} {{ letter }} {{ choices[answer] }}"}
WITH_SHOTS = "{{ shots }}{{ question }}"


def test_examples_are_the_first_rows_of_a_split(folder: Folder) -> None:
    few_shot = SHOT | {"split": "a", "count": 2, "separator": "; "}
    task = folder.load(few_shot=few_shot, prompt=WITH_SHOTS, shuffle_choices=3)
    first = "What is 0? A it is 0; What is 1? A it is 1; "
    assert task.items["holdout"][0].text == f"{first}What is 30?"
    assert ids(task, "search")[0] == "2"  # the examples are no items
    same = folder.load(few_shot=few_shot | {"same_category": True}, prompt=WITH_SHOTS)
    odd = "What is 1? A it is 1; What is 3? A it is 3; "
    assert same.items["holdout"][1].text == f"{odd}What is 31?"
    assert set(same.shots) == {"even", "odd"}


def test_examples_may_be_given(folder: Folder) -> None:
    examples = [{"question": "What is 30?", "answer": 1, "choices": ["it is 30", "a lot"]}]
    task = folder.load(few_shot=SHOT | {"examples": examples}, prompt=WITH_SHOTS)
    assert task.items["search"][0].text == "What is 30? B a lot\n\nWhat is 0?"
    few_shot = SHOT | {"examples": examples, "same_category": True, "separator": ""}
    message = folder.refusal(few_shot=few_shot, prompt=WITH_SHOTS)
    assert "few_shot.same_category is true, but there is no example of category 'even'" in message
    few_shot["examples"] = [
        example | {"category": c} for example in examples for c in ("even", "odd")
    ]
    assert (
        folder.load(few_shot=few_shot, prompt=WITH_SHOTS)
        .items["search"][0]
        .text.startswith("What is 30? B a lotWhat is 0?")
    )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"choices": [2, 3]}, "few_shot.examples 1: the choice 2 is no text"),
        ({"choices": 5}, "few_shot.examples 1: choices must be 2 to 26 texts, not 5"),
        ({"choices": []}, "few_shot.examples 1: choices must be 2 to 26 texts"),
        ({"answer": 2}, "must number choices from 0: few_shot.examples 1 has the answer 2"),
        ({"answer": -1}, "few_shot.examples 1 has the answer -1"),
        ({"answer": 30}, "few_shot.examples 1 has the answer 30"),
    ],
)
def test_a_wrong_example_is_refused(folder: Folder, values: Data, named: str) -> None:
    """Unquoted numbers as choices, choices counted from 1: no traceback, and no wrong letter shown."""
    example = {"question": "What is 30?", "answer": 1, "choices": ["it is 30", "a lot"]} | values
    assert named in folder.refusal(few_shot=SHOT | {"examples": [example]}, prompt=WITH_SHOTS)


def test_an_example_may_write_its_answer_out(folder: Folder) -> None:
    """It says by itself, in words, what the letter is."""
    example = {"question": "What is 30?", "answer": "B, as ever", "choices": ["x", "a lot"]}
    few_shot = {"template": "{{ question }} {{ answer }}", "examples": [example]}
    task = folder.load(few_shot=few_shot, prompt=WITH_SHOTS)
    assert task.items["search"][0].text == "What is 30? B, as ever\n\nWhat is 0?"


# -- scoring ---------------------------------------------------------------------------------


class Saying:
    """An engine that says the same to everything."""

    def __init__(self, text: str, truncated: bool = False) -> None:
        self.text, self.truncated, self.seeds = text, truncated, []

    def generate(self, prompts: Any, decoding: Decoding, seeds: Any = ()) -> list[Any]:
        from workers.evaluation import Generation

        self.seeds = list(seeds)
        return [Generation(self.text, self.truncated, 9) for _ in prompts]


def test_answers_are_extracted_scored_and_counted(folder: Folder) -> None:
    task = folder.load()
    items = task.items["search"][:2]
    right: Any = Saying("x" * 500 + "\nAnswer: A")
    results = score_batch(right, task, items)
    assert [(r.id, r.score, r.unparsed, r.category, r.tokens) for r in results] == [
        ("0", 1.0, False, "even", 9), ("1", 1.0, False, "odd", 9),
    ]  # fmt: skip
    assert results[0].output.endswith("Answer: A")  # of a long answer the end is kept
    assert right.seeds == []
    cut: Any = Saying("I think that", truncated=True)
    (result, _) = score_batch(cut, task, items)
    assert (result.score, result.unparsed, result.truncated) == (0.0, True, True)


def test_each_sampled_item_has_a_seed_of_its_own(folder: Folder) -> None:
    task = folder.load(decoding={"temperature": 1.0})
    engine: Any = Saying("Answer: A")
    score_batch(engine, task, task.items["search"][:3])
    assert len(set(engine.seeds)) == 3
    first = engine.seeds[0]
    score_batch(engine, task, task.items["search"][:1])
    assert engine.seeds == [first]


def test_choices_can_be_put_in_another_order(folder: Folder) -> None:
    shots = SHOT | {"split": "a", "count": 1}
    task = folder.load(few_shot=shots, prompt="{{ shots }}" + PROMPT, shuffle_choices=42, chat=True)
    item = task.items["search"][0]
    assert permute_choices(task, item, [0, 1, 2]) == item
    other = permute_choices(task, item, [2, 0, 1])
    assert isinstance(item.prompt, Chat) and isinstance(other.prompt, Chat)
    lines = item.prompt.user.split("\n")
    a, b, c = (line[3:] for line in lines[-3:])
    assert other.prompt.user.split("\n") == [*lines[:-3], f"A) {c}", f"B) {a}", f"C) {b}"]
    assert other.choices["ABC".index(str(other.answer))] == "it is 1"
    source = ["it is 1", "nothing", "a lot"]
    assert [source[number] for number in other.permutation] == list(other.choices)


# -- identity --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": PROMPT + " "},
        {"shuffle_choices": 1},
        {"chat": True},
        {"extract": ["answer_letter", "boxed_letter"]},
        {"score": "exact"},
        {"decoding": {"temperature": 0.5}},
        {"decoding": {"top_p": 0.5}},
        {"fields": FIELDS | {"category": "''"}},
        {"few_shot": SHOT | {"examples": [{"question": "q", "answer": 0, "choices": ["y", "n"]}]},
         "prompt": PROMPT + "{{ shots }}"},
    ],
)  # fmt: skip
def test_whatever_changes_an_answer_changes_the_fingerprint(folder: Folder, changes: Data) -> None:
    plain, changed = folder.load(), folder.load(**changes)
    assert changed.fingerprint != plain.fingerprint
    assert changed.template_hash != plain.template_hash
    assert folder.load().fingerprint == plain.fingerprint


def test_the_same_rows_elsewhere_are_the_same_task(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = Folder(tmp_path / "elsewhere").load()
    assert (other.fingerprint, other.template_hash) == (
        folder.load().fingerprint, folder.load().template_hash,
    )  # fmt: skip


# -- procedural items ------------------------------------------------------------------------

GYM = {
    "kind": "generation", "extract": ["last_number"], "score": "reasoning_gym",
    "source": {"reasoning_gym": "chain_sum", "config": {"max_terms": 3, "max_digits": 2},
               "seeds": {"search": 1, "holdout": 2}},
}  # fmt: skip


def gym(limits: dict[str, int | None], source: Data | None = None, **changes: Any) -> Task:
    pytest.importorskip("reasoning_gym")
    definition = GYM | changes | {"source": GYM["source"] | (source or {})}  # type: ignore[operator]
    return load_task("t", yaml.safe_dump(definition), limits)


def test_procedural_splits_are_disjoint_and_have_nothing_twice() -> None:
    # Near seeds, of which the library itself makes nearly the same items.
    task = gym({"search": 700, "holdout": 300})
    questions = [item.question for items in task.items.values() for item in items]
    assert len(set(questions)) == 1000
    assert len({item.id for items in task.items.values() for item in items}) == 1000


def test_a_procedural_split_does_not_depend_on_numbers_or_the_other_split() -> None:
    task = gym({"search": 40, "holdout": 20})
    more = gym({"search": 10, "holdout": 60}, {"seeds": {"search": 1, "holdout": 9}})
    assert more.items["search"] == task.items["search"][:10]
    assert more.items["holdout"][:20] != task.items["holdout"]
    assert gym({"search": 40, "holdout": 60}).items["holdout"][:20] == task.items["holdout"]


def test_a_procedural_item_carries_its_entry_as_plain_data() -> None:
    task = gym({"search": 5, "holdout": 5}, prompt="Q: {{ question }}\nA:", chat=False)
    item = task.items["search"][0]
    entry = json.loads(item.data)
    assert item.prompt == f"Q: {entry['question']}\nA:"
    assert item.answer == entry["answer"]
    assert eval(entry["metadata"]["expression"]) == int(entry["answer"])
    assert task.origin.startswith("reasoning_gym 0.")


def test_one_cannot_ask_for_more_questions_than_there_are() -> None:
    few = {"config": {"max_terms": 2, "max_digits": 1}}
    with pytest.raises(BadInputError, match=r"has only about \d+ different questions for search"):
        gym({"search": 500, "holdout": 1}, few)


RUNNING = {
    "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
    "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
}  # fmt: skip
"""Tasks of reasoning_gym 0.1.25 that evaluate answers, by a search for `eval` and sympy's parsers."""


def test_a_task_whose_answers_would_be_run_as_code_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    for name, (dataset, _) in DATASETS.items():
        try:
            check_runs_nothing(name, dataset)
        except BadInputError:
            assert name in RUNNING
        else:
            assert name not in RUNNING
    seen = tmp_path / "seen"
    answer = f"[open({str(seen)!r}, 'w').name]"
    scorer = json.dumps({"name": "string_insertion", "config": {}})
    with pytest.raises(BadInputError, match="runs answers to it as Python code"):
        reasoning_gym_score(scorer, json.dumps({"answer": "ABC"}), answer)
    assert not seen.exists()
    with pytest.raises(BadInputError, match=r"task t: source.reasoning_gym string_insertion: the"):
        gym({"search": 1, "holdout": 1}, {"reasoning_gym": "string_insertion", "config": {}})


def test_an_answer_that_the_library_cannot_read_is_wrong() -> None:
    pytest.importorskip("reasoning_gym")
    # Some of its rules raise for a text that has not the form that they expect.
    from reasoning_gym.factory import DATASETS

    class Strict(DATASETS["chain_sum"][0]):  # type: ignore[misc]
        def score_answer(self, answer: str | None, entry: Data) -> float:
            return float(int(str(answer)) == int(entry["answer"]))

    with patch.object(DATASETS["chain_sum"][0], "score_answer", Strict.score_answer):
        scorer = json.dumps({"name": "chain_sum", "config": {"max_terms": 7}})
        data = json.dumps({"answer": "12"})
        assert [reasoning_gym_score(scorer, data, one) for one in ("12", "twelve")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ({"reasoning_gym": "composite", "config": {"datasets": [{"name": "gcd"}]}}, "composite"),
        ({"reasoning_gym": "no_such_task"}, "no_such_task"),
        ({"config": {"colour": 1}}, "colour"),
        ({"config": {"min_terms": 0}}, "min_terms"),
        ({"config": {"seed": 1}}, "source.config"),
        ({"config": 5}, "source.config"),
        ({"seeds": {"search": 1, "holdout": 1}}, "source.seeds"),
        ({"seeds": {"search": 1}}, "source.seeds.holdout"),
        ({"seeds": {"search": -1, "holdout": 1}}, "source.seeds.search"),
        ({"seeds": 5}, "source.seeds"),
        ({"size": 5}, "source.size"),
    ],
)
def test_a_malformed_procedural_source_is_refused(source: Data, named: str) -> None:
    with pytest.raises(BadInputError) as caught:
        gym({}, source)
    assert str(caught.value).startswith("task t: ")
    assert named in str(caught.value)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"source": None}, "either items or source"),
        ({"items": {"search": "a", "holdout": "b"}}, "either items or source"),
        ({"source": 5}, "source must have one of the keys"),
        ({"source": {"dataset": "a/b", "files": {}}}, "source must have one of the keys"),
        ({"source": {"dataset": "no id"}}, "source.dataset"),
        ({"source": {"files": {}}}, "source.files has no"),
        ({"source": {"files": {"a": "x"}}}, "no 'holdout'"),
        ({"source": {"files": {"a": 5}, "search": "a", "holdout": "a"}}, "source.files.a"),
        ({"source": {"files": {"a": "none.jsonl", "b": "x"}, "search": "a", "holdout": "b"}}, "none.jsonl"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "{{ question"}, "prompt is not a template"),
        ({"prompt": "{{ question }}{{ nothing }}"}, "'nothing' is undefined"),
        ({"prompt": "the same", "fields": {"answer": "good"}}, "nothing of it: it names no field"),
        ({"prompt": "{{ question }}{{ none }}"}, "null"),
        ({"fields": 5}, "fields must have keys"),
        ({"fields": FIELDS | {"id": 5}}, "fields.id"),
        ({"fields": FIELDS | {"id": "nr +"}}, "fields.id is not an expression"),
        ({"fields": FIELDS | {"id": "number"}}, "'number' is undefined; there are nr, "),
        ({"fields": FIELDS | {"id": "row['number']"}}, "has no attribute 'number'"),
        ({"fields": FIELDS | {"id": "nr / 0"}}, "ZeroDivisionError"),
        ({"fields": FIELDS | {"id": "field"}}, "used twice"),
        ({"fields": FIELDS | {"id": "[nr]"}}, "its id [0] is no text"),
        ({"fields": FIELDS | {"category": "nr"}}, "its category 0 is no text"),
        ({"fields": FIELDS | {"question": "nr|trim"}}, "trim is for texts"),
        ({"fields": FIELDS | {"choices": "bad[:1]"}}, "choices must be 2 to 26"),
        ({"fields": FIELDS | {"choices": "[nr, nr]"}}, "the choice 0"),
        ({"fields": FIELDS | {"choices": "[good, ' ']"}}, "the choice ' '"),
        ({"fields": FIELDS | {"answer": "3"}}, "answer must be the number of a choice"),
        ({"fields": FIELDS | {"answer": "good"}}, "answer must be the number of a choice"),
        ({"fields": FIELDS | {"answer": "'x'", "choices": "none"}, "prompt": "{{ question }}"}, None),
        ({"fields": FIELDS | {"answer": "none", "choices": "none"}, "prompt": "{{ question }}"},
         "answer must"),
        ({"extract": None}, "extract"),
        ({"extract": []}, "extract"),
        ({"extract": ["guess"]}, "'guess' is none of"),
        ({"extract": ["after_think"]}, "must have a rule that finds"),
        ({"score": None}, "score is missing"),
        ({"score": "guess"}, "'guess' is none of"),
        ({"score": "reasoning_gym"}, "reasoning_gym is for items of that library"),
        ({"kind": "exact_match"}, "extract is for kind: generation"),
        ({"length_normalized": True}, "is for kind: multiple_choice"),
        ({"continuation": "x"}, "is for kind: multiple_choice"),
        ({"shuffle_choices": "yes"}, "shuffle_choices"),
        ({"shuffle_choices": -1}, "shuffle_choices"),
        ({"system": "Be brief."}, "set chat to true"),
        ({"chat": "yes"}, "chat must be true or false"),
        ({"decoding": {"max_tokens": 5}}, "unknown key decoding.max_tokens"),
        ({"decoding": {"temperature": -1}}, "decoding.temperature"),
        ({"decoding": {"temperature": True}}, "decoding.temperature"),
        ({"decoding": {"top_p": 0}}, "decoding.top_p"),
        ({"decoding": {"stop": "x"}}, "decoding.stop"),
        ({"decoding": {}, "stop": ["x"]}, "stop is given twice"),
        ({"few_shot": SHOT | {"split": "a"}, "prompt": WITH_SHOTS}, "few_shot.count is missing"),
        ({"few_shot": SHOT | {"split": "a", "count": 0}, "prompt": WITH_SHOTS}, "few_shot.count"),
        ({"few_shot": SHOT | {"split": "c", "count": 1}, "prompt": WITH_SHOTS}, "no 'c'"),
        ({"few_shot": SHOT | {"split": "a", "count": 99}, "prompt": WITH_SHOTS}, "has 30 examples"),
        ({"few_shot": SHOT | {"split": "a", "count": 1}}, "has no {{ shots }}"),
        ({"few_shot": SHOT | {"examples": [5], "separator": 5}, "prompt": WITH_SHOTS}, "separator"),
        ({"few_shot": SHOT, "prompt": WITH_SHOTS}, "few_shot.split or examples"),
        ({"few_shot": SHOT | {"examples": []}, "prompt": WITH_SHOTS}, "few_shot.examples"),
        ({"few_shot": SHOT | {"examples": ["x"]}, "prompt": WITH_SHOTS}, "few_shot.examples"),
        ({"few_shot": {"split": "a", "count": 1}, "prompt": WITH_SHOTS}, "few_shot.template"),
    ],
)  # fmt: skip
def test_a_malformed_task_is_refused_with_its_key(
    folder: Folder, changes: Data, named: str | None
) -> None:
    if named is None:
        assert folder.load(**changes).items  # the counterpart of the refusals around it
    else:
        assert named in folder.refusal(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"holdout": "a"}, "source.search_share is missing"),
        ({"search_share": 0.5}, "source.search_share is for one split"),
        (ONE_SPLIT | {"search_share": 1.5}, "source.search_share"),
        (ONE_SPLIT | {"search_share": 0}, "source.search 'a' has no items"),
        (ONE_SPLIT | {"search_share": 1}, "source.holdout 'a' has no items"),
        (ONE_SPLIT | {"seed": "x"}, "source.seed"),
        ({"search_items": 0}, "source.search_items"),
        ({"shards": 1}, "unknown key source.shards"),
    ],
)
def test_a_malformed_division_is_refused(folder: Folder, changes: Data, named: str) -> None:
    assert named in folder.refusal(source=folder.source(**changes))


@pytest.mark.parametrize(
    ("entry", "named"),
    [("{", "not JSON"), ("5", "not a row"), ('{"nr": 1}', "is undefined")],
)
def test_a_malformed_row_is_refused_with_file_and_line(
    folder: Folder, entry: str, named: str
) -> None:
    file = Path(folder.write("a", [row(1)]))
    file.write_text(file.read_text() + "\n" + entry + "\n")
    message = folder.refusal()
    assert f"{file} line 3" in message
    assert named in message


def test_what_is_no_parquet_is_refused(folder: Folder) -> None:
    pytest.importorskip("pyarrow")
    (folder.path / "a.parquet").write_bytes(b"PAR1 no")
    files = {"a": str(folder.path / "a.parquet"), "b": str(folder.path / "b.jsonl")}
    assert "a.parquet is not a Parquet file" in folder.refusal(source=folder.source(files=files))


@pytest.mark.parametrize(
    ("library", "source", "extra"),
    [
        (
            "datasets",
            {"dataset": "org/name", "revision": "0" * 40, "search": "a", "holdout": "b"},
            "datasets",
        ),
        ("reasoning_gym", GYM["source"], "reasoning-gym"),
    ],
)
def test_a_missing_library_is_named_with_what_to_install(
    folder: Folder, library: str, source: Data, extra: str
) -> None:
    """In a Python of its own, in which the library cannot be imported."""
    definition = yaml.safe_dump(
        folder.definition(source=source, score="reasoning_gym", fields=None)
        if library == "reasoning_gym" else folder.definition(source=source)
    )  # fmt: skip
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from workers.errors import BadInputError\nfrom workers.evaluation import load_task\n"
        f"try: load_task('t', {definition!r})\nexcept BadInputError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"darwin-orchestrator[{extra}]" in told.stdout


def test_a_real_model_scores_alike_by_either_kind() -> None:
    """The whole text compared exactly is what `exact_match` does."""
    from workers.checkpoints import open_checkpoint
    from workers.evaluation.engines import build_engine

    items = {s: f"shipped:strings/items/sort.{s}.jsonl" for s in ("search", "holdout")}
    plain = {"kind": "exact_match", "items": items, "max_new_tokens": 10, "stop": ["\n"]}
    fields = {"id": "id", "question": "prompt", "answer": "answer"}
    asked = {
        "kind": "generation", "source": {"files": items}, "fields": fields, "prompt": "{{ question }}",
        "decoding": {"max_new_tokens": 10, "stop": ["\n"]}, "extract": ["whole"], "score": "exact",
    }  # fmt: skip
    engine = build_engine({"sort": open_checkpoint("shipped:strings/reverse")}, None)
    limits: dict[str, int | None] = {"search": 24, "holdout": 1}
    one, other = (
        score_batch(engine, task, task.items["search"])
        for task in (load_task("t", yaml.safe_dump(data), limits) for data in (plain, asked))
    )
    assert one == other
    assert 0 < sum(result.score for result in one) < 24
