"""Recipes: one identity for one merge, strict reading, and which tensor gets which rule."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_files import (
    assert_same_bits,
    merge,
    open_merger,
    read_tensors,
    realize,
    recipe_for,
    rule,
    write_checkpoint,
)
from workers.checkpoints import LogicalTensor
from workers.checkpoints.layout import Form
from workers.errors import BadInputError
from workers.merging import (
    CARRIED,
    ParentReference,
    PostStep,
    Recipe,
    Rule,
    Selector,
    parse_selector,
    passthrough_recipe,
)

RECIPE = Recipe(
    parents=(ParentReference("father", "f" * 64), ParentReference("mother", "e" * 64)),
    rules=(
        Rule(
            Selector(components=("mlp", "expert"), layers=(0, 3)),
            "dare_ties",
            {"weight": {"mother": 0.25, "father": 0.75}, "density": 0.5, "lambda": 1.0},
        ),
        Rule(Selector(names=("lm_head.*", "é")), "passthrough", {"source": "mother"}),
        Rule(Selector(), "slerp", {"t": 0.1}),
    ),
    base=ParentReference("base", "b" * 64),
    seed=42,
)
CANONICAL = (
    '{"base":{"fingerprint":"' + "b" * 64 + '","name":"base"},"format":1,'
    '"parents":[{"fingerprint":"' + "f" * 64 + '","name":"father"},'
    '{"fingerprint":"' + "e" * 64 + '","name":"mother"}],'
    '"rules":[{"method":"dare_ties",'
    '"parameters":{"density":0.5,"lambda":1.0,"weight":{"father":0.75,"mother":0.25}},'
    '"where":{"components":["mlp","expert"],"layers":[0,3]}},'
    '{"method":"passthrough","parameters":{"source":"mother"},"where":{"names":["lm_head.*","é"]}},'
    '{"method":"slerp","parameters":{"t":0.1},"where":{}}],"seed":42}'
)
GOLDEN_ID = "779692646028f00da6b5a517fa6fdc1a30409078371878ba0f8cff42f2fa46c2"


def as_data() -> dict[str, Any]:
    """The example as JSON gives it back."""
    data: dict[str, Any] = json.loads(RECIPE.canonical_json)
    return data


def test_the_identity_never_changes() -> None:
    """Frozen: the ids of all recipes in ledgers and lineages depend on it."""
    assert RECIPE.canonical_json == CANONICAL
    assert RECIPE.id == hashlib.sha256(CANONICAL.encode()).hexdigest() == GOLDEN_ID


def reversed_tables(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_tables(value[key]) for key in reversed(value)}
    return [reversed_tables(part) for part in value] if isinstance(value, list) else value


def test_the_identity_does_not_depend_on_the_order_of_tables() -> None:
    data = reversed_tables(as_data())
    assert list(data) != list(as_data())
    assert Recipe.from_dict(data).canonical_json == CANONICAL


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("seed",), 43),
        (("base",), None),
        (("parents", 1, "name"), "other"),
        (("parents", 0, "fingerprint"), "0" * 64),
        (("rules", 0, "where", "layers", 1), 4),
        (("rules", 0, "parameters", "weight", "mother"), 0.25000001),
        (("rules", 2, "method"), "linear"),
    ],
)
def test_the_identity_depends_on_everything(path: tuple[Any, ...], value: Any) -> None:
    assert Recipe.from_dict(changed(path, value)).id != GOLDEN_ID


def test_what_is_written_is_read_back() -> None:
    for recipe in (
        RECIPE,
        Recipe(RECIPE.parents, ()),
        passthrough_recipe(RECIPE.parents, "mother"),
    ):
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        assert again == recipe
        assert again.to_dict() == recipe.to_dict()
        assert again.id == recipe.id
    assert RECIPE.father == ParentReference("father", "f" * 64)


MISSING = object()
ANYTHING_ELSE = (None, 1, 1.5, True, "text", [], [1], {}, {"a": 1}, float("nan"))


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The example with one place changed, or gone."""
    data = as_data()
    place: Any = data
    for step in path[:-1]:
        place = place[step]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


PLACES: dict[tuple[Any, ...], tuple[type, ...]] = {
    ("format",): (),
    ("seed",): (int,),
    ("parents",): (),
    ("parents", 0): (),
    ("parents", 0, "name"): (str,),
    ("parents", 0, "fingerprint"): (str,),
    ("base",): (type(None),),
    ("base", "name"): (str,),
    ("rules",): (list,),
    ("rules", 0): (),
    ("rules", 0, "method"): (str,),
    ("rules", 0, "parameters"): (dict,),
    ("rules", 0, "where"): (dict,),
    ("rules", 0, "where", "components"): (type(None),),
    ("rules", 0, "where", "components", 0): (),
    ("rules", 0, "where", "layers"): (type(None),),
    ("rules", 0, "where", "layers", 0): (int,),
    ("rules", 1, "where", "names"): (type(None),),
    ("rules", 1, "where", "names", 0): (str,),
}
"""Every place of a recipe, and which types can stand there. Of lists and tables only empty ones can,
but for the parameters, whose names only their method knows."""


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_a_malformed_recipe_is_refused(path: tuple[Any, ...]) -> None:
    may_be_left_out = ("where" in path and path[-1] != "where") or path[-1] == 0
    for value in ANYTHING_ELSE if may_be_left_out else (*ANYTHING_ELSE, MISSING):
        filled = isinstance(value, list | dict) and value and path[-1] != "parameters"
        if type(value) in PLACES[path] and not filled:
            Recipe.from_dict(changed(path, value))
        elif (path, value) != (("format",), 1):
            with pytest.raises(BadInputError):
                Recipe.from_dict(changed(path, value))


@pytest.mark.parametrize("data", ANYTHING_ELSE)
def test_what_is_no_recipe_is_refused(data: Any) -> None:
    with pytest.raises(BadInputError, match="recipe"):
        Recipe.from_dict(data)


@pytest.mark.parametrize(
    "path", [("sede",), ("rules", 0, "paramters"), ("rules", 0, "where", "layer"), ("base", "path")]
)
def test_an_unknown_key_is_refused_by_name(path: tuple[Any, ...]) -> None:
    with pytest.raises(BadInputError, match=path[-1]):
        Recipe.from_dict(changed(path, 1))


def test_another_format_is_refused() -> None:
    with pytest.raises(BadInputError, match="format 2 is not 1"):
        Recipe.from_dict(changed(("format",), 2))


def test_two_parents_of_one_name_are_refused() -> None:
    with pytest.raises(BadInputError, match="'mother'"):
        Recipe.from_dict(changed(("parents", 0, "name"), "mother"))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [], ["x"], [{}], None])
def test_parameters_are_numbers_names_or_numbers_per_parent(value: Any) -> None:
    for path in (("rules", 2, "parameters", "t"), ("rules", 0, "parameters", "weight", "father")):
        with pytest.raises(BadInputError, match=f"'{path[3]}'"):
            Recipe.from_dict(changed(path, value))


def test_a_slice_of_layers_is_in_the_order_of_the_parents() -> None:
    """Its first parent lends the layout, and canonical JSON sorts keys."""
    layers = [{"mother": [0, 1], "father": [1, 2]}]
    recipe = Recipe.from_dict(changed(("layers",), layers))
    assert list(recipe.layers[0]) == ["father", "mother"]
    again = Recipe.from_dict(json.loads(recipe.canonical_json))
    assert list(again.layers[0]) == ["father", "mother"]
    assert again.id == recipe.id


# Which tensors a rule is for


def tensor(name: str, component: str, layer: int | None) -> LogicalTensor:
    return LogicalTensor(name, component, layer, None, (1,), "BF16", name, 0)


UP = tensor("layers.3.mlp.up_proj.weight", "mlp", 3)
HEAD = tensor("lm_head.weight", "lm_head", None)


@pytest.mark.parametrize(
    ("where", "up", "head"),
    [
        ({}, True, True),
        ({"components": ["mlp"]}, True, False),
        ({"components": ["lm_head", "mlp"]}, True, True),
        ({"layers": [3, 3]}, True, False),
        ({"layers": [0, 99]}, True, False),
        ({"layers": [0, 2]}, False, False),
        ({"layers": [4, 9]}, False, False),
        ({"layers": [9, 0]}, False, False),
        ({"names": ["*"]}, True, True),
        ({"names": ["x", "lm_head.weight"]}, False, True),
        ({"names": ["layers.?.mlp.*"]}, True, False),
        ({"names": ["layers.[0-2].*"]}, False, False),
        ({"names": ["LM_HEAD.weight"]}, False, False),
        ({"names": ["lm_head"]}, False, False),
        ({"names": ["layers.*"], "components": ["norm"]}, False, False),
        ({"names": ["layers.*"], "components": ["mlp"], "layers": [3, 4]}, True, False),
    ],
)
def test_a_selector_restricts_by_all_that_it_says(
    where: dict[str, Any], up: bool, head: bool
) -> None:
    selector = parse_selector(where)
    assert (selector.matches(UP), selector.matches(HEAD)) == (up, head)


@pytest.mark.parametrize(
    ("where", "word"),
    [
        ({"component": ["mlp"]}, "component"),
        ({"components": ["mlps"]}, "'mlps'"),
        ({"components": "mlp"}, "components"),
        ({"components": 3}, "components"),
        ({"components": []}, "components"),  # would select more than leaving it out
        ({"names": []}, "names"),
        ({"layers": [1]}, "layers"),
        ({"layers": [1, 2, 3]}, "layers"),
        ({"layers": [0.0, 1]}, "layers"),
        ({"layers": 3}, "layers"),
        ({"layers": "12"}, "layers"),
        ({"names": "layers.*"}, "names"),  # letter by letter, its last one would match everything
        ({"names": [1]}, "names"),
        ([], "where"),
        ("mlp", "where"),
        (None, "where"),
    ],
)
def test_a_malformed_selector_is_refused_by_its_key(where: Any, word: str) -> None:
    with pytest.raises(BadInputError, match=word):
        parse_selector(where)


# Recipes over real checkpoints

CONFIG = {"model_type": "llama", "num_hidden_layers": 2}
NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight",
    "model.visual.proj.weight",
    "model.odd.weight",
    "mtp.fc.weight",
)


def write_parent(folder: Path, seed: int, *changes: tuple[str, torch.Tensor | None]) -> Path:
    """Every tensor `[4, 6]` of its own random values, but for `changes` (None: it is not there)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(4, 6, generator=generator).bfloat16() for name in NAMES}
    for name, changed_tensor in changes:
        del tensors[name]
        if changed_tensor is not None:
            tensors[name] = changed_tensor
    return write_checkpoint(folder, tensors, config=CONFIG)


@pytest.fixture
def parents(tmp_path: Path) -> dict[str, Path]:
    return {name: write_parent(tmp_path / name, number) for number, name in enumerate("abc")}


def test_the_first_rule_that_matches_wins(parents: dict[str, Path], tmp_path: Path) -> None:
    rules = (
        rule("passthrough", Selector(names=("layers.1.*up*",)), source="c"),
        rule("passthrough", Selector(components=("mlp", "norm")), source="b"),
        rule("passthrough", Selector(layers=(0, 1)), source="c"),
    )
    child = merge(tmp_path / "child", parents, rules)
    sources = {
        "model.embed_tokens.weight": "a",
        "model.layers.0.mlp.up_proj.weight": "b",
        "model.layers.1.mlp.up_proj.weight": "c",
        "model.layers.1.self_attn.q_proj.weight": "c",
        "model.norm.weight": "b",
        "model.visual.proj.weight": "a",
        "model.odd.weight": "a",
        "mtp.fc.weight": "a",
    }
    stored = {name: read_tensors(folder) for name, folder in parents.items()}
    assert_same_bits(child, {name: stored[source][name] for name, source in sources.items()})


def test_without_rules_the_child_is_the_father(parents: dict[str, Path], tmp_path: Path) -> None:
    assert_same_bits(merge(tmp_path / "child", parents, ()), read_tensors(parents["a"]))


def test_a_parent_in_the_layout_of_the_father(parents: dict[str, Path], tmp_path: Path) -> None:
    """All of the mother's, but for what only stands in a role that is carried."""
    merger = open_merger(parents)
    child = merge(tmp_path / "child", parents, passthrough_recipe(merger.references, "b").rules)
    father, mother = read_tensors(parents["a"]), read_tensors(parents["b"])
    carried = {"model.visual.proj.weight", "model.odd.weight", "mtp.fc.weight"}
    assert_same_bits(child, {name: (father if name in carried else mother)[name] for name in NAMES})
    assert set(CARRIED) == {"vision", "mtp", "unknown"}


def run_once(parents: dict[str, Path], *rules: Rule) -> None:
    merger = open_merger(parents)
    realize(merger, recipe_for(merger, *rules))


def refuse(parents: dict[str, Path], *words: str, rules: tuple[Rule, ...]) -> None:
    with pytest.raises(BadInputError) as caught:
        run_once(parents, *rules)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "where", [{"components": ["router"]}, {"layers": [2, 3]}, {"names": ["model.norm.bias"]}]
)
def test_a_rule_that_matches_nothing_is_refused(
    parents: dict[str, Path], where: dict[str, Any]
) -> None:
    rules = (rule("linear", weight=1.0), rule("linear", parse_selector(where), weight=1.0))
    word = next(iter(where.values()))[0]
    refuse(parents, "matches no tensor", str(parents["a"]), str(word), rules=rules)


def test_a_rule_behind_one_for_all_of_its_tensors_is_told_of(parents: dict[str, Path]) -> None:
    merger = open_merger(parents)
    general, special = rule("linear", weight=1.0), rule("linear", Selector(("mlp",)), weight=0.5)
    (warning,) = (
        w for w in merger.plan.warnings(recipe_for(merger, general, special)) if "never used" in w
    )
    assert "where: {components: [mlp]} (linear) is never used" in warning
    good = merger.plan.warnings(recipe_for(merger, special, general))
    assert not [warning for warning in good if "never used" in warning]


@pytest.mark.parametrize(
    ("where", "key"),
    [
        ({"names": ["*mpl*"]}, "names"),
        ({"components": ["router"]}, "components"),
        ({"layers": [2, 3], "names": ["*mlp*"]}, "layers"),
        ({"experts": [0, 0]}, "experts"),
    ],
)
@pytest.mark.parametrize("is_table", [False, True])
def test_a_case_that_matches_nothing_is_refused(
    parents: dict[str, Path], where: dict[str, Any], key: str, is_table: bool
) -> None:
    """What it is for would silently take another case's value."""
    cases: Any = [{"where": where, "value": 0.25}, {"value": 0.5}]
    weight = {"a": 1.0, "b": cases, "c": 1.0} if is_table else cases
    words = ("components: [mlp]", "method linear", "'weight'", key, str(parents["a"]))
    mlp = Selector(components=("mlp",))
    refuse(parents, *words, rules=(rule("linear", mlp, weight=weight),))
    refuse(parents, *words, rules=(rule("linear", weight=1.0), rule("linear", mlp, weight=weight)))


def test_a_case_of_a_step_afterwards_that_matches_nothing_is_refused(
    parents: dict[str, Path],
) -> None:
    post = PostStep("svc", {"alpha": [{"where": {"names": ["*mpl*"]}, "value": 0.5}, {"value": 1}]})
    merger = open_merger({"a": parents["a"], "b": parents["b"]}, parents["c"])
    way = Rule(Selector(components=("mlp",)), "task_arithmetic", {"weight": 1.0}, post)
    with pytest.raises(BadInputError, match=r"method svc: parameter 'alpha'.*names.*\*mpl\*"):
        realize(merger, recipe_for(merger, way))


def test_a_case_may_match_no_tensor_of_its_rule(parents: dict[str, Path]) -> None:
    """The same cases may stand in several rules, and the layers of each in one that is for few layers."""
    cases = [
        {"where": {"names": ["*q_proj*"], "layers": [0, 0]}, "value": 0.25},
        {"where": {"names": ["model.odd.*"]}, "value": 0.25},
        {"value": 1.0},
    ]
    run_once(parents, rule("linear", Selector(components=("mlp",)), weight=cases))


def test_an_unknown_method_is_refused(parents: dict[str, Path]) -> None:
    refuse(parents, "'lerp'", "linear", rules=(rule("lerp"),))


def test_a_recipe_for_other_parents_is_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    """Told by content: it does not matter where they lie, but it does matter what they are."""
    merger = open_merger(parents)
    recipe = recipe_for(merger, rule("linear", weight=1.0))
    other = open_merger(parents | {"b": write_parent(tmp_path / "other", 9)})
    swapped = open_merger({"b": parents["b"], "a": parents["a"], "c": parents["c"]})
    renamed = open_merger({"x": parents["a"], "b": parents["b"], "c": parents["c"]})
    fewer = open_merger({"a": parents["a"], "b": parents["b"]})
    for wrong in (other, swapped, renamed, fewer):
        with pytest.raises(BadInputError, match=recipe.id[:12]):
            realize(wrong, recipe)
    moved = open_merger(parents | {"b": parents["b"].rename(tmp_path / "moved")})
    realize(moved, recipe)


def test_a_recipe_for_another_base_is_refused(parents: dict[str, Path]) -> None:
    two = {"a": parents["a"], "b": parents["b"]}
    merger = open_merger(two, base=parents["c"])
    recipe = recipe_for(merger, rule("task_arithmetic", weight=1.0))
    for wrong in (open_merger(two), open_merger(two, base=parents["a"])):
        with pytest.raises(BadInputError, match=recipe.id[:12]):
            realize(wrong, recipe)
    without = Recipe(merger.references, (rule("linear", weight=1.0),))
    realize(merger, without)  # a base that a recipe does not use may be open


def test_a_tensor_that_a_parent_lacks_is_named(parents: dict[str, Path], tmp_path: Path) -> None:
    missing = "model.layers.1.mlp.up_proj.weight"
    lacking = write_parent(tmp_path / "lacking", 1, (missing, None))
    words = (missing.removeprefix("model."), str(lacking), "b (")
    refuse(parents | {"b": lacking}, *words, rules=(rule("linear", weight=1.0),))
    refuse(parents | {"b": lacking}, *words, rules=(rule("passthrough", source="b"),))
    elsewhere = (
        rule("linear", Selector(components=("norm",)), weight=1.0),
        rule("passthrough", source="c"),
    )
    with_rest = merge(tmp_path / "child", parents | {"b": lacking}, elsewhere)
    assert_same_bits({missing: with_rest[missing]}, {missing: read_tensors(parents["c"])[missing]})


@pytest.mark.parametrize(
    "name", ["model.decoder.layers.0.mlp.up_proj.weight", "model.layers.0.odd.weight"]
)
def test_a_father_whose_layers_are_not_recognised_is_refused(tmp_path: Path, name: str) -> None:
    """All but the head would be his, and nothing would say so."""
    parents = {
        parent: write_checkpoint(
            tmp_path / parent,
            {name: torch.full((4, 6), value), "lm_head.weight": torch.full((4, 6), -value)},
            config=CONFIG,
        )
        for parent, value in (("a", 1.0), ("b", 2.0))
    }
    known = rule("linear", Selector(components=("lm_head",)), weight=1.0)
    words = (str(parents["a"]), repr(name), "names", "layers")
    refuse(parents, *words, rules=(known,))
    assert_same_bits(merge(tmp_path / "copy", parents, ()), read_tensors(parents["a"]))
    by_name = rule("passthrough", Selector(names=("*.0.*",)), source="b")
    child = merge(tmp_path / "child", parents, (known, by_name))
    assert_same_bits({name: child[name]}, {name: read_tensors(parents["b"])[name]})


LINEAR = rule("linear", weight=1.0)
MORE = torch.ones(4, 6, dtype=torch.bfloat16)


def with_more(folder: Path, *names: str, layers: int = 2) -> Path:
    """A parent that has more tensors, and says that it has so many layers."""
    own = write_parent(folder, 1)
    tensors = read_tensors(own) | {f"model.{name}": MORE for name in names}
    return write_checkpoint(folder / "more", tensors, config=CONFIG | {"num_hidden_layers": layers})


def test_a_parent_with_more_layers_is_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    """Its lower layers alone are another model."""
    deeper = with_more(tmp_path / "deeper", "layers.2.mlp.up_proj.weight", layers=3)
    words = (f"b ({deeper})", "3 layers", "2", "model.layers.2.mlp.up_proj.weight", "`layers`")
    refuse(parents | {"b": deeper}, *words, rules=(LINEAR,))
    refuse(parents | {"b": deeper}, *words, rules=(rule("passthrough", source="b"),))
    embeddings = rule("linear", Selector(components=("embedding",)), weight=1.0)
    run_once(parents | {"b": deeper}, embeddings, rule("passthrough", source="a"))
    merger = open_merger(parents, base=deeper)
    realize(merger, recipe_for(merger, LINEAR))
    with pytest.raises(BadInputError, match=r"base \(.*3 layers"):
        realize(merger, recipe_for(merger, rule("task_arithmetic", weight=1.0)))


def test_layers_of_a_parent_with_more_of_them_can_be_named(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    deeper = with_more(tmp_path / "deeper", "layers.2.mlp.up_proj.weight", layers=3)
    part = {"a": (0, 1), "b": (0, 1)}
    merger = open_merger({"a": parents["a"], "b": deeper}, form=Form(layers=(part,)))
    realize(merger, Recipe(merger.references, (LINEAR,), layers=(part,)))


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("layers.1.self_attn.q_proj.bias", "attention"),
        ("layers.1.self_attn.q_norm.weight", "attention"),
        ("layers.1.mlp.up_proj.bias", "mlp"),
        ("layers.1.pre_feedforward_layernorm.weight", "mlp"),
    ],
)
def test_a_parent_with_tensors_that_its_weights_need_is_refused(
    parents: dict[str, Path], tmp_path: Path, name: str, component: str
) -> None:
    needing = with_more(tmp_path / "needing", name)
    words = (f"b ({needing})", "1 tensor", f"'model.{name}'", "father", "passthrough")
    refuse(parents | {"b": needing}, *words, rules=(LINEAR,))
    own = Selector(components=(component,), layers=(1, 1))
    refuse(parents | {"b": needing}, *words, rules=(rule("passthrough", own, source="b"),))
    run_once(parents | {"b": needing}, rule("passthrough", own, source="a"))
    merger = open_merger(parents, base=needing)
    with pytest.raises(BadInputError, match=r"base \(.* 1 tensor"):
        realize(merger, recipe_for(merger, rule("task_arithmetic", own, weight=1.0)))


@pytest.mark.parametrize("component", ["attention", "mlp"])
def test_what_is_left_out_matters_to_its_own_block_alone(
    parents: dict[str, Path], tmp_path: Path, component: str
) -> None:
    other = {"attention": "mlp", "mlp": "attention"}[component]
    name = {"attention": "self_attn.q_proj", "mlp": "mlp.up_proj"}[component]
    needing = with_more(tmp_path / "needing", f"layers.1.{name}.bias")
    run_once(parents | {"b": needing}, rule("linear", Selector(components=(other,)), weight=1.0))


@pytest.mark.parametrize(
    "name",
    [
        "visual.blocks.1.weight",
        "layers.2.mlp.up_proj.weight",  # behind the last layer: for multi-token prediction
        "layers.1.self_attn.rotary_emb.inv_freq",
        "layers.1.odd.weight",
        "layers.1.mlp.experts.7.up_proj.weight",
        "layers.1.mlp.gate.weight",
    ],
)
def test_what_the_child_can_do_without_may_be_left_out(
    parents: dict[str, Path], tmp_path: Path, name: str
) -> None:
    run_once(parents | {"b": with_more(tmp_path / "more", name)}, LINEAR)


def test_a_tensor_that_the_base_lacks_is_named(parents: dict[str, Path], tmp_path: Path) -> None:
    lacking = write_parent(tmp_path / "lacking", 1, ("model.norm.weight", None))
    merger = open_merger(parents, lacking)
    with pytest.raises(
        BadInputError, match=rf"base \({lacking}\).*'norm\.weight'.*task_arithmetic"
    ):
        realize(merger, recipe_for(merger, rule("task_arithmetic", weight=1.0)))
    realize(merger, recipe_for(merger, rule("linear", weight=1.0)))


def test_no_parent_is_called_base() -> None:
    """It is what the base is called in slices of layers and in messages."""
    with pytest.raises(BadInputError, match="no parent may be called base"):
        Recipe.from_dict(changed(("parents", 0, "name"), "base"))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6, 1), (24,), (5, 6)])
def test_shapes_that_differ_are_refused(
    parents: dict[str, Path], tmp_path: Path, shape: tuple[int, ...]
) -> None:
    other = write_parent(tmp_path / "other", 1, ("model.norm.weight", torch.ones(shape)))
    words = ("'norm.weight'", "[4, 6]", str(list(shape)), str(parents["a"]), str(other))
    refuse(parents | {"c": other}, *words, rules=())
    with pytest.raises(BadInputError, match=r"'norm\.weight'"):
        open_merger(parents, base=other)


QUANTIZED = (torch.float8_e4m3fn, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("who", ["a", "b"])
def test_codes_are_never_averaged(
    parents: dict[str, Path], tmp_path: Path, dtype: torch.dtype, who: str
) -> None:
    """Quantized weights and whole numbers are codes; their mean is no weight."""
    name = "model.norm.weight"
    quantized = write_parent(tmp_path / "quantized", 1, (name, torch.ones(4, 6).to(dtype)))
    words = (str(quantized), f"'{name}'", "linear", "dequantize")
    refuse(parents | {who: quantized}, *words, rules=(rule("linear", weight=1.0),))


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_codes_of_the_base_are_never_subtracted(
    parents: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    quantized = write_parent(tmp_path / "q", 1, ("model.norm.weight", torch.ones(4, 6).to(dtype)))
    merger = open_merger(parents, quantized)
    with pytest.raises(BadInputError, match=rf"{quantized}.*'model\.norm\.weight'"):
        realize(merger, recipe_for(merger, rule("task_arithmetic", weight=1.0)))


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_codes_are_carried_bit_by_bit(
    parents: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    name = "model.norm.weight"
    values = torch.arange(24).reshape(4, 6).to(dtype)
    father = write_parent(tmp_path / "father", 1, (name, values))
    mother = write_parent(tmp_path / "mother", 2, (name, values.flip(0)))
    both = {"a": father, "b": mother}
    everything = (rule("passthrough", source="b"),)
    assert_same_bits(merge(tmp_path / "one", both, ()), read_tensors(father))
    assert_same_bits(merge(tmp_path / "two", both, everything), read_tensors(mother))


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_weights_are_not_turned_into_codes_nor_back(
    parents: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    """A plain cast would lose the scales: the father's dtype is not the mother's, and one of them is
    of codes."""
    quantized = write_parent(tmp_path / "q", 1, ("model.norm.weight", torch.ones(4, 6).to(dtype)))
    everything = (rule("passthrough", source="b"),)
    words = (str(quantized), "'model.norm.weight'", "passthrough")
    refuse({"a": parents["a"], "b": quantized}, *words, rules=everything)
    refuse({"a": quantized, "b": parents["b"]}, *words, rules=everything)
