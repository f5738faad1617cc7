"""Batched log-likelihoods of the transformers engine against the plain definition, one text at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.families import write_family
from tests.unit.test_generating import alone, count_tokens, make_engine
from workers.evaluation import Continuation, Decoding
from workers.evaluation.engines import likelihood
from workers.evaluation.engines.transformers_engine import TransformersEngine

KINDS = ["qwen3", "mixtral", "qwen3_5", "gemma3", "gemma4", "gpt2", "bloom", "nemotron_h"]
SHOTS = "ab = ba? cd = dc? "
ITEMS = {
    "what is this? ": ("a long answer", "a short one", "a", "none of these at all"),
    "abc": (" def", "d", "de"),
    "a": ("b", "c"),
    "an item which is much longer than others are ": ("x", "y", "z", "zz"),
    "alone ": ("this is a continuation that is much longer than its prompt was",),
}
PLAIN = [(prompt, choice) for prompt, choices in ITEMS.items() for choice in choices]
SHARED = [(SHOTS + prompt, choice) for prompt, choice in PLAIN]
ONE_TOKEN = [(SHOTS + prompt, choice) for prompt in ITEMS for choice in "abcd"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TransformersEngine]:
    root = tmp_path_factory.mktemp("families")
    return {
        kind: make_engine(write_family(root / kind, kind, parents=0)[0], batch_size=5)
        for kind in KINDS
    }


def plain(engine: TransformersEngine, prompt: str, continuation: str) -> Continuation:
    """Softmax over the whole text, no batch; the tokenizer has no token of several characters."""
    ids = engine.tokenizer(prompt + continuation, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logprobs = engine.model(ids).logits[0].double().log_softmax(-1)
    count = ids.shape[1] - len(engine.tokenizer(prompt)["input_ids"])
    places = range(ids.shape[1] - count, ids.shape[1])
    return Continuation(
        sum(float(logprobs[place - 1, ids[0, place]]) for place in places),
        count,
        all(int(logprobs[place - 1].argmax()) == int(ids[0, place]) for place in places),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [PLAIN, SHARED, ONE_TOKEN], ids=["plain", "shared", "one_token"])
def test_likelihood_is_that_of_each_text_alone(
    kind: str, pairs: list[tuple[str, str]], engines: dict[str, TransformersEngine]
) -> None:
    engine = engines[kind]
    order = list(pairs)
    random.Random(0).shuffle(order)  # an item's choices need not be neighbours
    for (prompt, continuation), found in zip(order, engine.loglikelihood(order), strict=True):
        expected = plain(engine, prompt, continuation)
        assert found.logprob == pytest.approx(expected.logprob, abs=2e-4, rel=1e-5)
        assert (found.tokens, found.greedy) == (expected.tokens, expected.greedy)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5", "gemma3"])
def test_what_the_model_would_write_is_greedy(
    kind: str, engines: dict[str, TransformersEngine]
) -> None:
    engine = engines[kind]
    prompt, written = next(
        (prompt, text)
        for prompt in "abcdefghijklmnopqrstuvwxyz"
        if len(text := engine.tokenizer.decode(alone(engine, prompt, 4))) == 4 and text.isalpha()
    )
    others = [written[:2], written[:3] + ("a" if written[3] != "a" else "b"), "zz"]
    found = engine.loglikelihood([(prompt, text) for text in (written, *others)])
    expected = [plain(engine, prompt, text).greedy for text in (written, *others)]
    assert [one.greedy for one in found] == expected == [True, True, False, expected[-1]]


def test_prompts_and_what_they_share_are_read_once(engines: dict[str, TransformersEngine]) -> None:
    """Tokens that go through the model, counted; equal choices but for the last token are one row."""
    engine = engines["qwen3_5"]
    sizes, hook = count_tokens(engine)
    engine.loglikelihood(ONE_TOKEN)
    hook.remove()
    common = len(engine.tokenizer(SHOTS)["input_ids"])
    rest = [len(prompt) for prompt in ITEMS]
    assert sizes[0] == common
    assert sum(sizes[1:]) <= len(rest) * max(rest)

    long = "what is this all about, and why is it so long that reading it once is better? "
    choices = ["abc", "defg", "hi", "klm"]
    sizes, hook = count_tokens(engine)
    engine.loglikelihood([(long, choice) for choice in choices])
    hook.remove()
    assert sizes[0] == len(engine.tokenizer(long)["input_ids"]) - 1
    # Each row begins with the prompt's last token, and its last token is not read.
    assert sizes[1:] == [len(choices) * 4]


def test_no_pass_has_more_rows_than_are_read_at_once(
    engines: dict[str, TransformersEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for an item of many choices either, nor for many texts that begin with nothing."""
    engine = engines["qwen3"]
    choices = [f"{first} {second}" for first in "abcd" for second in "efg"]
    given = [("what is this? ", choice) for choice in choices] + [
        ("", text * 9) for text in choices
    ]
    expected = [plain(engine, *pair).logprob for pair in given[:12]]
    sizes: list[int] = []

    def see(module: torch.nn.Module, arguments: object, named: dict[str, torch.Tensor]) -> None:
        sizes.append(len(named["input_ids"]))

    handle = engine.model.register_forward_pre_hook(see, with_kwargs=True)
    found = engine.loglikelihood(given)
    assert max(sizes) <= 5
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 80 * engine.live.vocabulary)
    sizes.clear()
    again = engine.loglikelihood(given[::-1])[::-1]
    handle.remove()
    assert max(sizes) <= 5 < len(sizes)
    assert [one.logprob for one in found[:12]] == pytest.approx(expected, abs=2e-4)
    assert [one.logprob for one in again] == pytest.approx([o.logprob for o in found], abs=2e-4)


def test_answers_depend_on_the_weights_of_now(
    engines: dict[str, TransformersEngine], tmp_path: Path
) -> None:
    engine = make_engine(write_family(tmp_path, "qwen3", parents=0)[0])
    before = engine.loglikelihood(SHARED)
    assert engine.loglikelihood(SHARED) == before
    with torch.no_grad():
        engine.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    after = engine.loglikelihood(SHARED)
    assert all(one.logprob != other.logprob for one, other in zip(before, after, strict=True))
    assert engine.loglikelihood([]) == []
    assert engine.generate([], Decoding(3)) == []
