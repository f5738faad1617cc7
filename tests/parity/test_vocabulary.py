"""Parents with different tokens, through mergekit and darwin: rows are compared by their tokens' texts.

On purpose, darwin keeps rows that no token has (mergekit cuts them) and rounds new rows up to 64, and the
ids of new tokens may be others: mergekit orders them by an unordered set of the models.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer

from orchestrator.single_merge import merge_recipe
from tests.families import LETTERS, SMALL, SPECIAL, write_tokenizer
from tests.parity.cases import Near
from tests.parity.test_mergekit import (
    Tensors,
    problems_of_elements,
    read_model,
    run_mergekit,
    with_places,
)

TOKENS = {
    "m0": [*SPECIAL, *LETTERS],
    "m1": [*SPECIAL, *LETTERS, "@", "#"],
    "m2": [*SPECIAL, *reversed(LETTERS), "#", "&"],
}
LARGEST_WEIGHT = 0.1
"""Of the models here; a sum may be near 0 where what goes into it is not."""
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")

FILES = {
    "union": """
merge_method: linear
models:
  - {model: m0, parameters: {weight: 0.2}}
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
tokenizer_source: union
""",
    "union_with_base": """
merge_method: task_arithmetic
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
tokenizer_source: union
""",
    "base": """
merge_method: task_arithmetic
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
tokenizer_source: base
""",
    "parent": """
merge_method: task_arithmetic
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
tokenizer_source: m2
""",
    "block": """
merge_method: linear
models:
  - {model: m2, parameters: {weight: 0.2}}
  - {model: m1, parameters: {weight: 0.5}}
parameters: {normalize: false}
tokenizer: {source: union}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and mergekit's children as `NAME.mergekit`."""
    folder = tmp_path_factory.mktemp("vocabulary")
    for seed, (name, tokens) in enumerate(TOKENS.items()):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**SMALL | {"vocab_size": len(tokens)})
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        write_tokenizer(folder / name, tokens)
    for name, text in FILES.items():
        config = with_places(yaml.safe_load(text), folder)
        (folder / f"{name}.yml").write_text(yaml.safe_dump(config))
    merges = [(folder / f"{name}.yml", folder / f"{name}.mergekit") for name in FILES]
    assert run_mergekit(merges, folder / "merges.json") == [None] * len(FILES)
    return folder


def by_token(model: Path) -> tuple[dict[str, int], Tensors]:
    """A model's vocabulary, and its tensors with the rows of tokens alone, in the tokens' order."""
    vocabulary = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab()
    ids = [vocabulary[token] for token in sorted(vocabulary)]
    tensors = read_model(model)
    return vocabulary, tensors | {name: tensors[name][ids] for name in BY_TOKEN}


@pytest.mark.parametrize("name", FILES)
def test_rows_of_the_same_tokens_are_mergekits(folder: Path, name: str, tmp_path: Path) -> None:
    merge_recipe(str(folder / f"{name}.yml"), str(tmp_path / "child"))
    our_tokens, ours = by_token(tmp_path / "child")
    their_tokens, theirs = by_token(folder / f"{name}.mergekit")
    assert our_tokens.keys() == their_tokens.keys()
    assert ours.keys() == theirs.keys()
    largest = {name: torch.full_like(tensor, LARGEST_WEIGHT) for name, tensor in theirs.items()}
    assert not problems_of_elements(ours, theirs, [largest], Near(ulps=4))
    child = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    assert child.config.vocab_size >= len(our_tokens)
