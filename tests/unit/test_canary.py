"""A live engine that becomes another model than it was told to be is found out, and built anew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from orchestrator.config import OPERATIONAL_KEYS, engine_settings, load_config
from tests import fake_vllm, families
from tests.campaigns import write_campaign
from tests.checkpoint_files import described, recipe_for, rule, write_child
from tests.fake_vllm import Disorder
from tests.families import write_family, write_model
from tests.unit.test_transformers_engine import dare_ties_recipe
from workers.checkpoints import ArchitectureMap, open_checkpoint
from workers.errors import BadInputError, CanaryError
from workers.evaluation.engines import build_engine
from workers.evaluation.engines.canary import Canary
from workers.evaluation.engines.reload_check import check_reload, fixed_prompts
from workers.evaluation.engines.streamed_logprobs import ScoredChild
from workers.evaluation.engines.vllm_engine import VllmEngine
from workers.merging import ParentReference, Recipe, Rule, Selector
from workers.merging.executor import Merger

START = 5
"""Reloads of the check at the start; the canary's own comparison makes none."""

ONE_LAYER = "layers.1.self_attn.v_proj"
KINDS = ["qwen3", "llama", "mixtral", "qwen3_5_moe", "gemma4"]


@pytest.fixture
def fake() -> Iterator[None]:
    with fake_vllm.installed():
        yield


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.SMALL, "num_hidden_layers", 2)
        return write_family(tmp_path_factory.mktemp("llama"), "llama")


def opened(folders: list[Path]) -> tuple[dict[str, Any], Any]:
    base, first, second = (open_checkpoint(str(path)) for path in folders)
    return {"a": first, "b": second}, base


@torch.inference_mode()
def written_logprobs(folder: Path, prompts: list[list[int]], dtype: str) -> list[list[float]]:
    """By the definition: the whole model, from a file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    found = []
    for prompt in prompts:
        logprobs = model.eval()(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        found.append([float(row[token]) for row, token in zip(logprobs, prompt[1:], strict=False)])
    return found


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, "float32") for kind in KINDS), ("mixtral", "bfloat16"), ("gemma4", "bfloat16")],
)
def test_the_independent_value_is_the_written_childs(kind: str, dtype: str, tmp_path: Path) -> None:
    """With tied and untied heads, experts, and what is computed behind the head."""
    parents, base = opened(write_family(tmp_path, kind))
    merger = Merger(parents, base)
    child = ScoredChild(recipe_for(merger, rule("passthrough", source="a")), parents, base, dtype)
    prompts = fixed_prompts(40)
    for number, recipe in enumerate(
        [dare_ties_recipe(merger), recipe_for(merger, rule("passthrough", source="b"))]
    ):
        written = write_child(merger, recipe, tmp_path / str(number))
        child.become(recipe)
        assert child.logprobs(prompts) == written_logprobs(written, prompts, dtype)
        assert child.materialized == 0


def count_builds(engine: VllmEngine) -> int:
    disorder = engine.options["disorder"]
    assert isinstance(disorder, Disorder)
    return disorder.built


def make_engine(family: list[Path], disorder: Disorder | None, canary: int = 1) -> Any:
    parents, base = opened(family)
    options = {"disorder": disorder} if disorder else {}
    engine = build_engine(parents, base, "vllm", dtype="float32", options=options, canary=canary)
    return engine, Merger(parents, base)


def blend(merger: Merger, share: float) -> Recipe:
    return recipe_for(merger, rule("linear", weight={"a": share, "b": 1 - share}))


def test_a_wrong_weight_in_one_layer_is_found_and_the_engine_built_anew(
    family: list[Path], fake: None
) -> None:
    """The second candidate comes out wrong: it is realized again by another model."""
    engine, merger = make_engine(family, Disorder(ONE_LAYER, after=START + 1))
    right, _ = make_engine(family, None)
    for share, builds in ((0.3, 1), (0.6, 2), (0.9, 2)):
        for one in (engine, right):
            one.realize(blend(merger, share))
        assert count_builds(engine) == builds
        assert engine.loglikelihood([("abc", "de")]) == right.loglikelihood([("abc", "de")])


@pytest.mark.parametrize("part", ["layers.0.input_layernorm", "lm_head"])
def test_whatever_weight_it_is(part: str, family: list[Path], fake: None) -> None:
    engine, merger = make_engine(family, Disorder(part, after=START, scale=1.5))
    engine.realize(blend(merger, 0.5))
    assert count_builds(engine) == 2


def test_a_candidate_that_comes_out_wrong_twice_is_an_error(family: list[Path], fake: None) -> None:
    engine, merger = make_engine(family, Disorder(ONE_LAYER, after=START, builds=2))
    recipe = blend(merger, 0.5)
    with pytest.raises(CanaryError, match=rf"{recipe.id[:12]}.*another model.*built anew"):
        engine.realize(recipe)
    engine.realize(recipe)  # a third model is sound
    assert count_builds(engine) == 3


def test_a_model_that_cannot_be_built_again_is_no_fault_of_the_input(
    family: list[Path], fake: None
) -> None:
    engine, merger = make_engine(family, Disorder(ONE_LAYER, after=START))
    engine.options["nonsense"] = 1
    with pytest.raises(CanaryError, match=r"built anew: .*nonsense"):
        engine.realize(blend(merger, 0.5))


@pytest.mark.parametrize(("every", "found_at"), [(0, None), (3, 3)])
def test_every_so_many_candidates_are_checked(
    every: int, found_at: int | None, family: list[Path], fake: None
) -> None:
    """The first, and then each `every`-th: from the second candidate on all are wrong."""
    engine, merger = make_engine(family, Disorder(ONE_LAYER, after=START + 1), every)
    builds = []
    for number in range(5):
        engine.realize(blend(merger, number / 10))
        builds.append(count_builds(engine))
    assert builds == [2 if found_at is not None and n >= found_at else 1 for n in range(5)]


@dataclass
class Rounded:
    """An engine that computes the right model with errors of its own."""

    child: ScoredChild
    error: float
    dtype: str
    converts_weights: bool = True
    name: str = "it"
    builds: int = 0

    def load(self, recipe: Recipe) -> None:
        self.child.become(recipe)

    def token_logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        found = self.child.logprobs(prompts)
        return [[value + self.error * (-1) ** n for n, value in enumerate(row)] for row in found]

    def rebuild(self) -> None:
        self.builds += 1


def test_roundings_are_no_mismatch_and_more_is(tmp_path: Path) -> None:
    """In bfloat16 as much as the same model's own; a model of large weights, whose own are large."""
    folders = []
    for number in range(3):
        folder = write_model(tmp_path / str(number), "llama", number, spread=0.02 * number)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.lm_head.weight.data *= 20
        model.save_pretrained(folder)
        folders.append(folder)
    parents, base = opened(folders)
    prompts = fixed_prompts(40)
    one, two = (written_logprobs(folders[1], prompts, kind) for kind in ("float32", "bfloat16"))
    errors = torch.tensor(one) - torch.tensor(two)
    own = float(errors.square().mean().sqrt())
    assert own > 2e-3
    recipe = Recipe(tuple(ParentReference(n, p.fingerprint) for n, p in parents.items()), ())
    child = ScoredChild(recipe, parents, base, "bfloat16")
    Canary(parents, base, 1).start(Rounded(child, own, "bfloat16"))
    with pytest.raises(BadInputError, match="gives the father's tokens other log-probabilities"):
        Canary(parents, base, 1).start(Rounded(child, 50 * own, "bfloat16"))


def test_numbers_that_are_none_are_a_mismatch(family: list[Path]) -> None:
    parents, base = opened(family)
    recipe = Recipe(tuple(ParentReference(n, p.fingerprint) for n, p in parents.items()), ())
    child = ScoredChild(recipe, parents, base, "float32")
    with pytest.raises(BadInputError, match="inf nats apart"):
        Canary(parents, base, 1).start(Rounded(child, float("nan"), "float32"))


def test_a_candidate_without_numbers_is_not_the_father(family: list[Path]) -> None:
    """Beyond float16's range, but not float32's: what both differ by allows an engine nothing."""
    parents, base = opened(family)
    references = tuple(ParentReference(n, p.fingerprint) for n, p in parents.items())
    source = {"source": references[0].name, "scale": 1e6}
    recipe = Recipe(references, (Rule(Selector(), "passthrough", source),))
    child = ScoredChild(Recipe(references, ()), parents, base, "float16")
    sound = Rounded(child, 0.0, "float16")
    canary = Canary(parents, base, 1)
    canary.start(sound)
    canary.realize(sound, recipe)

    class Stuck(Rounded):
        def load(self, recipe: Recipe) -> None:
            super().load(Recipe(references, ()))

    with pytest.raises(CanaryError, match="inf nats from"):
        canary.realize(Stuck(child, 0.0, "float16"), recipe)


def test_a_campaign_says_how_often(tmp_path: Path) -> None:
    """As the documentation's example does; it may change when a campaign is resumed."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (text,) = re.findall(r"```yaml\n(engine:.*?)```", page, re.DOTALL)
    config = load_config(str(write_campaign(tmp_path, **yaml.safe_load(text))))
    settings = engine_settings(config.engine)
    assert settings["canary"] == 4 and settings["options"]["tensor_parallel_size"] == 8
    assert "engine.canary" in OPERATIONAL_KEYS
    with pytest.raises(BadInputError, match=r"engine\.canary: -1 must be 0 or more"):
        load_config(str(write_campaign(tmp_path)), ["engine.canary=-1"])


@pytest.mark.parametrize(
    "lacking", ["attn.Wqkv", "attn.out", "ffn.fc1", "mlp.experts.0.w4", "mixer.in_proj"]
)
def test_an_engine_is_not_accused_for_names_that_the_check_at_the_start_does_not_know(
    lacking: str,
) -> None:
    """It would leave weights in place that it wants to be zero."""
    known = ("self_attn.o_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.up_proj")
    layers = {0: known, 1: known[2:] if lacking.startswith("attn") else known[:2]}
    layers[1] = (*layers[1], lacking)
    names = [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in layers[layer]]
    shapes = dict.fromkeys(["model.embed_tokens.weight", *names], (4, 4))

    def never(*arguments: Any) -> Any:
        raise AssertionError("nothing is asked of the engine")

    father = ArchitectureMap(described(shapes, {}))
    with pytest.raises(BadInputError, match="other names than those by which it is checked"):
        check_reload(father, (ParentReference("a", "0"),), never, never, "vLLM")
