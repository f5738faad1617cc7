"""What the transformers engine writes, against `model.generate` of one prompt alone and plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import chisquare

from tests.families import write_family
from workers.checkpoints import open_checkpoint
from workers.errors import BadInputError
from workers.evaluation import Decoding
from workers.evaluation.engines.forward import LiveModel
from workers.evaluation.engines.generating import plan_generation
from workers.evaluation.engines.transformers_engine import TransformersEngine

KINDS = [
    "llama",
    "qwen3_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "gemma3",
    "gemma4",
    "gpt2",
    "bloom",
    "gpt_neox",
    "nemotron_h",
]
UNLIKE = ["a", "what is this", "xyzzy = ", "abcdefghijklmnopqrstuvwxyz", "bb", "what is that", "q"]
SHOTS = "ab = ba? cd = dc? ef = fe? gh = hg? " * 3
ALIKE = [SHOTS + rest for rest in ("xy", "zyx", "abcdefgh", "xy", "k", "zyx wv", "pqrst")]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TransformersEngine]:
    root = tmp_path_factory.mktemp("families")
    found = {}
    for kind in KINDS:
        (path,) = write_family(root / kind, kind, parents=0)
        found[kind] = make_engine(path)
    return found


def make_engine(path: Path, batch_size: int = 3) -> TransformersEngine:
    parents = {name: open_checkpoint(str(path)) for name in "ab"}
    engine = TransformersEngine(parents, None, dtype="float32", batch_size=batch_size)
    # So that what comes next depends on what was before.
    for weight in engine.model.parameters():
        if weight.ndim > 1:
            weight.mul_(8)
    return engine


def alone(engine: TransformersEngine, prompt: str, tokens: int) -> list[int]:
    """What transformers writes after one prompt."""
    given = engine.tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        written = engine.model.generate(**given, max_new_tokens=tokens, do_sample=False)
    ids: list[int] = written[0, given["input_ids"].shape[1] :].tolist()
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [UNLIKE, ALIKE], ids=["unlike", "alike"])
def test_rows_that_come_and_go_write_what_each_writes_alone(
    kind: str,
    prompts: list[str],
    engines: dict[str, TransformersEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three rows for seven prompts, longer than the windows of sliding layers; answers end at any time."""
    engine = engines[kind]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", [])
    written = [alone(engine, prompt, 20) for prompt in prompts]
    ends = [ids[place] for ids, place in zip(written, (9, 4, 1), strict=False)]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", ends)
    lengths = set()
    for prompt, found in zip(prompts, engine.generate(prompts, Decoding(20)), strict=True):
        ids = alone(engine, prompt, 20)
        assert found.text == engine.tokenizer.decode(ids, skip_special_tokens=True)
        assert found.tokens == len(ids)
        assert found.truncated is (ids[-1] not in ends)
        lengths.add(len(ids))
    assert len(lengths) > 1


RECURRENT: dict[str, Any] = {
    "Bamba": {"attn_layer_indices": [1, 3], "mamba_chunk_size": 16},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_chunk_size": 16},
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_models_count_on_after_what_they_have_read(kind: str) -> None:
    """Against the whole text read anew for each token; a row leaves amid the answer."""
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, **RECURRENT[kind],
        **({} if kind == "Lfm2" else mamba),
        **({"num_local_experts": 2, "shared_intermediate_size": 64} if "Moe" in kind else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.mul_(4)
    live = LiveModel(model, torch.device("cpu"), 3)
    texts = torch.randint(1, 64, (3, 7))
    cache, new = live.after(None, 3), texts
    for step in range(6):
        expected = model(input_ids=texts, use_cache=False).logits[:, -1]
        found = live.logits(new, cache)[:, -1]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        new = expected.argmax(-1)[:, None]
        texts = torch.cat([texts, new], dim=1)
        if step == 2:
            cache.reorder_cache(torch.tensor([2, 0]))
            texts, new = texts[[2, 0]], new[[2, 0]]


def test_a_model_whose_rows_cannot_leave_writes_no_answers() -> None:
    config = transformers.RecurrentGemmaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, lru_width=64,
    )  # fmt: skip
    live = LiveModel(transformers.RecurrentGemmaForCausalLM(config), torch.device("cpu"), 3)
    with pytest.raises(BadInputError, match="no cache that answers could be written with"):
        plan_generation(live, [np.array([1, 2])])


def count_tokens(engine: TransformersEngine) -> tuple[list[int], Any]:
    """Rows times length of every pass from now on, until the hook is removed."""
    sizes: list[int] = []

    def watch(module: Any, args: Any, given: dict[str, Any]) -> None:
        sizes.append(given["input_ids"].numel())

    return sizes, engine.model.register_forward_pre_hook(watch, with_kwargs=True)


def test_what_prompts_have_in_common_is_read_once(engines: dict[str, TransformersEngine]) -> None:
    engine = engines["qwen3_5"]
    sizes, hook = count_tokens(engine)
    engine.generate(ALIKE, Decoding(1))
    hook.remove()
    common = len(engine.tokenizer(SHOTS)["input_ids"])
    rest = sum(len(prompt) - len(SHOTS) for prompt in set(ALIKE))
    assert sizes[0] == common
    # The prompt that comes twice may be read again, if it comes with another set of rows.
    assert rest <= sum(sizes[1:]) <= rest + 2


def test_rows_that_have_ended_are_not_computed(
    engines: dict[str, TransformersEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines["qwen3_5"]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", [])
    ends = [alone(engine, prompt, 9)[place] for prompt, place in zip(UNLIKE, (8, 4), strict=False)]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", ends)
    sizes, hook = count_tokens(engine)
    found = engine.generate(UNLIKE[:3], Decoding(20))
    hook.remove()
    counts = [generation.tokens for generation in found]
    assert min(counts) < max(counts)
    # The last token of an answer is not read.
    assert sizes[1:] == [sum(count > step for count in counts) for step in range(1, max(counts))]


@pytest.mark.parametrize("kind", ["llama", "qwen3_5", "gemma3"])
def test_a_sample_depends_on_its_seed_alone(
    kind: str, engines: dict[str, TransformersEngine]
) -> None:
    engine = engines[kind]
    decoding = Decoding(16, (), 1.3, 0.9)
    seeds = [5, 6, 7, 8, 9, 10, 11]
    together = engine.generate(ALIKE, decoding, seeds)
    for prompt, seed, found in zip(ALIKE, seeds, together, strict=True):
        (single,) = engine.generate([prompt], decoding, [seed])
        assert single.text == found.text
        assert single.entropy == pytest.approx(found.entropy, abs=1e-5)
    turned = engine.generate(ALIKE[::-1], decoding, seeds[::-1])
    assert [g.text for g in turned[::-1]] == [g.text for g in together]
    others = engine.generate(ALIKE, decoding, [seed + 100 for seed in seeds])
    assert [g.text for g in others] != [g.text for g in together]


def first_tokens(
    engine: TransformersEngine, prompt: str, decoding: Decoding, count: int
) -> torch.Tensor:
    """How often each token comes first."""
    counts = torch.zeros(engine.live.vocabulary)
    vocabulary = engine.tokenizer.get_vocab()
    for found in engine.generate([prompt] * count, decoding, range(count)):
        counts[vocabulary[found.text] if found.text else 0] += 1
    return counts


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.6)])
def test_frequencies_are_those_of_the_softmax(
    temperature: float, top_p: float, engines: dict[str, TransformersEngine]
) -> None:
    """Chi-square of 4,000 first tokens, fixed seeds, against softmax and nucleus written out."""
    engine = engines["llama"]
    engine.live.rows, before = 500, engine.live.rows
    counts = first_tokens(engine, "abc", Decoding(1, (), temperature, top_p), 4000)
    engine.live.rows = before
    ids = engine.tokenizer("abc", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = engine.model(ids).logits[0, -1].double() / temperature
    expected = (logits - logits.logsumexp(0)).exp()
    nucleus: set[int] = set()
    for token in sorted(range(len(expected)), key=lambda token: -float(expected[token])):
        if sum(float(expected[one]) for one in nucleus) < top_p:
            nucleus.add(token)
    for token in range(len(expected)):
        if token not in nucleus:
            expected[token] = 0.0
    expected /= expected.sum()
    # Tokens without a text of their own are counted as the first.
    shown = set(engine.tokenizer.get_vocab().values()) - set(engine.tokenizer.all_special_ids)
    hidden = [token for token in range(len(expected)) if token not in shown]
    total = expected[hidden].sum()
    expected[hidden] = 0.0
    expected[0] = total
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert possible.sum() > 5
    assert chisquare(counts[possible], expected[possible] * 4000).pvalue > 0.01


@pytest.mark.parametrize("decoding", [Decoding(5), Decoding(5, (), 0.7, 0.8)])
def test_entropy_is_the_mean_of_the_written_tokens(
    decoding: Decoding, engines: dict[str, TransformersEngine]
) -> None:
    """Of the softmax at temperature 1, whatever the decoding: one pass over the whole text."""
    engine = engines["qwen3_moe"]
    vocabulary = engine.tokenizer.get_vocab()
    compared = 0
    prompts = UNLIKE * 3
    answers = engine.generate(prompts, decoding, range(len(prompts)))
    for prompt, found in zip(prompts, answers, strict=True):
        ids = engine.tokenizer(prompt)["input_ids"]
        if len(found.text) < found.tokens:
            continue  # the text does not show which special tokens are among the others
        written = [vocabulary[letter] for letter in found.text]
        whole = torch.tensor([[*ids, *written]])
        with torch.inference_mode():
            logprobs = engine.model(whole).logits[0, len(ids) - 1 :].double().log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)[: found.tokens]
        assert found.entropy == pytest.approx(float(entropies.mean()), abs=1e-5)
        compared += 1
    assert compared > 2


def test_stop_texts_of_several_tokens_end_an_answer_where_they_end(
    engines: dict[str, TransformersEngine],
) -> None:
    engine = engines["llama"]
    (whole,) = engine.generate(["xyzzy = "], Decoding(20))
    assert len(whole.text) > 6
    word = whole.text[3:6]
    sizes, hook = count_tokens(engine)
    (cut,) = engine.generate(["xyzzy = "], Decoding(20, (word,)))
    hook.remove()
    assert cut.text == whole.text[: whole.text.index(word)]
    assert not cut.truncated
    assert cut.tokens == whole.text.index(word) + 3 == len(sizes)


def test_a_model_that_gives_no_number_still_answers(
    engines: dict[str, TransformersEngine], tmp_path: Path
) -> None:
    (path,) = write_family(tmp_path, "llama", parents=0)
    engine = make_engine(path)
    with torch.no_grad():
        engine.model.lm_head.weight.fill_(math.nan)
    for decoding in (Decoding(3), Decoding(3, (), 1.0), Decoding(3, (), 1.0, 0.5)):
        found = engine.generate(["ab", "c"], decoding, [1, 2])
        assert all(math.isnan(generation.entropy) for generation in found)


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    (path,) = write_family(tmp_path, "llama", parents=0)
    engine = make_engine(path)
    engine.tokenizer._tokenizer.post_processor = None
    with pytest.raises(BadInputError, match="empty prompt"):
        engine.generate(["a", ""], Decoding(3))
