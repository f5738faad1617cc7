"""Checkpoints with real tokenizers of their own, and the rows of a child in plain dictionaries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.checkpoint_files import CONFIG, write_checkpoint

ENGLISH = ["the quick brown fox jumps over the lazy dog", "the dog sleeps, the fox runs away"]
GERMAN = ["der schnelle Fuchs springt über den Hund", "der Hund schläft, die Füchse laufen weg"]
JAPANESE = ["吾輩は猫である。名前はまだ無い。", "名前は猫である。吾輩はまだ無い。"]

WIDTH = 6
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def byte_level(texts: Iterable[str], size: int, special: Iterable[str] = ("<|end|>",)) -> Tokenizer:
    """Byte-level BPE, its special tokens behind the others as those of Llama 3 and Qwen are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts] * 4, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def unigram(texts: Iterable[str], size: int) -> Tokenizer:
    """Unigram over pieces that begin with `▁`, as SentencePiece trains them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts] * 4, trainer)
    return tokenizer


def word_level(words: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(["<unk>", *words])}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def added(content: str, **flags: Any) -> AddedToken:
    return AddedToken(content, **flags)


def permuted(tokenizer: Tokenizer, seed: int) -> Tokenizer:
    """The same BPE or WordLevel tokenizer with its model's ids shuffled; added tokens keep theirs."""
    data = json.loads(tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    shuffled = torch.randperm(
        len(vocabulary), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    data["model"]["vocab"] = {token: shuffled[number] for token, number in vocabulary.items()}
    return Tokenizer.from_str(json.dumps(data))


def write_speaker(
    folder: Path,
    tokenizer: Tokenizer,
    rows: int,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    head: bool = True,
    config: dict[str, Any] | None = None,
    files: dict[str, bytes] | None = None,
) -> Path:
    """A checkpoint of `rows` random rows, and a norm, that speaks `tokenizer`."""
    generator = torch.Generator().manual_seed(seed)
    names = [EMBEDDING, *([HEAD] if head else [])]
    tensors = {
        name: torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for name in names
    }
    tensors["model.norm.weight"] = torch.ones(WIDTH, dtype=dtype)
    given = {"tokenizer.json": tokenizer.to_str().encode()} | (files or {})
    whole = CONFIG | {"vocab_size": rows, "tie_word_embeddings": False} | (config or {})
    return write_checkpoint(folder, tensors, config=whole, files=given)


def meanings(tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> the text that a token stands for, by the tokenizer's own decoder; what is no whole
    character (and what is spelt by a decoder that drops leading spaces) is told by its spelling."""
    found = {}
    is_byte_level = "ByteLevel" in repr(tokenizer.decoder)
    plain = {
        number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    for spelling, number in tokenizer.get_vocab(with_added_tokens=True).items():
        text = spelling.replace("▁", " ")
        if is_byte_level:
            text = tokenizer.decode([number], skip_special_tokens=False)
            if "\N{REPLACEMENT CHARACTER}" in text:
                text = f"bytes {spelling}"
        found[number] = plain.get(number, text)
    return found


Row = tuple[float, ...]


class SlowRows:
    """The reference: what each checkpoint's row is for each row of the child, by dictionaries.

    `speakers`: checkpoint -> (tokenizer, its rows `[rows, columns]` as floats), the father first, the base
    as `base`. `child`: row of the child -> the text of its token. `rows`: those that the child has.
    """

    def __init__(
        self,
        speakers: dict[str, tuple[Tokenizer, list[list[float]]]],
        owner: str,
        child: dict[int, str],
        rows: int,
    ) -> None:
        self.speakers = speakers
        self.texts = {name: meanings(tokenizer) for name, (tokenizer, _) in speakers.items()}
        self.child, self.rows = child, rows
        self.owner_rows = len(speakers[owner][1])

    def own(self, name: str, row: int) -> int:
        """The checkpoint's own row, -1 for none."""
        values = self.speakers[name][1]
        if row not in self.child:
            is_padding = row not in self.texts[name] and row < min(len(values), self.owner_rows)
            return row if is_padding else -1
        numbers = {
            text: number for number, text in self.texts[name].items() if number < len(values)
        }
        return numbers.get(self.child[row], -1)

    def value(self, name: str, row: int) -> list[float]:
        own = self.own(name, row)
        if own < 0:
            return self.fill(row)
        return self.speakers[name][1][own]

    def fill(self, row: int) -> list[float]:
        if "base" in self.speakers and (own := self.own("base", row)) >= 0:
            return self.speakers["base"][1][own]
        known = [
            values[own]
            for name, (_, values) in self.speakers.items()
            if name != "base" and (own := self.own(name, row)) >= 0
        ]
        return mean(known or next(iter(self.speakers.values()))[1])


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def union(
    speakers: dict[str, Tokenizer],
    rows: dict[str, int],
    can_be_added: Callable[[str], bool],
) -> dict[int, str]:
    """Id -> text of a union's tokens, the father first."""
    father, *others = speakers
    child = meanings(speakers[father])
    spellings = set(speakers[father].get_vocab(with_added_tokens=True))
    for name in others:
        for number, text in sorted(meanings(speakers[name]).items()):
            if text in child.values() or text.startswith("bytes ") or text in spellings:
                continue
            if number < rows[name] and can_be_added(text):
                child[max(child) + 1] = text
    return child
