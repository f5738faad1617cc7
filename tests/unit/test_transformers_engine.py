"""A recipe realized in a live model and the same recipe written to disk are the same child."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.checkpoint_files import write_child
from tests.families import write_family, write_tokenizer
from workers.checkpoints import open_checkpoint
from workers.diagnostics.lazy_model import LazyModel
from workers.errors import BadInputError
from workers.evaluation import Decoding
from workers.evaluation.engines.transformers_engine import TransformersEngine
from workers.merging import Recipe, Rule, Selector
from workers.merging.executor import Merger

KINDS = [
    "qwen3", "llama", "qwen3_moe", "mixtral", "qwen3_5", "qwen3_5_moe", "qwen3_5_vision", "gpt2",
    "bloom", "falcon", "gpt_neox", "nemotron_h", "granitemoehybrid", "lfm2",
]  # fmt: skip
PROMPT = "what is this?"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    root = tmp_path_factory.mktemp("families")
    return {kind: write_family(root / kind, kind) for kind in KINDS}


def dare_ties_recipe(merger: Merger) -> Recipe:
    rule = Rule(
        Selector(
            components=("embedding", "attention", "linear_attention", "mlp", "expert", "norm")
        ),
        "dare_ties",
        {"weight": {"a": 0.9, "b": 0.7}, "density": 0.6},
    )
    rest = Rule(Selector(components=("lm_head",)), "linear", {"weight": {"a": 1.0, "b": 3.0}})
    rules = (
        (rule, rest)
        if any(t.component == "lm_head" for t in merger.plan.father.tensors)
        else (rule,)
    )
    return Recipe(merger.references, rules, merger.base_reference, seed=5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_realized_equals_written(
    kind: str, dtype: str, families: dict[str, list[Path]], tmp_path: Path
) -> None:
    base, first, second = (open_checkpoint(str(path)) for path in families[kind])
    parents = {"a": first, "b": second}
    engine = TransformersEngine(parents, base, dtype=dtype)
    recipe = dare_ties_recipe(engine.merger)
    engine.realize(recipe)

    write_child(Merger(parents, base), recipe, tmp_path / "child", threads=2)
    written = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "child", dtype="auto" if dtype == "auto" else torch.float32
    ).eval()

    live = engine.model.state_dict()
    father = transformers.AutoModelForCausalLM.from_pretrained(first.location).state_dict()
    for name, weight in written.state_dict().items():
        assert torch.equal(weight, live[name]), name
    assert any(not torch.equal(father[name].to(w.dtype), w) for name, w in live.items())
    tokens = engine.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert torch.equal(engine.model(tokens).logits, written(tokens).logits)


def test_a_tied_head_follows_the_embedding(families: dict[str, list[Path]]) -> None:
    _, first, second = (open_checkpoint(str(path)) for path in families["qwen3"])
    engine = TransformersEngine({"a": first, "b": second}, None, dtype="float32")
    rule = Rule(Selector(components=("embedding",)), "passthrough", {"source": "b"})
    engine.realize(Recipe(engine.merger.references, (rule,)))
    mother = transformers.AutoModelForCausalLM.from_pretrained(second.location, dtype=torch.float32)
    assert torch.equal(engine.model.lm_head.weight, mother.lm_head.weight)


def test_loglikelihood_is_that_of_the_whole_text(families: dict[str, list[Path]]) -> None:
    """Against the plain definition: one text at a time, no padding, token by token."""
    _, first, second = (open_checkpoint(str(path)) for path in families["llama"])
    engine = TransformersEngine({"a": first, "b": second}, None, dtype="float32")
    pairs = [("abc", " def"), ("a", "b"), ("what is this? ", "a long answer")]
    for (prompt, continuation), found in zip(pairs, engine.loglikelihood(pairs), strict=True):
        ids = engine.tokenizer(prompt + continuation, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logprobs = engine.model(ids).logits.log_softmax(-1)[0]
        count = len(continuation)  # the tokenizer has one token per character
        expected = sum(float(logprobs[i - 1, ids[0, i]]) for i in range(-count, 0))
        assert found.tokens == count
        assert found.logprob == pytest.approx(expected, abs=1e-4)


def test_generation_is_greedy_and_says_when_it_was_cut(families: dict[str, list[Path]]) -> None:
    """Against a loop that takes the likeliest token, without cache or padding."""
    _, first, second = (open_checkpoint(str(path)) for path in families["llama"])
    engine = TransformersEngine({"a": first, "b": second}, None, dtype="float32")
    prompts = ["abc", "what is it", "z"]
    for prompt, generation in zip(prompts, engine.generate(prompts, Decoding(6)), strict=True):
        ids = engine.tokenizer(prompt, return_tensors="pt")["input_ids"]
        ended = False
        for _ in range(6):
            with torch.inference_mode():
                token = int(engine.model(ids).logits[0, -1].argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            ended = token == engine.tokenizer.eos_token_id
            if ended:
                break
        text = engine.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert prompt + generation.text == text
        assert generation.truncated is not ended


def test_stop_texts_end_an_answer(families: dict[str, list[Path]]) -> None:
    _, first, second = (open_checkpoint(str(path)) for path in families["llama"])
    engine = TransformersEngine({"a": first, "b": second}, None, dtype="float32")
    (whole,) = engine.generate(["abc"], Decoding(8))
    assert len(whole.text) > 3
    word = whole.text[2]
    (cut,) = engine.generate(["abc"], Decoding(8, (word,)))
    assert cut.text == whole.text[: whole.text.index(word)]
    assert not cut.truncated


def test_a_model_with_a_table_of_positions_reads_as_far_as_it_goes(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    """Of GPT-2, 24 of them: an answer ends there, cut; and a text that is longer is refused."""
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=24, eos_token_id=None
    )
    folder = tmp_path / "short"
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    engine = TransformersEngine({"a": open_checkpoint(str(folder))}, None, "float32", batch_size=2)
    prompts = ["a" * 19, "abc"]  # and what begins a text
    long, short = engine.generate(prompts, Decoding(8))
    assert (long.tokens, long.truncated) == (4, True)
    assert (short.tokens, short.truncated) == (8, True)
    (alone,) = engine.generate(prompts[:1], Decoding(4))
    assert alone.text == long.text
    assert engine.loglikelihood([("a" * 19, "bc")])[0].tokens == 2
    for ask in (
        lambda: engine.generate(["a" * 23], Decoding(1)),
        lambda: engine.loglikelihood([("a" * 19, "bcde")]),
    ):
        with pytest.raises(
            BadInputError, match=r"GPT2LMHeadModel: a text has 24 tokens.* the 24 po"
        ):
            ask()


def test_a_father_without_all_weights_is_refused(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    first, second = families["llama"][1:]
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in first.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(first / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    parents = {"a": open_checkpoint(str(broken)), "b": open_checkpoint(str(second))}
    with pytest.raises(BadInputError, match=r"layers\.1\.mlp\.up_proj"):
        TransformersEngine(parents, None)


@pytest.mark.parametrize("makes", [TransformersEngine, LazyModel])
@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (
            "config.json",
            {
                "model_type": "own",
                "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"},
            },
        ),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        ),
    ],
)
def test_code_of_a_checkpoint_is_not_run_whatever_the_user_answers(
    makes: type,
    file: str,
    changes: dict[str, object],
    families: dict[str, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    place = copy_of(families["llama"][1], tmp_path / "with_code")
    known = json.loads((place / file).read_text())
    (place / file).write_text(json.dumps(known | changes))
    marker = tmp_path / "was_run"
    (place / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as Own, LlamaForCausalLM as Model\n"
    )
    father = open_checkpoint(str(place))
    with pytest.raises(BadInputError, match=r"with_code: transformers cannot") as caught:
        makes({"a": father}, None) if makes is TransformersEngine else makes(father)
    assert "needs code of its own, which Darwin does not run" in str(caught.value)
    assert not marker.exists()


def copy_of(source: Path, target: Path, **changes: object) -> Path:
    """A checkpoint's copy; `changes` go into its config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_a_head_stored_beside_its_embedding_gets_the_same_values(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    """Masks are drawn by tensor name: merged apart, the two would differ and be tied no more."""
    paths = []
    for number, source in enumerate(families["qwen3"]):
        path = copy_of(source, tmp_path / str(number))
        weights = load_file(path / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        paths.append(path)
    base, first, second = (open_checkpoint(str(path)) for path in paths)
    parents = {"a": first, "b": second}
    engine = TransformersEngine(parents, base, dtype="float32")
    rule = Rule(Selector(), "dare_ties", {"weight": 0.9, "density": 0.5})
    recipe = Recipe(engine.merger.references, (rule,), engine.merger.base_reference)
    engine.realize(recipe)
    write_child(Merger(parents, base), recipe, tmp_path / "child")
    child = load_file(tmp_path / "child" / "model.safetensors")
    assert torch.equal(child["lm_head.weight"], child["model.embed_tokens.weight"])
    assert not torch.equal(
        child["lm_head.weight"], load_file(paths[1] / "model.safetensors")["lm_head.weight"]
    )
    written = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "child", dtype=torch.float32
    )
    for name, weight in written.state_dict().items():
        assert torch.equal(weight, engine.model.state_dict()[name]), name


def test_greedy_is_greedy_whatever_the_father_is_configured_to(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    plain, second = families["llama"][1:]
    path = copy_of(plain, tmp_path / "penalized")
    settings = {"repetition_penalty": 5.0, "num_beams": 3, "do_sample": True, "eos_token_id": 2,
                "num_return_sequences": 2, "return_dict_in_generate": True}  # fmt: skip
    (path / "generation_config.json").write_text(json.dumps(settings))
    answers = []
    for father in (plain, path):
        parents = {"a": open_checkpoint(str(father)), "b": open_checkpoint(str(second))}
        answers.append(
            TransformersEngine(parents, None, dtype="float32").generate(["abc", "de"], Decoding(8))
        )
    assert answers[0] == answers[1]


def test_the_tokenizers_end_token_ends_an_answer_whatever_the_father_says(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    plain, second = families["llama"][1:]
    path = copy_of(plain, tmp_path / "elsewhere")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    parents = {"a": open_checkpoint(str(path)), "b": open_checkpoint(str(second))}
    engine = TransformersEngine(parents, None, dtype="float32")
    end = engine.tokenizer.eos_token_id
    assert end not in (5, 7)
    assert engine.model.generation_config.eos_token_id == sorted({end, 5, 7})
    with torch.no_grad():
        engine.model.lm_head.weight.zero_()
        bias = torch.zeros(len(engine.model.lm_head.weight)).index_fill_(0, torch.tensor(end), 1.0)
        engine.model.lm_head.bias = torch.nn.Parameter(bias)  # the likeliest token, always
    (answer,) = engine.generate(["abc"], Decoding(4))
    assert (answer.tokens, answer.truncated) == (1, False)


def test_a_stop_text_that_no_tokens_make_up_changes_nothing(
    families: dict[str, list[Path]],
) -> None:
    parents = {n: open_checkpoint(str(p)) for n, p in zip("ab", families["llama"][1:], strict=True)}
    engine = TransformersEngine(parents, None, dtype="float32")
    assert engine.generate(["abc"], Decoding(8, ("\n",))) == engine.generate(["abc"], Decoding(8))


def test_a_model_without_end_token_is_always_cut(families: dict[str, list[Path]]) -> None:
    parents = {n: open_checkpoint(str(p)) for n, p in zip("ab", families["llama"][1:], strict=True)}
    engine = TransformersEngine(parents, None, dtype="float32")
    engine.model.generation_config.eos_token_id = []
    assert all(g.truncated for g in engine.generate(["abc", "z"], Decoding(4)))


def test_an_end_token_of_number_zero_ends_an_answer(families: dict[str, list[Path]]) -> None:
    parents = {n: open_checkpoint(str(p)) for n, p in zip("ab", families["llama"][1:], strict=True)}
    engine = TransformersEngine(parents, None, dtype="float32")
    with torch.no_grad():
        engine.model.lm_head.weight.zero_()  # every logit is 0, so the likeliest token is number 0
    engine.model.generation_config.eos_token_id = [0]
    assert not any(g.truncated for g in engine.generate(["abc", "z"], Decoding(4)))
