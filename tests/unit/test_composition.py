"""A recipe over children that were never written makes what the written children would have made."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.composition import Composer, compose
from orchestrator.tensor_rules import cover
from tests.checkpoint_files import (
    described,
    open_merger,
    realize,
    recipe_for,
    rule,
    write_checkpoint,
    write_child,
)
from workers.checkpoints import ArchitectureMap
from workers.errors import BadInputError
from workers.merging import METHODS, ParentReference, PostStep, Recipe, Rule, Selector
from workers.merging.executor import Merger
from workers.merging.plan import Plan

LAYERS, EXPERTS = 3, 4


def shapes_of(kind: str) -> dict[str, tuple[int, ...]]:
    """Tensors of a small model: dense, with a tied head, with experts one by one, or fused."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (7, 4),
        "model.norm.weight": (4,),
    }
    if kind != "tied":
        shapes["lm_head.weight"] = (7, 4)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (4,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (4, 4)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (4, 4)
        if kind == "fused":
            shapes[f"{prefix}.mlp.gate.weight"] = (EXPERTS, 4)
            shapes[f"{prefix}.mlp.experts.gate_up_proj"] = (EXPERTS, 6, 4)
            shapes[f"{prefix}.mlp.experts.down_proj"] = (EXPERTS, 4, 3)
        elif kind == "experts":
            shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (EXPERTS, 4)
            for expert in range(EXPERTS):
                for part, shape in (("w1", (3, 4)), ("w2", (4, 3)), ("w3", (3, 4))):
                    shapes[f"{prefix}.block_sparse_moe.experts.{expert}.{part}.weight"] = shape
        else:
            shapes[f"{prefix}.mlp.up_proj.weight"] = (6, 4)
            shapes[f"{prefix}.mlp.down_proj.weight"] = (4, 6)
    return shapes


CONFIGS = {
    "dense": {"model_type": "llama", "num_hidden_layers": LAYERS},
    "tied": {"model_type": "qwen3", "num_hidden_layers": LAYERS, "tie_word_embeddings": True},
    "experts": {"model_type": "mixtral", "num_hidden_layers": LAYERS, "num_local_experts": EXPERTS},
    "fused": {"model_type": "qwen3_5_moe", "num_hidden_layers": LAYERS, "num_experts": EXPERTS},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Kind -> father, mother, donor and base in fp32; the mother lacks a vision tower that the father has."""
    root = tmp_path_factory.mktemp("families")
    found: dict[str, dict[str, Path]] = {}
    for kind, config in CONFIGS.items():
        found[kind] = {}
        for seed, name in enumerate(("father", "mother", "donor", "base")):
            generator = torch.Generator().manual_seed(seed)
            tensors = {
                stored: torch.randn(shape, generator=generator)
                for stored, shape in shapes_of(kind).items()
            }
            if name != "mother":
                tensors["visual.proj.weight"] = torch.randn(5, generator=generator)
            found[kind][name] = write_checkpoint(root / kind / name, tensors, config=config)
    return found


# -- random recipes --------------------------------------------------------------------------------


def random_selector(chance: random.Random, plan: Plan) -> Selector:
    """A selector that matches something, by component, layers, experts or names."""
    components = sorted({t.component for t in plan.child.tensors} - {"vision"})
    while True:
        chosen = tuple(chance.sample(components, chance.randint(1, 3)))
        first, last = sorted(chance.choices(range(LAYERS), k=2))
        where = Selector(
            chosen,
            (first, last) if chance.random() < 0.4 else None,
            (1, 2) if chance.random() < 0.2 else None,
            ("*q_proj*", "*down*", "*.norm.*") if chance.random() < 0.2 else (),
        )
        if any(where.matches(tensor) for tensor in plan.child.tensors):
            return where


def random_number(chance: random.Random) -> Any:
    """A number, or a gradient over the layers."""
    if chance.random() < 0.3:
        return [round(chance.uniform(0.1, 1.0), 3) for _ in range(chance.randint(2, 3))]
    return round(chance.uniform(0.1, 1.0), 3)


def random_rule(chance: random.Random, where: Selector, parents: list[str], based: bool) -> Rule:
    """A rule of a method that composes; with a base, one whose factors sum to 1."""
    seen = tuple(chance.sample(parents, 2)) if chance.random() < 0.3 else ()
    weight = {name: random_number(chance) for name in seen or parents}
    method = chance.choice(["linear", "passthrough", *["task_arithmetic"] * based])
    parameters: dict[str, Any] = {"weight": weight}
    if method == "passthrough":
        scale = 1.0 if based else chance.choice([1.0, 0.5, -2.0])
        parameters = {"source": chance.choice(list(seen or parents)), "scale": scale}
    elif method == "linear":
        parameters["normalize"] = 1.0 if based else chance.choice([0.0, 1.0])
    else:
        parameters |= {"lambda": random_number(chance), "normalize": chance.choice([0.0, 1.0])}
        if chance.random() < 0.2:
            parameters["weight"] = dict.fromkeys(weight, 0.0)  # the base alone
    return Rule(where, method, parameters, parents=seen)


def random_recipe(chance: random.Random, merger: Merger, based: bool) -> Recipe:
    rules = [
        random_rule(
            chance, random_selector(chance, merger.plan), [r.name for r in merger.references], based
        )
        for _ in range(chance.randint(0, 4))
    ]
    return Recipe(merger.references, tuple(rules), merger.base_reference if based else None)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(list(CONFIGS)), based=st.booleans())
def test_composed_recipes_make_what_written_children_make(
    families: dict[str, dict[str, Path]], seed: int, kind: str, based: bool
) -> None:
    chance = random.Random(seed)
    folders = families[kind]
    originals = {name: folders[name] for name in ("father", "mother", "donor")}
    base = folders["base"] if based else None
    merger = open_merger(originals, base)
    with TemporaryDirectory() as folder:
        recipes = {name: random_recipe(chance, merger, based) for name in ("one", "two", "three")}
        written = {
            name: write_child(merger, recipe, Path(folder) / name)
            for name, recipe in recipes.items()
        }
        over = open_merger(written, base)
        recipe = random_recipe(chance, over, based)
        composed = compose(recipe, recipes, merger.plan)
        expected, found = realize(over, recipe), realize(merger, composed)
    assert composed.parents == merger.references
    assert Recipe.from_dict(composed.to_dict()).id == composed.id
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # Sums of a few products of numbers of about 1, rounded to fp32 each.
        torch.testing.assert_close(found[name], values, rtol=2e-6, atol=2e-5, msg=name)


def test_one_rounding_instead_of_two(tmp_path: Path) -> None:
    """In bf16 the composed child is the sum in float64, rounded, but where fp32 falls on the other side of
    a tie; the child of written children is not, of many elements."""
    generator = torch.Generator().manual_seed(5)
    folders, values = {}, {}
    for name in ("father", "mother"):
        values[name] = torch.randn(64, 64, generator=generator).bfloat16()
        tensors = {"model.layers.0.mlp.up_proj.weight": values[name]}
        folders[name] = write_checkpoint(tmp_path / name, tensors)
    merger = open_merger(folders)
    shares = {"one": 0.3, "two": 0.8}
    recipes = {
        child: recipe_for(merger, rule("linear", weight={"father": share, "mother": 1 - share}))
        for child, share in shares.items()
    }
    over = open_merger(
        {child: write_child(merger, made, tmp_path / child) for child, made in recipes.items()}
    )
    recipe = recipe_for(over, rule("linear", weight={"one": 0.37, "two": 0.63}))
    composed = realize(merger, compose(recipe, recipes, merger.plan))
    father = 0.37 * 0.3 + 0.63 * 0.8
    truth = father * values["father"].double() + (1 - father) * values["mother"].double()
    nearest = truth.float().bfloat16().view(-1)  # float64 to bf16 by way of fp32, as in a merge
    (once,), (twice,) = composed.values(), realize(over, recipe).values()
    assert (once != nearest).float().mean() < 0.005
    assert (twice != nearest).float().mean() > 0.1


def test_parents_that_give_nothing_are_not_asked_for(families: dict[str, dict[str, Path]]) -> None:
    """The mother has no vision tower; both children have the father's, so has the composed child."""
    folders = families["dense"]
    merger = open_merger({name: folders[name] for name in ("father", "mother")})
    mlp = Selector(components=("mlp",))
    recipes = {
        "one": recipe_for(merger, rule("passthrough", mlp, source="mother")),
        "two": recipe_for(merger, rule("linear", mlp, weight={"father": 1.0, "mother": 3.0})),
    }
    references = tuple(ParentReference(name, recipe.id) for name, recipe in recipes.items())
    everything = rule("linear", weight={"one": 1.0, "two": 1.0})
    composed = compose(Recipe(references, (everything,)), recipes, merger.plan)
    made = {
        component: (rule.method, rule.parameters)
        for rule in composed.rules
        for component in rule.where.components
    }
    weight = {"father": 0.125, "mother": 0.875}
    assert made.pop("mlp") == ("linear", {"weight": weight, "normalize": 0.0})
    assert made.keys() == {"embedding", "attention", "norm", "lm_head", "vision"}
    assert all(way == ("passthrough", {"source": "father", "scale": 1.0}) for way in made.values())
    found = realize(merger, composed)
    assert {name for name in found if "visual" in name}


COMPOSING = {"linear", "passthrough", "task_arithmetic"}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_that_do_not_compose_are_refused_by_name(
    families: dict[str, dict[str, Path]], name: str
) -> None:
    method = METHODS[name]
    assert (method.coefficients is not None) == (name in COMPOSING)
    if name in COMPOSING:
        return
    from tests.checkpoint_files import example_parameters

    folders = families["dense"]
    names = ["father", "mother", "donor"][: method.parents[1] or 3]
    merger = open_merger({n: folders[n] for n in names}, folders["base"])
    where = Selector(components=("mlp",))
    if method.post:
        step = PostStep(name, example_parameters(method, names))
        made = Rule(where, "task_arithmetic", {"weight": 0.5}, step)
    else:
        made = Rule(where, name, example_parameters(method, names))
    child = Recipe(merger.references, (made,), merger.base_reference)
    plain = Recipe(merger.references, (), merger.base_reference)
    references = (ParentReference("one", "1"), ParentReference("two", "2"))
    with pytest.raises(BadInputError, match=f"one: {name} does not compose.*task_arithmetic"):
        compose(Recipe(references, ()), {"one": child, "two": plain}, merger.plan)


def test_what_cannot_be_composed_says_why(families: dict[str, dict[str, Path]]) -> None:
    folders = families["dense"]
    merger = open_merger({n: folders[n] for n in ("father", "mother")}, folders["base"])
    mlp = Selector(components=("mlp",))
    plain = Recipe(merger.references, (rule("linear", mlp, weight=1.0),), merger.base_reference)
    tasks = Recipe(
        merger.references, (rule("task_arithmetic", mlp, weight=0.3),), merger.base_reference
    )
    over = (ParentReference("one", "1"), ParentReference("two", "2"))

    def refused(recipe: Recipe, children: dict[str, Recipe], words: str) -> None:
        with pytest.raises(BadInputError, match=words):
            compose(recipe, children, merger.plan)

    twice = Recipe(over, (rule("linear", mlp, weight=1.0, normalize=0.0),), None)
    refused(twice, {"one": tasks, "two": tasks}, "do not sum to 1.*normalize")
    compose(twice, {"one": plain, "two": plain}, merger.plan)  # without a base nothing must
    other = Recipe(merger.references[::-1], ())
    refused(twice, {"one": plain, "two": other}, "two: is not of the same parents")
    stacked = Recipe(merger.references, (), layers=({"father": (0, 0)},))
    refused(twice, {"one": plain, "two": stacked}, "two: changes its father's form")
    elsewhere = Recipe(over, twice.rules, ParentReference("base", "another"))
    refused(elsewhere, {"one": tasks, "two": tasks}, "different bases")


def test_three_rounds_are_as_one(families: dict[str, dict[str, Path]]) -> None:
    """Children of composed children compose again; here with the numbers by hand."""
    folders = families["dense"]
    merger = open_merger({n: folders[n] for n in ("father", "mother")})
    mlp = Selector(components=("mlp",))

    def mixed(share: float, *names: str) -> Rule:
        return rule("linear", mlp, weight=dict(zip(names, (share, 1 - share), strict=True)))

    grand = {name: recipe_for(merger, mixed(share, "father", "mother"))
             for name, share in (("a", 0.5), ("b", 0.25))}  # fmt: skip

    def over(rule: Rule, children: dict[str, Recipe]) -> Recipe:
        references = tuple(ParentReference(name, child.id) for name, child in children.items())
        return Composer(children, merger.plan).compose(Recipe(references, (rule,)))

    second = {"c": over(mixed(0.5, "a", "b"), grand), "d": grand["b"]}
    last = over(mixed(0.25, "c", "d"), second)
    weights = [r.parameters["weight"] for r in last.rules if r.where.components == ("mlp",)]
    assert weights == [{"father": 0.25 * 0.375 + 0.75 * 0.25, "mother": 0.71875}]


# -- the rules -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(list(CONFIGS)))
def test_each_tensor_meets_its_own_way_first(seed: int, kind: str) -> None:
    chance = random.Random(seed)
    tensors = ArchitectureMap(described(shapes_of(kind), CONFIGS[kind])).tensors
    keys: list[Any] = [lambda t: t.component, lambda t: (t.component, t.layer), lambda t: t.expert,
                       lambda t: t.layer, lambda t: t.name, lambda t: None]  # fmt: skip
    key, ways = chance.choice(keys), chance.randint(1, 4)
    drawn = {key(tensor): chance.randrange(ways) for tensor in tensors}
    rules = cover(tensors, lambda tensor: drawn[key(tensor)])
    for tensor in tensors:
        first = next(way for where, way in rules if where.matches(tensor))
        assert first == drawn[key(tensor)], tensor.name


def test_many_experts_take_few_rules() -> None:
    shapes = {f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": (2, 2)
              for layer in range(48) for expert in range(64) for part in ("gate", "up", "down")}  # fmt: skip
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "num_experts": 64}
    tensors = ArchitectureMap(described(shapes, config)).tensors
    assert len(cover(tensors, lambda tensor: 0)) == 1
    assert len(cover(tensors, lambda tensor: (tensor.layer or 0) // 12)) == 4
    assert len(cover(tensors, lambda tensor: (tensor.expert or 0) < 8)) == 2
