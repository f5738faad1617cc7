"""Tasks: what is read, what is refused and by which line, and items that may not judge."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from workers.errors import BadInputError
from workers.evaluation import Decoding, load_task
from workers.evaluation.task import Item, Task, check_disjoint, choose_items, make_batches

Row = dict[str, Any]


def row(number: int, **changes: Any) -> Row:
    values = {"id": f"i{number}", "prompt": f"question {number}", "answer": f"answer {number}"}
    return {key: value for key, value in (values | changes).items() if value is not None}


def choice(number: int, **changes: Any) -> Row:
    return row(number, **({"choices": ["one", "two"], "answer": 0} | changes))


class Folder:
    """A folder with the item files of one task."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("search", [row(1), row(2), row(3)])
        self.write("holdout", [row(4), row(5)])

    def file(self, split: str) -> Path:
        return self.path / f"{split}.jsonl"

    def write(self, split: str, rows: list[Row]) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in rows)
        self.file(split).write_text(text, encoding="utf-8")

    def definition(self, **changes: Any) -> str:
        """The task's YAML; `None` removes a key."""
        data = {
            "kind": "exact_match",
            "items": {split: str(self.file(split)) for split in ("search", "holdout")},
        } | changes
        return yaml.safe_dump({key: value for key, value in data.items() if value is not None})

    def load(self, limits: dict[str, int | None] | None = None, **changes: Any) -> Task:
        return load_task("t", self.definition(**changes), limits)

    def refusal(self, **changes: Any) -> str:
        with pytest.raises(BadInputError) as caught:
            self.load(**changes)
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# -- what is read ----------------------------------------------------------------------------


def test_a_task_has_its_items_in_the_order_of_the_file(folder: Folder) -> None:
    task = folder.load()
    assert [item.id for item in task.items["search"]] == ["i1", "i2", "i3"]
    assert task.items["holdout"][1] == Item("i5", "question 5", "answer 5")
    assert (task.name, task.kind, task.decoding) == ("t", "exact_match", Decoding(64))
    assert task.length_normalized is False


def test_all_settings_are_read(folder: Folder) -> None:
    folder.write("search", [choice(1, answer=1)])
    folder.write("holdout", [choice(2)])
    task = folder.load(
        kind="multiple_choice", max_new_tokens=3, stop=["\n", "END"], length_normalized=True
    )
    assert task.items["search"] == (Item("i1", "question 1", 1, ("one", "two")),)
    assert (task.decoding, task.length_normalized) == (Decoding(3, ("\n", "END")), True)


def test_texts_may_hold_every_character_that_json_allows(folder: Folder) -> None:
    """Among them those at which Python, but not JSON Lines, ends a line."""
    text = "a\u2028b\u2029c\x85d\u00e9\U0001f9ec"
    line = json.dumps(row(1, prompt=text), ensure_ascii=False)
    assert len(line.splitlines()) > 1
    folder.file("search").write_text(line, encoding="utf-8")
    assert folder.load().items["search"][0].prompt == text


def test_blank_lines_and_windows_line_ends_are_no_items(folder: Folder) -> None:
    lines = [json.dumps(row(1)), "", "   ", json.dumps(row(2)), ""]
    folder.file("search").write_bytes("\r\n".join(lines).encode())
    assert [item.id for item in folder.load().items["search"]] == ["i1", "i2"]


def test_item_files_may_lie_in_the_current_folder(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    assert len(folder.load(items={s: f"{s}.jsonl" for s in ("search", "holdout")}).items) == 2


def test_a_limit_keeps_the_first_items_of_its_split(folder: Folder) -> None:
    task = folder.load({"search": 2, "holdout": None})
    assert [item.id for item in task.items["search"]] == ["i1", "i2"]
    assert len(task.items["holdout"]) == 2
    assert len(folder.load({"search": 99, "holdout": 1}).items["search"]) == 3


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": None}, "kind"),
        ({"items": None}, "items"),
        ({"kind": "essay"}, "essay"),
        ({"kind": ["exact_match"]}, "kind"),
        ({"itmes": 1}, "itmes"),
        ({1: 2, "x": 3}, "1"),
        ({"items": ["a", "b"]}, "items"),
        ({"items": {"search": "x.jsonl"}}, "items"),
        ({"items": {"search": 5, "holdout": "x.jsonl"}}, "items.search"),
        ({"items": {"search": ["x"], "holdout": "x.jsonl"}}, "items.search"),
        ({"items": {"search": "nope.jsonl", "holdout": "x.jsonl"}}, "nope.jsonl"),
        ({"items": {"search": "s3:/x.jsonl", "holdout": "x.jsonl"}}, "s3:/x.jsonl"),
        ({"items": {"search": "/nope.jsonl", "holdout": "x.jsonl"}}, "/nope.jsonl"),
        ({"items": {"search": "folder/", "holdout": "x.jsonl"}}, "folder/"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"stop": "END"}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"length_normalized": "no"}, "length_normalized"),
    ],
)
def test_a_malformed_task_is_refused_with_its_name_and_key(
    folder: Folder, changes: dict[Any, Any], named: str
) -> None:
    message = folder.refusal(**changes) if 1 not in changes else refuse_raw(folder, changes)
    assert message.startswith("task t: ")
    assert named in message


def refuse_raw(folder: Folder, changes: dict[Any, Any]) -> str:
    data = yaml.safe_load(folder.definition()) | changes
    with pytest.raises(BadInputError) as caught:
        load_task("t", yaml.safe_dump(data))
    return str(caught.value)


@pytest.mark.parametrize(
    "definition", ["", "[]", "5", "kind: [", "a: 2024-99-99", "\x00", "[" * 600 + "]" * 600]
)
def test_what_is_no_task_is_refused(definition: str) -> None:
    with pytest.raises(BadInputError, match=r"^task t: "):
        load_task("t", definition)


def test_an_absolute_place_is_not_read_from_the_current_folder(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    assert "/search.jsonl" in folder.refusal(items={"search": "/search.jsonl", "holdout": "x"})


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "5",
        "[]",
        '"text"',
        "null",
        "[" * 100_000,
        json.dumps(row(9, id=None)),
        json.dumps(row(9, prompt=None)),
        json.dumps(row(9, answer=None)),
        json.dumps(row(9, id=9)),
        json.dumps(row(9, prompt=["a"])),
        json.dumps(row(9, answer=3)),
        json.dumps(row(9, answer="")),
        json.dumps(row(9, answer=" \n")),
        json.dumps(row(9, prompt="\ud800")),
        json.dumps(row(9, answer="\udfff")),
        json.dumps(row(9, id="\ud800")),
    ],
)
def test_a_malformed_line_is_refused_with_file_and_line(folder: Folder, line: str) -> None:
    folder.file("search").write_text(f"{json.dumps(row(1))}\n\n{line}\n")
    message = folder.refusal()
    assert re.match(
        re.escape(f"task t: {folder.file('search')} line 3: ")
        + "(not JSON|not an item of kind exact_match)",
        message,
    )
    assert len(message) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"choices": None},
        {"choices": "ab"},
        {"choices": {"a": 1, "b": 2}},
        {"choices": ["one"]},
        {"choices": ["one", 2]},
        {"choices": ["one", ""]},
        {"choices": ["one", "\ud800"]},
        {"answer": None},
        {"answer": "one"},
        {"answer": 2},
        {"answer": -1},
        {"answer": 0.0},
        {"answer": True},
    ],
)
def test_a_malformed_choice_is_refused_with_file_and_line(
    folder: Folder, changes: dict[str, Any]
) -> None:
    folder.write("search", [choice(1)])
    folder.write("holdout", [choice(2), choice(3, **changes)])
    message = folder.refusal(kind="multiple_choice")
    assert message.startswith(f"task t: {folder.file('holdout')} line 2: ")


def test_an_id_that_is_used_twice_is_refused_with_its_line(folder: Folder) -> None:
    folder.write("search", [row(1), row(2), row(1, prompt="another")])
    message = folder.refusal()
    assert f"{folder.file('search')} line 3" in message
    assert "'i1'" in message


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_file_without_readable_items_is_refused(folder: Folder, content: bytes) -> None:
    folder.file("holdout").write_bytes(content)
    assert str(folder.file("holdout")) in folder.refusal()


def test_a_folder_is_no_item_file(folder: Folder) -> None:
    folder.file("holdout").unlink()
    folder.file("holdout").mkdir()
    assert str(folder.file("holdout")) in folder.refusal()


# -- what steers may not judge ---------------------------------------------------------------


def task(name: str, search: list[Item], holdout: list[Item], **changes: Any) -> Task:
    items = {"search": tuple(search), "holdout": tuple(holdout)}
    return dataclasses.replace(Task(name, "exact_match", items), **changes)


def question(prompt: str, identifier: str = "", **changes: Any) -> Item:
    return Item(identifier or prompt, prompt, "yes", **changes)


def test_a_question_that_steers_cannot_judge_its_own_task(folder: Folder) -> None:
    folder.write("holdout", [row(4), row(5, prompt="  question 2\n", answer="another")])
    message = folder.refusal()
    assert "held-out item 'i5' of task t" in message
    assert "search item 'i2' of task t" in message


def test_a_question_that_steers_one_task_cannot_judge_another() -> None:
    first = task("first", [question("a", "a1")], [question("b")])
    second = task("second", [question("c")], [question("a", "a2")])
    with pytest.raises(BadInputError) as caught:
        check_disjoint([first, second])
    assert "held-out item 'a2' of task second" in str(caught.value)
    assert "search item 'a1' of task first" in str(caught.value)


def test_the_same_id_of_another_question_and_other_choices_are_no_overlap() -> None:
    same_id = task("t", [question("a", "1")], [question("b", "1")])
    choices = [question("a", choices=("x", "y")), question("a", choices=("x", "z"))]
    check_disjoint([same_id, task("u", [choices[0]], [choices[1]])])
    with pytest.raises(BadInputError):
        check_disjoint([task("u", [choices[0]], [choices[0]])])


def test_the_same_question_twice_on_one_side_is_no_overlap() -> None:
    check_disjoint([task("t", [question("a", "1"), question("a", "2")], [question("b")])])


# -- identity --------------------------------------------------------------------------------

PLAIN = task("t", [question("a")], [question("b")])


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "multiple_choice"},
        {"decoding": Decoding(65)},
        {"decoding": Decoding(64, ("x",))},
        {"length_normalized": True},
        {"items": PLAIN.items | {"search": (question("c"),)}},
        {"items": PLAIN.items | {"holdout": (question("c"),)}},
        {"items": PLAIN.items | {"search": (question("a", "another id"),)}},
        {"items": PLAIN.items | {"search": (Item("a", "a", "no"),)}},
        {"items": PLAIN.items | {"search": (question("a", choices=("x", "y")),)}},
        {"items": PLAIN.items | {"search": (question("a"), question("c"))}},
        {"items": {"search": PLAIN.items["holdout"], "holdout": PLAIN.items["search"]}},
    ],
)
def test_everything_that_a_score_depends_on_is_in_the_fingerprint(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(PLAIN, **changes).fingerprint != PLAIN.fingerprint


def test_the_fingerprint_does_not_depend_on_names_places_or_the_order_of_splits(
    folder: Folder, tmp_path: Path
) -> None:
    items = dict(reversed(PLAIN.items.items()))
    assert dataclasses.replace(PLAIN, name="u", items=items).fingerprint == PLAIN.fingerprint
    (tmp_path / "elsewhere").mkdir()
    assert Folder(tmp_path / "elsewhere").load().fingerprint == folder.load().fingerprint


def test_the_order_of_items_is_part_of_the_fingerprint() -> None:
    pair = (question("a"), question("c"))
    both = [
        dataclasses.replace(PLAIN, items=PLAIN.items | {"search": order})
        for order in (pair, pair[::-1])
    ]
    assert both[0].fingerprint != both[1].fingerprint


# -- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 16, 100])
def test_batches_hold_every_item_once_whatever_order_they_came_in(size: int) -> None:
    generator = random.Random(0)
    items = [question("x" * generator.randrange(1, 9), f"{n}") for n in range(33)]
    batches = make_batches(items, size)
    assert sorted(item.id for batch in batches for item in batch) == sorted(i.id for i in items)
    assert {len(batch) for batch in batches[:-1]} <= {size}
    assert 1 <= len(batches[-1]) <= size
    for _ in range(3):
        generator.shuffle(items)
        assert make_batches(items, size) == batches


def test_batches_hold_items_of_like_length() -> None:
    batches = make_batches([question("x" * length) for length in (5, 1, 4, 2, 3, 6)], 2)
    assert [[len(item.prompt) for item in batch] for batch in batches] == [[1, 2], [3, 4], [5, 6]]
    assert make_batches([], 4) == []


def test_some_of_the_batches_are_cut_into_the_same_ones_again() -> None:
    """What several workers share is scored in the batches of one that has it all."""
    items = [question("x" * (number * 7 % 13), str(number)) for number in range(23)]
    batches = make_batches(items, 5)
    for count in (1, 2, 3, 5):
        for first in range(count):
            own = batches[first::count]
            ids = [item.id for batch in reversed(own) for item in batch]
            assert make_batches(choose_items(items, {"t": ids}, "t"), 5) == own
