"""The engine over HTTP when servers refuse, are busy or do less: with a real one on 127.0.0.1."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine_conformance import own_recipe, write_parent
from tests.openai_server import Manner, serving
from tests.plain_model import CHAT, PlainModel
from workers.errors import BadInputError
from workers.evaluation import Decoding, Item, Task
from workers.evaluation.engines.http_json import Patience
from workers.evaluation.engines.openai_engine import OpenAIEngine
from workers.evaluation_worker import EvaluationWorker, WorkerSpec
from workers.merging import ParentReference, Recipe, Rule, Selector

HASTY = Patience(seconds=20, tries=4, first_wait=0.01)
SECRET = "sk-very-secret"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parent(tmp_path_factory.mktemp("parent"), "llama", {})


@pytest.fixture(scope="module")
def plain(parent: Path) -> PlainModel:
    return PlainModel(parent)


@contextmanager
def engine_of(plain: PlainModel, manner: Manner, **settings: Any) -> Iterator[OpenAIEngine]:
    with serving(plain, manner) as address:
        yield OpenAIEngine(address, settings.pop("model", "tiny"), patience=HASTY, **settings)


@pytest.mark.parametrize("fault", [429, 500, 503, "cut"])
def test_a_server_that_does_better_later_is_asked_again(
    fault: int | str, plain: PlainModel
) -> None:
    manner = Manner(faults=[fault, fault])
    with engine_of(plain, manner) as engine:
        (found,) = engine.generate(["abc"], Decoding(6))
    assert found.text == plain.write(plain.ids("abc"), 6)[0]
    assert len(manner.requests) == 3


def test_a_busy_server_says_how_long_to_wait(
    plain: PlainModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("workers.evaluation.engines.http_json.time.sleep", waits.append)
    with engine_of(plain, Manner(faults=[429, 500, 500], retry_after="7")) as engine:
        engine.generate(["abc"], Decoding(1))
    assert waits[0] == 7.0
    assert HASTY.first_wait * 2 <= waits[1] <= HASTY.first_wait * 3
    assert HASTY.first_wait * 4 <= waits[2] <= HASTY.first_wait * 6


def test_a_server_that_stays_away_is_named(plain: PlainModel) -> None:
    manner = Manner(faults=[503] * 4)
    with (
        engine_of(plain, manner) as engine,
        pytest.raises(
            BadInputError, match=r"/v1/completions: no answer after 4 tries \(status 503"
        ),
    ):
        engine.generate(["abc"], Decoding(1))
    with serving(plain, manner) as address:
        pass
    engine = OpenAIEngine(address, "tiny", patience=HASTY)
    with pytest.raises(BadInputError, match=r"no answer after 4 tries .*is the server up"):
        engine.generate(["abc"], Decoding(1))


@pytest.mark.parametrize(
    ("settings", "manner", "said"),
    [
        ({"model": "other"}, Manner(), "does not know the address, or the model.*does not exist"),
        ({}, Manner(key=SECRET), "refuses the key.*who are you"),
        ({}, Manner(faults=[302]), "sends elsewhere"),
        ({}, Manner(longest=2), "refuses the request.*maximum context length is 2"),
    ],
)
def test_what_a_server_refuses_is_not_asked_again(
    settings: dict[str, Any], manner: Manner, said: str, plain: PlainModel
) -> None:
    with engine_of(plain, manner, **settings) as engine, pytest.raises(BadInputError, match=said):
        engine.generate(["abc"], Decoding(1))
    assert len(manner.requests) == 1


def test_the_key_goes_to_the_server_and_nowhere_else(
    plain: PlainModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """This server repeats it in what it says of its faults."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", SECRET)
    manner = Manner(key=SECRET)
    with engine_of(plain, manner, key_variable="MY_KEY") as engine:
        assert engine.generate(["abc"], Decoding(1))
        assert SECRET not in str(engine.describe("abc"))
        for fault in (400, 503):
            manner.faults.extend([fault] * 4)
            with pytest.raises(BadInputError, match=r"no, Bearer \[key\]") as caught:
                engine.generate(["abc"], Decoding(1))
            assert SECRET not in str(caught.value)
            manner.faults.clear()
    assert SECRET in str(manner.requests[0]["headers"])
    assert SECRET not in caplog.text
    assert SECRET not in repr(vars(engine))


def test_a_key_that_was_named_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(
        BadInputError, match="the environment variable MY_KEY for the key is not set"
    ):
        OpenAIEngine("http://127.0.0.1:1/v1", "tiny", key_variable="MY_KEY")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:8000", "is no address such as"),
        ("ftp://host/v1", "is no address such as"),
        ("http://user:word@host/v1", "neither user, password nor query"),
        ("http://host/v1?key=word", "neither user, password nor query"),
    ],
)
def test_addresses_that_are_none_or_hold_secrets_are_refused(address: str, said: str) -> None:
    with pytest.raises(BadInputError, match=said) as caught:
        OpenAIEngine(address, "tiny")
    assert "word" not in str(caught.value).replace("password", "")


def test_a_server_without_echo_is_refused_for_loglikelihoods_alone(
    plain: PlainModel, parent: Path
) -> None:
    """In the manner of llama.cpp's server, which leaves `echo` out of account."""
    for tokenizer in (None, str(parent)):
        with engine_of(plain, Manner(echoes=False), tokenizer=tokenizer) as engine:
            with pytest.raises(
                BadInputError, match="does not tell the log-probabilities of a prompt"
            ):
                engine.loglikelihood([("abc", "de")])
            assert engine.generate(["abc", CHAT], Decoding(3))[0].tokens > 0


def test_so_many_requests_are_under_way_and_no_more(plain: PlainModel) -> None:
    manner = Manner()
    with engine_of(plain, manner, requests=3) as engine:
        engine.generate(["abc", "d"] * 12, Decoding(4))
    assert len(manner.requests) == 24
    assert 2 <= manner.most_at_once <= 3


def test_conversations_go_to_the_servers_template_or_to_ones_own(
    plain: PlainModel, parent: Path
) -> None:
    for tokenizer, path in ((None, "/v1/chat/completions"), (str(parent), "/v1/completions")):
        manner = Manner()
        with engine_of(plain, manner, tokenizer=tokenizer) as engine:
            engine.generate([CHAT], Decoding(2))
        assert [request["path"] for request in manner.requests] == [path]


def test_something_else_than_such_a_server_is_told_from_one(
    plain: PlainModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.openai_server.complete", lambda *_: (200, {"hello": 1}))
    with (
        engine_of(plain, Manner()) as engine,
        pytest.raises(BadInputError, match="an answer without choices"),
    ):
        engine.generate(["abc"], Decoding(1))
    monkeypatch.setattr("tests.openai_server.complete", lambda *_: (200, ["hello"]))
    with engine_of(plain, Manner()) as engine, pytest.raises(BadInputError, match="no JSON object"):
        engine.generate(["abc"], Decoding(1))


def test_it_takes_no_weights(parent: Path) -> None:
    engine = OpenAIEngine("http://127.0.0.1:1/v1", "tiny")
    engine.realize(own_recipe(parent))
    (father,) = own_recipe(parent).parents
    two = (father, ParentReference("mother", father.fingerprint))
    blend = Rule(Selector(), "linear", {"weight": 1.0})
    for recipe in (Recipe((father,), (blend,)), Recipe(two, ())):
        with pytest.raises(BadInputError, match="takes no weights"):
            engine.realize(recipe)


def test_a_worker_scores_what_is_served_as_it_scores_the_checkpoint(
    plain: PlainModel, parent: Path
) -> None:
    recipe = own_recipe(parent)
    answers = {prompt: plain.write(plain.ids(prompt), 6)[0].strip() for prompt in ("abc", "z")}
    written = [Item(prompt, prompt, answer) for prompt, answer in answers.items()]
    chosen = [Item("c", "abc", 1, choices=("de", "no")), Item("d", "z", 0, choices=("a", "bcd"))]
    tasks = tuple(
        Task(kind, kind, {"search": tuple(items), "holdout": ()}, Decoding(6))
        for kind, items in (("exact_match", written), ("multiple_choice", chosen))
    )
    found = []
    with serving(plain, Manner()) as address:
        for engine in (
            {"kind": "openai", "base_url": address, "model": "tiny"},
            {"dtype": "float32"},
        ):
            spec = WorkerSpec(
                {"father": str(parent)}, None, {"father": recipe.parents[0].fingerprint},
                tasks=tasks, block_items=2, engine=engine,
            )  # fmt: skip
            worker = EvaluationWorker(spec)
            described = worker.describe()
            assert described["probe_tokens"] == plain.ids("abc")
            found.append(worker.evaluate(recipe.to_dict(), "search", {}, 60.0).items)
    assert found[0] == found[1]
    assert [one["score"] for one in found[0]["exact_match"]] == [1.0, 1.0]


def test_the_example_of_the_documentation_runs(
    plain: PlainModel, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (
        (Path(__file__).parents[2] / "docs" / "evaluation.md")
        .read_text()
        .partition("\n## A served model")[2]
    )
    (code,) = re.findall(r"```python\n(.*?OpenAIEngine.*?)```", page, re.DOTALL)
    with serving(plain, Manner()) as address:
        for shown, here in (
            ("http://127.0.0.1:8000/v1", address),
            ('"my-model"', '"tiny"'),
            ("models/my-model", str(parent)),
        ):
            assert shown in code
            code = code.replace(shown, here)
        exec(code, {})
    assert "Generation(text=" in capsys.readouterr().out
