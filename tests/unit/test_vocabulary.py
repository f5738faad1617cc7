"""Vocabularies of children whose parents speak differently: tokens, files, configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from tests.checkpoint_files import write_checkpoint
from tests.vocabularies import (
    ENGLISH,
    GERMAN,
    JAPANESE,
    WIDTH,
    SlowRows,
    added,
    byte_level,
    meanings,
    permuted,
    unigram,
    union,
    word_level,
    write_speaker,
)
from workers.checkpoints import open_checkpoint
from workers.checkpoints.tokens import read_tokens
from workers.checkpoints.vocabulary import ChildVocabulary, child_vocabulary, is_token_indexed
from workers.errors import BadInputError


class Speakers:
    """Checkpoints written under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizers: dict[str, Tokenizer] = {}
        self.rows: dict[str, int] = {}

    def write(self, name: str, tokenizer: Tokenizer, rows: int = 0, **more: Any) -> None:
        """`rows` counts from the tokens on."""
        self.tokenizers[name] = tokenizer
        self.rows[name] = tokenizer.get_vocab_size(with_added_tokens=True) + rows
        seed = len(self.tokenizers)
        write_speaker(self.folder / name, tokenizer, self.rows[name], seed, **more)

    def choose(self, choice: str) -> ChildVocabulary:
        opened = {name: open_checkpoint(str(self.folder / name)) for name in self.tokenizers}
        base = opened.pop("base", None)
        return child_vocabulary(opened, base, choice)

    def refusal(self, choice: str = "union") -> str:
        with pytest.raises(BadInputError) as caught:
            self.choose(choice)
        return str(caught.value)

    def edit_json(self, name: str, file: str, **changes: Any) -> None:
        path = self.folder / name / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def slow(self, owner: str, child: dict[int, str], rows: int) -> SlowRows:
        speakers = {
            name: (tokenizer, [[0.0]] * self.rows[name])
            for name, tokenizer in self.tokenizers.items()
        }
        return SlowRows(speakers, owner, child, rows)


@pytest.fixture
def speakers(tmp_path: Path) -> Speakers:
    return Speakers(tmp_path)


def child_tokenizer(vocabulary: ChildVocabulary) -> Tokenizer:
    return Tokenizer.from_buffer(vocabulary.companions["tokenizer.json"])


def assert_maps(vocabulary: ChildVocabulary, slow: SlowRows) -> None:
    assert vocabulary.rows == slow.rows
    for name, rows in vocabulary.maps.items():
        assert rows.tolist() == [slow.own(name, row) for row in range(slow.rows)], name


def has_a_letter_beyond_ascii_and_no_space(text: str) -> bool:
    """What byte-level decoders garble when it is an added token."""
    return not text.isascii() and all(ord(letter) < 0x144 for letter in text) and " " not in text


# -- union -----------------------------------------------------------------------------------


def three_byte_level(speakers: Speakers, padding: int) -> None:
    speakers.write("father", byte_level(ENGLISH, 290), padding)
    speakers.write("mother", permuted(byte_level(GERMAN, 310), 1), 5)
    speakers.write(
        "donor", permuted(byte_level([*ENGLISH, *JAPANESE], 330, ["<|end|>", "<|x|>"]), 2)
    )


@pytest.mark.parametrize("padding", [0, 7, 200])
def test_a_union_has_the_fathers_tokens_and_then_those_of_the_others(
    speakers: Speakers, padding: int
) -> None:
    three_byte_level(speakers, padding)
    speakers.write("base", byte_level([*ENGLISH, "a cat"], 300), 1)
    vocabulary = speakers.choose("union")
    child = union(
        speakers.tokenizers,
        speakers.rows,
        lambda text: not has_a_letter_beyond_ascii_and_no_space(text),
    )
    assert len(child) > speakers.tokenizers["father"].get_vocab_size() + 20
    rows = max(speakers.rows["father"], math.ceil(len(child) / 64) * 64)
    if padding == 200:
        assert rows == speakers.rows["father"]
    assert_maps(vocabulary, speakers.slow("father", child, rows))
    assert meanings(child_tokenizer(vocabulary)) == child
    assert vocabulary.owner == "father"
    assert vocabulary.config_changes({"vocab_size": 1, "eos_token_id": 290}) == {
        "vocab_size": rows,
        "eos_token_id": 290,
    }


def test_new_tokens_are_found_and_other_texts_are_encoded_as_before(speakers: Speakers) -> None:
    father = byte_level(ENGLISH, 290)
    speakers.write("father", father)
    speakers.write("mother", permuted(byte_level(JAPANESE, 310, ["<|end|>", "<|x|>"]), 1))
    tokenizer = child_tokenizer(speakers.choose("union"))
    first = father.get_vocab_size(with_added_tokens=True)
    contents = {t.content for n, t in tokenizer.get_added_tokens_decoder().items() if n >= first}
    assert {"名前は", "<|x|>"} <= contents
    for text in [*ENGLISH, "THE FOX 0123456789", "\n\t£", "<|end|>", "日本語", *GERMAN]:
        assert not any(content in text for content in contents), text
        assert tokenizer.encode(text).ids == father.encode(text).ids
    for content in contents:
        number = tokenizer.token_to_id(content)
        assert tokenizer.encode(content).ids == [number]
        assert tokenizer.decode([number], skip_special_tokens=False) == content
    (name,) = tokenizer.encode("名前は").ids
    (tool,) = tokenizer.encode("<|x|>").ids
    the, dog = father.encode("the fox").ids, father.encode(" dog").ids
    assert tokenizer.encode("the fox<|x|>名前は dog").ids == [*the, tool, name, *dog]


def test_what_cannot_be_an_added_token_is_left_out_and_said(speakers: Speakers) -> None:
    tokenizer = byte_level(["été été été", "naïve naïve", *JAPANESE], 330)
    speakers.write("father", byte_level(ENGLISH, 290))
    speakers.write("mother", tokenizer)
    vocabulary = speakers.choose("union")
    left = vocabulary.left_out["mother"]
    assert vocabulary.left_out["father"] == {}
    assert left["Ã©"] == "its text is the spelling of another token of the father"  # é is byte 0xE9
    assert left["Ã©tÃ©"] == "the father's tokenizer would not spell it as its text"
    parts = [text for text in meanings(tokenizer).values() if text.startswith("bytes ")]
    known = speakers.tokenizers["father"].get_vocab()
    for spelling in [text.removeprefix("bytes ") for text in parts]:
        if spelling not in known:
            assert left[spelling] == "it is no text, but a part of a character"
    added_tokens = child_tokenizer(vocabulary).get_added_tokens_decoder()
    new = {token.content for token in added_tokens.values()}
    texts = meanings(tokenizer)
    for content in tokenizer.get_vocab():
        text = texts[tokenizer.token_to_id(content)]
        assert (content in left) == (text not in new and content not in known), content


def test_flags_of_added_tokens_are_kept(speakers: Speakers) -> None:
    mother = byte_level(ENGLISH, 290)
    mother.add_special_tokens([added("<tool>", lstrip=True)])
    mother.add_tokens([added("Wort", single_word=True, normalized=False)])
    speakers.write("father", byte_level(ENGLISH, 290))
    speakers.write("mother", mother)
    tokenizer = child_tokenizer(speakers.choose("union"))
    found = {t.content: t for t in tokenizer.get_added_tokens_decoder().values()}
    assert found["<tool>"].special and found["<tool>"].lstrip
    assert found["Wort"].single_word and not found["Wort"].special
    assert tokenizer.encode("Worte").tokens != ["Wort", "e"]
    assert tokenizer.decode(tokenizer.encode("a <tool>").ids) == "a"


def test_the_order_of_the_parents_decides_whose_flags_count(speakers: Speakers) -> None:
    for name, special in (("father", None), ("mother", False), ("donor", True), ("base", True)):
        tokenizer = byte_level(ENGLISH, 290)
        if special is not None:
            tokenizer.add_tokens([added("<a>", special=special)])
        if name == "base":
            tokenizer.add_tokens([added("<b>")])
        speakers.write(name, tokenizer)
    vocabulary = speakers.choose("union")
    found = child_tokenizer(vocabulary).get_added_tokens_decoder()
    first = speakers.rows["father"]
    assert [(found[first + n].content, found[first + n].special) for n in (0, 1)] == [
        ("<a>", False),
        ("<b>", False),
    ]
    assert len(found) == 3


def test_pieces_of_sentencepiece_are_spelt_as_text(speakers: Speakers) -> None:
    speakers.write("father", byte_level(ENGLISH, 290))
    speakers.write("mother", unigram(GERMAN, 60))
    vocabulary = speakers.choose("union")
    child = union(
        speakers.tokenizers,
        speakers.rows,
        lambda text: not has_a_letter_beyond_ascii_and_no_space(text),
    )
    assert_maps(vocabulary, speakers.slow("father", child, vocabulary.rows))
    mother = speakers.tokenizers["mother"]
    piece = max((token for token in mother.get_vocab() if token.startswith("▁")), key=len)
    (row,) = child_tokenizer(vocabulary).encode(piece.replace("▁", " ")).ids
    assert len(piece) > 2
    assert vocabulary.maps["mother"][row] == mother.token_to_id(piece)


def test_byte_level_tokens_join_a_unigram_father(speakers: Speakers) -> None:
    speakers.write("father", unigram(ENGLISH, 50), 3)
    speakers.write("mother", byte_level(GERMAN, 330))
    vocabulary = speakers.choose("union")
    tokenizer = child_tokenizer(vocabulary)
    (row,) = tokenizer.encode(" schläft").ids
    mother = speakers.tokenizers["mother"]
    assert [vocabulary.maps["mother"][row]] == mother.encode(" schläft").ids
    assert vocabulary.maps["father"][row] == -1
    fathers = range(speakers.rows["father"] - 3)
    assert vocabulary.maps["father"][: len(fathers)].tolist() == list(fathers)
    for number, text in meanings(mother).items():
        rows = [row for row in range(vocabulary.rows) if vocabulary.maps["mother"][row] == number]
        if text.startswith("bytes "):
            assert rows == []
        else:
            assert len(rows) == 1, text


def test_word_level_vocabularies_without_a_common_token(speakers: Speakers) -> None:
    speakers.write("father", word_level(["one", "two"]), 60)
    speakers.write("mother", word_level(["eins", "zwei", "drei"]))
    vocabulary = speakers.choose("union")
    assert vocabulary.rows == 63
    assert vocabulary.maps["father"].tolist() == [0, 1, 2, -1, -1, -1, *range(6, 63)]
    assert vocabulary.maps["mother"].tolist() == [0, -1, -1, 1, 2, 3, *[-1] * 57]
    tokenizer = child_tokenizer(vocabulary)
    assert tokenizer.encode("one drei eins two").ids == [1, 5, 3, 2]
    (warning,) = vocabulary.warnings
    assert "3 words" in warning and "'eins'" in warning


def test_pieces_of_words_are_not_looked_for_elsewhere(speakers: Speakers) -> None:
    speakers.write("father", word_level(["play"]))
    pieces = {"[UNK]": 0, "play": 1, "##ing": 2, "song": 3}
    speakers.write("mother", Tokenizer(models.WordPiece(pieces, unk_token="[UNK]")))
    vocabulary = speakers.choose("union")
    assert vocabulary.left_out["mother"] == {"##ing": "it only continues words"}
    assert "song" in child_tokenizer(vocabulary).get_vocab()


def test_a_token_behind_the_last_row_counts_as_unknown(speakers: Speakers) -> None:
    mother = byte_level(ENGLISH, 290)
    mother.add_tokens(["<a>", "<b>"])
    speakers.write("father", byte_level(ENGLISH, 290))
    speakers.write("mother", mother, rows=-1)
    vocabulary = speakers.choose("union")
    assert vocabulary.left_out["mother"] == {"<b>": "it has no row"}
    assert vocabulary.warnings[-1] == "mother: '<b>' is not in the child: it has no row"
    assert "<a>" in child_tokenizer(vocabulary).get_vocab()


def test_two_tokens_of_one_text_stay_two(speakers: Speakers) -> None:
    for name in ("father", "mother"):
        tokenizer = byte_level(["the cat and the dog"], 270)
        assert tokenizer.token_to_id("Ġthe") is not None
        tokenizer.add_tokens([added(" the", normalized=False)])
        speakers.write(name, tokenizer)
    vocabulary = speakers.choose("mother")
    for rows in vocabulary.maps.values():
        assert rows.tolist() == list(range(vocabulary.rows))


def test_a_row_that_is_not_there_is_nobodys(speakers: Speakers) -> None:
    for name, rows in (("father", 0), ("mother", -1)):
        tokenizer = byte_level(ENGLISH, 290)
        tokenizer.add_tokens(["<a>", "<b>"])
        speakers.write(name, tokenizer, rows)
    last = speakers.rows["father"] - 1
    rows = list(range(last))
    vocabulary = speakers.choose("union")
    assert vocabulary.maps["mother"].tolist() == [*rows, -1]
    assert vocabulary.maps["father"].tolist() == [*rows, last]
    # The mother herself has no row for her last token.
    vocabulary = speakers.choose("mother")
    assert vocabulary.maps["mother"].tolist() == vocabulary.maps["father"].tolist() == rows
    speakers.write("donor", byte_level(ENGLISH, 280), 20)
    assert speakers.choose("donor").rows == speakers.rows["donor"]


@pytest.mark.parametrize("padding", [0, 13])
def test_parents_of_one_vocabulary_stay_as_they_are(speakers: Speakers, padding: int) -> None:
    for name in ("father", "mother", "base"):
        speakers.write(name, byte_level(ENGLISH, 290), padding)
    vocabulary = speakers.choose("union")
    assert vocabulary.warnings == []
    assert vocabulary.companions == {}
    assert vocabulary.removed == frozenset()
    for rows in vocabulary.maps.values():
        assert rows.tolist() == list(range(speakers.rows["father"]))
    config = {"vocab_size": speakers.rows["father"], "eos_token_id": 7}
    assert vocabulary.config_changes(config) == config


def test_a_father_whose_ids_have_gaps_is_refused(speakers: Speakers) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 5}, "<unk>"))
    speakers.write("father", tokenizer, 10)
    speakers.write("mother", word_level(["eins"]))
    message = speakers.refusal()
    assert message.startswith(
        f"{speakers.folder / 'father'}/tokenizer.json: token 'eins' would be "
    )
    assert "gaps" in message
    assert speakers.choose("mother").rows == 2


# -- a parent's or the base's ----------------------------------------------------------------

SPECIAL = {"bos_token_id": 290, "eos_token_id": [290, 291], "pad_token_id": None}


def two_owners(speakers: Speakers) -> None:
    father_files = {
        "tokenizer_config.json": b'{"eos_token": "<|end|>"}',
        "merges.txt": b"#",
        "chat_template.jinja": b"father",
        "generation_config.json": json.dumps({"eos_token_id": [290, 291], "top_k": 3}).encode(),
        "preprocessor_config.json": b"{}",
    }
    mother_files = {
        "tokenizer_config.json": b'{"eos_token": "<|stop|>"}',
        "vocab.json": b"{}",
        "preprocessor_config.json": b'{"mother": 1}',
    }
    father = byte_level(ENGLISH, 290, ["<|end|>", "<|father|>"])
    mother = permuted(byte_level(GERMAN, 300, ["<|stop|>", "<|end|>"]), 3)
    config = {**SPECIAL, "text_config": {"vocab_size": 295, "eos_token_id": 291}}
    speakers.write("father", father, 3, config=config, files=father_files)
    speakers.write("mother", mother, 20, config={"eos_token_id": 300}, files=mother_files)


@pytest.mark.parametrize("choice", ["mother", "base"])
def test_a_chosen_vocabulary_is_its_owners(speakers: Speakers, choice: str) -> None:
    two_owners(speakers)
    speakers.write("base", byte_level([*ENGLISH, *GERMAN], 320), 9)
    vocabulary = speakers.choose(choice)
    assert vocabulary.owner == choice
    child = meanings(speakers.tokenizers[choice])
    assert_maps(vocabulary, speakers.slow(choice, child, speakers.rows[choice]))
    folder = speakers.folder / choice
    assert child_tokenizer(vocabulary).to_str() == speakers.tokenizers[choice].to_str()
    assert vocabulary.companions["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    for name in speakers.tokenizers:
        texts = meanings(speakers.tokenizers[name])
        unknown = {text for text in texts.values() if text not in child.values()}
        assert len(vocabulary.left_out[name]) == len(unknown)
    assert "<|father|>" in vocabulary.left_out["father"]


def test_a_chosen_vocabulary_brings_its_files_and_takes_the_fathers_away(
    speakers: Speakers,
) -> None:
    two_owners(speakers)
    vocabulary = speakers.choose("mother")
    assert set(vocabulary.companions) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "generation_config.json",
    }
    assert vocabulary.companions["tokenizer_config.json"] == b'{"eos_token": "<|stop|>"}'
    assert vocabulary.removed == {"merges.txt", "chat_template.jinja"}
    generation = json.loads(vocabulary.companions["generation_config.json"])
    assert generation == {"eos_token_id": [301], "top_k": 3}


def test_ids_of_special_tokens_follow_the_tokens(speakers: Speakers) -> None:
    two_owners(speakers)
    father = json.loads((speakers.folder / "father" / "config.json").read_text())
    changed = speakers.choose("mother").config_changes(father)
    rows = speakers.rows["mother"]
    assert changed == father | {
        "vocab_size": rows,
        "bos_token_id": 301,
        "eos_token_id": [301],  # the mother does not know <|father|>
        # the mother's own, because she knows none of the father's
        "text_config": {"vocab_size": rows, "eos_token_id": 300},
    }
    assert speakers.choose("father").config_changes(father) == father | {
        "vocab_size": speakers.rows["father"],
        "text_config": {"vocab_size": speakers.rows["father"], "eos_token_id": 291},
    }


def test_ids_of_no_token_become_the_owners_or_none(speakers: Speakers) -> None:
    two_owners(speakers)
    config = {"pad_token_id": -1, "eos_token_id": -1, "sep_token_id": [], "cls_token_id": "x"}
    changed = speakers.choose("mother").config_changes(config)
    del changed["vocab_size"]
    assert changed == {
        "pad_token_id": None,
        "eos_token_id": 300,
        "sep_token_id": [],
        "cls_token_id": None,
    }


def test_a_token_that_the_model_cannot_do_without_is_not_lost(speakers: Speakers) -> None:
    two_owners(speakers)
    config = {"vocab_size": 5, "image_token_id": 291}
    with pytest.raises(BadInputError, match=r"image_token_id is 291.*vocabulary: union"):
        speakers.choose("mother").config_changes(config)
    assert speakers.choose("union").config_changes(config)["image_token_id"] == 291
    # A row without a token stays where it is.
    config["image_token_id"] = speakers.rows["father"] - 1
    with pytest.raises(BadInputError, match="image_token_id"):
        speakers.choose("mother").config_changes(config)


# -- loading with transformers ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [("llama", "PreTrainedTokenizerFast"), ("qwen2", "Qwen2Tokenizer")],
)
@pytest.mark.parametrize("older", [False, True])
def test_transformers_loads_the_tokenizer_of_a_union(
    speakers: Speakers, model_type: str, tokenizer_class: str, older: bool
) -> None:
    special = ["<|endoftext|>", "<|im_end|>"]
    father = byte_level(ENGLISH, 290, special)
    mother = byte_level(JAPANESE, 310, [*special, "<|tool|>"])
    settings: dict[str, Any] = {
        "tokenizer_class": tokenizer_class,
        "eos_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
    }
    files = {}
    if older:
        listed = json.loads(father.to_str())["added_tokens"]
        settings["added_tokens_decoder"] = {str(entry.pop("id")): entry for entry in listed}
        files["added_tokens.json"] = b'{"<|endoftext|>": 290, "<|im_end|>": 291}'
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    speakers.write("father", father, config={"model_type": model_type}, files=files)
    speakers.write("mother", mother, config={"model_type": model_type})
    vocabulary = speakers.choose("union")
    folder = speakers.folder / "father"
    before = transformers.AutoTokenizer.from_pretrained(folder)
    for name, data in vocabulary.companions.items():
        (folder / name).write_bytes(data)
    after = transformers.AutoTokenizer.from_pretrained(folder)
    plain = child_tokenizer(vocabulary)
    assert len(after) == plain.get_vocab_size(with_added_tokens=True) <= vocabulary.rows
    for text in ENGLISH:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    text = "the fox 名前は<|tool|>"
    assert after(text)["input_ids"] == plain.encode(text).ids
    assert after.decode(after(text)["input_ids"]) == text
    assert after.decode(after(text)["input_ids"], skip_special_tokens=True) == text[:-8]
    if older:
        listed = json.loads(vocabulary.companions["added_tokens.json"])
        assert listed["<|tool|>"] == plain.token_to_id("<|tool|>")
        assert listed["<|endoftext|>"] == 290


# -- what is refused -------------------------------------------------------------------------


def test_a_choice_of_nobody_is_refused(speakers: Speakers) -> None:
    speakers.write("father", word_level(["one"]))
    assert "'base'" in speakers.refusal("base")


@pytest.mark.parametrize(
    ("files", "found"),
    [({}, "no tokenizer at all"), ({"tokenizer.model": b"x"}, "tokenizer.model")],
)
def test_a_checkpoint_without_tokenizer_json_is_refused(
    speakers: Speakers, files: dict[str, bytes], found: str
) -> None:
    speakers.write("father", word_level(["one"]))
    speakers.write("mother", word_level(["one"]), files=files)
    (speakers.folder / "mother" / "tokenizer.json").unlink()
    message = speakers.refusal()
    assert message.startswith(f"{speakers.folder / 'mother'}/tokenizer.json: missing")
    assert found in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("number", ["-1", "1.5", '"1"', "true", str(1 << 40)])
def test_ids_that_are_none_are_refused(speakers: Speakers, number: str) -> None:
    speakers.write("father", word_level(["one"]))
    path = speakers.folder / "father" / "tokenizer.json"
    path.write_text(f'{{"model": {{"vocab": {{"a": {number}}}}}}}')
    assert speakers.refusal().startswith(f"{path}: not of the form")


def test_what_tokenizers_cannot_load_is_refused(speakers: Speakers) -> None:
    speakers.write("father", word_level(["one"]))
    speakers.write("mother", word_level(["two"]))
    path = speakers.folder / "father" / "tokenizer.json"
    path.write_text('{"model": {"type": "Nothing", "vocab": {"a": 0}}}')
    assert speakers.refusal().startswith(f"{path}: tokenizers cannot load it")


def test_rows_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(4, WIDTH),
        "model.embed_tokens_per_layer.weight": torch.zeros(3, WIDTH),
    }
    files = {"tokenizer.json": word_level(["one"]).to_str().encode()}
    parents = {"a": open_checkpoint(str(write_checkpoint(tmp_path / "a", tensors, files=files)))}
    with pytest.raises(BadInputError, match=r"embed_tokens_per_layer.weight has 3 rows but"):
        child_vocabulary(parents, None, "union")
    del tensors["model.embed_tokens.weight"]
    parents = {"b": open_checkpoint(str(write_checkpoint(tmp_path / "b", tensors, files=files)))}
    with pytest.raises(BadInputError, match=r"no tensor embed_tokens.weight"):
        child_vocabulary(parents, None, "union")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("embed_tokens.weight", True),
        ("lm_head.weight", True),
        ("lm_head.bias", True),
        ("embed_tokens_per_layer.weight", True),
        ("mtp.embed_tokens.weight", True),
        ("layers.61.shared_head.head.weight", True),
        ("layers.0.self_attn.q_proj.weight", False),
        ("visual.embed_tokens.weight", False),
        ("per_layer_model_projection.weight", False),
    ],
)
def test_which_tensors_have_a_row_per_token(name: str, is_one: bool) -> None:
    assert is_token_indexed(name) is is_one


def test_the_spelling_of_bytes_is_that_of_tokenizers(tmp_path: Path) -> None:
    texts = ["".join(map(chr, range(1, 600))), "日本語 🎉"]
    tokenizer = byte_level(texts, 700)
    folder = write_speaker(tmp_path / "a", tokenizer, 700, 0)
    tokens = read_tokens(open_checkpoint(str(folder))).by_id
    for text in texts:
        numbers = tokenizer.encode(text).ids
        assert b"".join(tokens[number].text for number in numbers).decode() == text
