"""Rows of a child's embedding as each parent would have them: order, fills, bits, any range."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer

from orchestrator.single_merge import merge_recipe
from tests.checkpoint_files import RemoteStore, open_remote, read_tensors, tensor_bytes, to_float64
from tests.families import SMALL
from tests.vocabularies import (
    EMBEDDING,
    ENGLISH,
    GERMAN,
    HEAD,
    JAPANESE,
    WIDTH,
    SlowRows,
    byte_level,
    meanings,
    permuted,
    word_level,
    write_speaker,
)
from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor, open_checkpoint
from workers.checkpoints.vocabulary import ChildVocabulary, child_vocabulary
from workers.merging import token_rows
from workers.merging.sources import Source
from workers.merging.token_rows import TokenRows


class Child:
    """A vocabulary and the rows of its tensors, over checkpoints written under one folder."""

    def __init__(self, opened: dict[str, Checkpoint], choice: str) -> None:
        self.opened = opened
        parents = {name: found for name, found in opened.items() if name != "base"}
        self.vocabulary: ChildVocabulary = child_vocabulary(parents, opened.get("base"), choice)
        self.sources = {name: Source(checkpoint) for name, checkpoint in opened.items()}

    def rows(self, tensor: str) -> TokenRows:
        maps = {
            name: ArchitectureMap(checkpoint).by_name for name, checkpoint in self.opened.items()
        }
        tensors = {name: found[tensor] for name, found in maps.items() if tensor in found}
        return TokenRows(self.vocabulary, self.sources, tensors)


def tokenizers() -> dict[str, Tokenizer]:
    return {
        "father": byte_level(ENGLISH, 290),
        "mother": permuted(byte_level(GERMAN, 310, ["<|end|>", "<|tool|>"]), 1),
        "donor": permuted(byte_level([*GERMAN, *JAPANESE], 330), 2),
        "base": byte_level([*ENGLISH, *JAPANESE], 320),
    }


PADDING = {"father": 9, "mother": 30, "donor": 0, "base": 2}


def write_all(folder: Path, dtypes: dict[str, torch.dtype], *names: str) -> dict[str, Checkpoint]:
    for seed, name in enumerate(names):
        tokenizer = tokenizers()[name]
        rows = tokenizer.get_vocab_size(with_added_tokens=True) + PADDING[name]
        dtype = dtypes.get(name, torch.bfloat16)
        write_speaker(folder / name, tokenizer, rows, seed, dtype)
    return {name: open_checkpoint(str(folder / name)) for name in names}


def reference(child: Child, folder: Path, tensor: str) -> dict[str, numpy.ndarray]:
    """What each checkpoint's rows should be, in float64."""
    owner = child.vocabulary.owner
    data = child.vocabulary.companions.get("tokenizer.json")
    tokenizer = tokenizers()[owner] if data is None else Tokenizer.from_buffer(data)
    speakers = {
        name: (tokenizers()[name], to_float64(read_tensors(folder / name)[tensor]).tolist())
        for name in child.opened
    }
    slow = SlowRows(speakers, owner, meanings(tokenizer), child.vocabulary.rows)
    return {
        name: numpy.array([slow.value(name, row) for row in range(slow.rows)]) for name in speakers
    }


CASES = [
    (names, choice)
    for names in (("father", "mother"), ("father", "mother", "donor", "base"))
    for choice in ("union", "mother", *(["base"] if "base" in names else []))
]


@pytest.mark.parametrize(("names", "choice"), CASES)
@pytest.mark.parametrize("mixed", [False, True])
def test_every_row_is_that_of_its_token(
    tmp_path: Path, names: tuple[str, ...], choice: str, mixed: bool
) -> None:
    dtypes = {"mother": torch.float32, "base": torch.float16} if mixed else {}
    child = Child(write_all(tmp_path, dtypes, *names), choice)
    for stored in (EMBEDDING, HEAD):
        rows = child.rows(stored.removeprefix("model."))
        assert rows.shape == (child.vocabulary.rows, WIDTH)
        for name, expected in reference(child, tmp_path, stored).items():
            found = rows.read(name, 0, expected.size)
            # Copies are exact; means are rounded once, to fp32.
            wanted = torch.from_numpy(expected).float().reshape(-1)
            assert torch.equal(found.float(), wanted), name
            assert (found.dtype == torch.bfloat16) == (
                not mixed and (child.vocabulary.maps[name] >= 0).all()
            )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "BLOCK_ELEMENTS", 5 * WIDTH)
    monkeypatch.setattr(token_rows, "GAP_ELEMENTS", 2 * WIDTH)


@pytest.mark.parametrize("remote", [False, True])
def test_a_stretch_is_the_same_whatever_else_is_read(
    tmp_path: Path, small_blocks: None, remote: bool
) -> None:
    opened = write_all(tmp_path, {"mother": torch.float32}, *tokenizers())
    if remote:
        opened = {name: open_remote(tmp_path / name) for name in opened}
    child = Child(opened, "union")
    rows = child.rows("embed_tokens.weight")
    size = child.vocabulary.rows * WIDTH
    generator = random.Random(0)
    for name, expected in reference(child, tmp_path, EMBEDDING).items():
        whole = rows.read(name, 0, size)
        assert torch.equal(whole.float(), torch.from_numpy(expected).float().reshape(-1))
        for _ in range(60):
            first = generator.randrange(size)
            count = generator.choice([0, 1, 3, WIDTH, 5 * WIDTH, size])
            count = min(count, size - first)
            part = rows.read(name, first, count)
            assert part.dtype == whole.dtype
            assert tensor_bytes(part) == tensor_bytes(whole[first : first + count])


def test_threads_read_the_same(tmp_path: Path, small_blocks: None) -> None:
    child = Child(write_all(tmp_path, {}, *tokenizers()), "union")
    size = child.vocabulary.rows * WIDTH
    alone = child.rows("lm_head.weight").read("mother", 0, size)
    together = child.rows("lm_head.weight")
    starts = range(0, size, 7)
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda first: together.read("mother", first, min(7, size - first)), starts)
        assert torch.equal(torch.cat(list(parts)), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_a_parent_has_is_copied_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also a NaN's payload, among rows that are filled from others of another dtype."""
    opened = write_all(tmp_path, {"mother": dtype, "base": torch.float64}, *tokenizers())
    file = tmp_path / "mother" / "model.safetensors"
    entry = opened["mother"].tensors[EMBEDDING]
    data = bytearray(file.read_bytes())
    random_bits = numpy.random.default_rng(0).integers(0, 256, entry.stop - entry.start, "u1")
    data[entry.start : entry.stop] = random_bits.tobytes()
    file.write_bytes(data)
    opened["mother"] = open_checkpoint(str(tmp_path / "mother"))
    stored = read_tensors(tmp_path / "mother")[EMBEDDING]
    child = Child(opened, "union")
    rows = child.rows("embed_tokens.weight")
    values = torch.empty(child.vocabulary.rows, WIDTH, dtype=dtype)
    rows.copy_into("mother", 0, values.view(-1))
    own = torch.from_numpy(child.vocabulary.maps["mother"])
    has = own >= 0
    assert 200 < int(has.sum()) < len(has)
    assert tensor_bytes(values[has]) == tensor_bytes(stored[own[has]])


def test_a_row_that_one_parent_has_is_given_to_the_others_as_it_is(tmp_path: Path) -> None:
    parents = {"a": ["one"], "b": ["zwei"], "c": ["one", "tri"]}
    for seed, (name, words) in enumerate(parents.items()):
        dtype = torch.float64 if name == "c" else torch.float32
        write_speaker(tmp_path / name, word_level(words), 1 + len(words), seed, dtype)
    child = Child({name: open_checkpoint(str(tmp_path / name)) for name in parents}, "union")
    stored = {name: read_tensors(tmp_path / name)[EMBEDDING].double() for name in parents}
    rows = child.rows("embed_tokens.weight")
    got = {name: rows.read(name, 0, 64 * WIDTH).double().view(64, WIDTH) for name in parents}
    assert rows.dtype("a") == torch.float64
    one, zwei, tri = 1, 2, 3
    assert torch.equal(got["a"][one], stored["a"][1])
    assert torch.equal(got["c"][one], stored["c"][1])
    both = ((stored["a"][1] + stored["c"][1]) / 2).float().double()
    assert torch.equal(got["b"][one], both)
    for name in parents:
        assert torch.equal(got[name][zwei], stored["b"][1])
        assert torch.equal(got[name][tri], stored["c"][2])
        # Rows that nobody has: the mean of the father's two.
        average = stored["a"].mean(0).float().double()
        assert torch.equal(got[name][4:], average.expand(60, -1))


def test_a_checkpoint_without_the_tensor_knows_nothing(tmp_path: Path) -> None:
    for seed, (name, head) in enumerate((("father", True), ("mother", True), ("base", False))):
        write_speaker(tmp_path / name, word_level(["a", name]), 3, seed, torch.float32, head)
    names = ("father", "mother", "base")
    child = Child({name: open_checkpoint(str(tmp_path / name)) for name in names}, "base")
    heads = {name: read_tensors(tmp_path / name)[HEAD] for name in names[:2]}
    rows = child.rows("lm_head.weight")
    for name in names[:2]:
        found = rows.read(name, 0, 3 * WIDTH).view(3, WIDTH)
        assert torch.equal(found[:2], heads[name][:2])
        assert torch.equal(found[2], heads["father"].double().mean(0).float())


def test_rows_of_parents_of_one_vocabulary_are_read_as_they_are(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_speaker(tmp_path / name, byte_level(ENGLISH, 290), 300, seed)
    child = Child({name: open_checkpoint(str(tmp_path / name)) for name in "ab"}, "union")
    for name in "ab":
        found = child.rows("embed_tokens.weight").read(name, 0, 300 * WIDTH)
        assert found.dtype == torch.bfloat16
        assert tensor_bytes(found) == tensor_bytes(read_tensors(tmp_path / name)[EMBEDDING])


class CountingSource(Source):
    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.reads: list[int] = []

    def read(self, tensor: LogicalTensor, first: int, count: int) -> torch.Tensor:
        self.reads.append(count)
        return super().read(tensor, first, count)


@pytest.mark.parametrize("seed", [None, 5])
def test_remote_rows_are_read_in_few_and_bounded_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    monkeypatch.setattr(token_rows, "BLOCK_ELEMENTS", 100 * WIDTH)
    words = [f"w{number}" for number in range(999)]
    own = word_level(words) if seed is None else permuted(word_level(words), seed)
    write_speaker(tmp_path / "father", word_level(words), 1000, 0)
    write_speaker(tmp_path / "mother", own, 1000, 1)
    opened = {name: open_remote(tmp_path / name) for name in ("father", "mother")}
    assert isinstance(opened["mother"].store, RemoteStore)
    child = Child(opened, "father")
    source = child.sources["mother"] = CountingSource(opened["mother"])
    values = child.rows("embed_tokens.weight").read("mother", 0, 1000 * WIDTH)
    stored = read_tensors(tmp_path / "mother")[EMBEDDING]
    order = [own.token_to_id(word) for word in ["<unk>", *words]]
    assert torch.equal(values.view(1000, WIDTH), stored[order])
    assert max(source.reads) <= 100 * WIDTH
    assert len(source.reads) <= (10 if seed is None else 100)


# -- as a merge uses it ----------------------------------------------------------------------


def write_llama(folder: Path, tokenizer: Tokenizer, rows: int, seed: int) -> None:
    """A model that transformers loads, with its tokenizer."""
    config = transformers.LlamaConfig(
        **SMALL | {"vocab_size": rows, "eos_token_id": rows - 1}, tie_word_embeddings=False
    )
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_a_child_of_two_vocabularies_is_a_model_that_knows_both(tmp_path: Path) -> None:
    father = byte_level(ENGLISH, 290)
    mother = permuted(byte_level(JAPANESE, 320, ["<|end|>", "<|tool|>"]), 4)
    write_llama(tmp_path / "father", father, father.get_vocab_size(), 1)
    write_llama(tmp_path / "mother", mother, mother.get_vocab_size() + 3, 2)
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "child"
    recipe.write_text(
        yaml.safe_dump(
            {
                "parents": [
                    {"name": name, "path": str(tmp_path / name)} for name in ("father", "mother")
                ],
                "rules": [{"method": "linear", "parameters": {"weight": 0.5}}],
                "vocabulary": "union",
            }
        )
    )
    merge_recipe(str(recipe), str(folder))

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    table: Any = model.get_input_embeddings().weight.detach()
    assert table.shape[0] == model.config.vocab_size == 320
    (tool,) = tokenizer("<|tool|>")["input_ids"]
    mothers = read_tensors(tmp_path / "mother")[EMBEDDING]
    fathers = read_tensors(tmp_path / "father")[EMBEDDING]
    assert torch.equal(table[tool], mothers[mother.token_to_id("<|tool|>")])
    (end,) = tokenizer("<|end|>")["input_ids"]
    half = (fathers[end].float() + mothers[mother.token_to_id("<|end|>")].float()) / 2
    assert torch.equal(table[end], half.to(torch.bfloat16))
    ids = torch.tensor([tokenizer("the fox 名前は<|tool|>")["input_ids"]])
    assert int(ids.max()) >= father.get_vocab_size()
    assert model(ids).logits.isfinite().all()
