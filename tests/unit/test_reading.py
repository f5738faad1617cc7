"""How much of a prompt a tokenizer knows."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workers.diagnostics.reading import check_known, read_prompt
from workers.errors import BadInputError

LETTERS = {letter: number for number, letter in enumerate(["?", *"abc"])}
BYTES = pre_tokenizers.ByteLevel.alphabet()


def fast(model: models.Model, **more: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **more)


def test_what_is_dropped_without_a_trace_is_unknown() -> None:
    reading = read_prompt(fast(models.BPE(LETTERS, [])), "ab 한글c xyz")
    assert (reading.ids, reading.unknown, reading.characters) == ([1, 2, 3], 5, 8)


def test_what_becomes_the_unknown_token_is_unknown() -> None:
    words = {"?": 0, "one": 1, "two": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    reading = read_prompt(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?"), "one eleven two"
    )
    assert (reading.ids, reading.unknown, reading.characters) == ([1, 0, 2], 6, 12)


def test_bytes_know_everything() -> None:
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(sorted(BYTES))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    reading = read_prompt(PreTrainedTokenizerFast(tokenizer_object=tokenizer), "안녕 wörld\n")
    assert (reading.unknown, reading.characters) == (0, 7)


def test_more_than_half_is_too_much() -> None:
    tokenizer = fast(models.BPE(LETTERS, []))
    check_known([read_prompt(tokenizer, "abXY")], "here", "a set", "take another")
    with pytest.raises(
        BadInputError, match=r"here: .* know 3 of the 5 characters of a set: take another"
    ):
        check_known(
            [read_prompt(tokenizer, text) for text in ("ab", "XYZ")],
            "here",
            "a set",
            "take another",
        )
