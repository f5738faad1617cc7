"""The order of a parent's experts in a recipe, and routers merged as their experts are."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml

from orchestrator.descent.attribution import attribute_checkpoint
from orchestrator.recipe_file import load_recipe_file
from orchestrator.single_merge import merge_recipe
from orchestrator.verification import verify_child
from tests.checkpoint_files import (
    assert_same_bits,
    example_parameters,
    open_merger,
    open_remote,
    read_tensors,
    realize,
    recipe_for,
    rule,
    to_float64,
    write_child,
)
from tests.expert_parents import (
    EXPERTS,
    HIDDEN,
    Tensors,
    inverse,
    random_experts,
    reordered,
    unfused,
    write_experts,
)
from tests.references import REFERENCES
from workers.checkpoints import ArchitectureMap, open_checkpoint
from workers.checkpoints.names import canonical_name
from workers.diagnostics.attribution import attribute, cut_chunks, measure_chunk
from workers.errors import BadInputError
from workers.experts.plain_routers import plain_routers
from workers.merging import METHODS, Recipe, Rule, Selector
from workers.merging import expert_rows as expert_rows_module
from workers.merging.executor import Merger
from workers.merging.sources import Source

ORDERS = {0: (3, 0, 5, 1, 4, 2), 1: (1, 2, 0, 3, 5, 4)}
"""Where the donor's experts were moved: its expert e is what was expert ORDERS[layer][e]."""
WANTED = {layer: inverse(order) for layer, order in ORDERS.items()}
"""What brings them back."""
GATE, BIAS = "layers.{}.mlp.gate.weight", "layers.{}.mlp.gate.e_score_correction_bias"

BIASES_BESIDE_ROUTERS = [
    ("block_sparse_moe.e_score_correction_bias", (EXPERTS,)),  # MiniMax-M2
    ("mlp.moe_statics.e_score_correction_bias", (1, EXPERTS)),  # Ernie 4.5
    ("feed_forward.expert_bias", (EXPERTS,)),  # LFM2
]


def with_bias_beside(tensors: Tensors, name: str, shape: tuple[int, ...]) -> Tensors:
    """The same model with one more tensor in each layer, instead of the biases in its routers."""
    generator = torch.Generator().manual_seed(int(tensors[f"model.{GATE.format(0)}"].sum() * 100))
    plain = {key: tensor for key, tensor in tensors.items() if not key.endswith("correction_bias")}
    return plain | {
        f"model.layers.{layer}.{name}": torch.randn(shape, generator=generator) for layer in ORDERS
    }


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A father `a`, donors `b` and `c`, their `base`; `moved_b` and `moved_base` in other orders, fused
    and not."""
    root = tmp_path_factory.mktemp("experts")
    base = random_experts(0)
    found = {"base": base}
    found |= {name: random_experts(seed, base, 0.1) for seed, name in enumerate("abc", 1)}
    found["moved_b"] = reordered(found["b"], ORDERS)
    found["unfused_b"] = unfused(found["moved_b"])
    found["moved_base"] = reordered(base, ORDERS)
    return {name: write_experts(root / name, tensors) for name, tensors in found.items()}


def ordered(merger: Merger, rules: tuple[Rule, ...], *names: str, seed: int = 3) -> Recipe:
    return replace(recipe_for(merger, *rules, seed=seed), experts=dict.fromkeys(names, WANTED))


@pytest.mark.parametrize("donor", ["moved_b", "unfused_b"])
@pytest.mark.parametrize("name", sorted(n for n, method in METHODS.items() if not method.post))
def test_matched_experts_are_merged_as_if_they_had_never_moved(
    name: str, donor: str, parents: dict[str, Path]
) -> None:
    """Bit by bit, with every method: its statistics and masks too know nothing of the donor's numbers."""
    method = METHODS[name]
    base = method.uses_base != "never"
    straight = open_merger(
        {"a": parents["a"], "b": parents["b"]}, parents["base"] if base else None
    )
    moved = open_merger(
        {"a": parents["a"], "b": parents[donor]}, parents["moved_base"] if base else None
    )
    rules = (rule(name, **example_parameters(method, ["a", "b"])),)
    expected = realize(straight, recipe_for(straight, *rules, seed=3))
    used = ("b", "base") if base else ("b",)
    assert_same_bits(realize(moved, ordered(moved, rules, *used)), expected)
    if name == "linear":
        unordered = realize(moved, recipe_for(moved, *rules, seed=3))
        for tensor in (GATE.format(0), BIAS.format(1), "layers.1.mlp.experts.0.down_proj.weight"):
            assert not torch.equal(unordered[tensor], expected[tensor])


def test_the_written_child_has_lineage_and_is_the_realized_one(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    merger = open_merger({"a": parents["a"], "b": parents["unfused_b"]})
    experts = Selector(components=("expert",), layers=(0, 1), experts=(1, 4))
    rules = (
        rule("passthrough", experts, source="b"),
        rule("as_experts", Selector(components=("router",))),
    )
    recipe = ordered(merger, rules, "b")
    child = write_child(merger, recipe, tmp_path / "child", threads=2)
    a, b = (read_tensors(parents[name]) for name in ("a", "b"))
    expected = dict(a)
    for tensor in a:
        if ".gate." in tensor or ".experts." in tensor:
            expected[tensor] = torch.cat([a[tensor][:1], b[tensor][1:5], a[tensor][5:]])
    written = read_tensors(child)
    assert_same_bits(written, expected)
    logical = realize(merger, recipe)
    source = Source(open_checkpoint(str(child)))
    for tensor in merger.plan.child.tensors:
        assert torch.equal(logical[tensor.name], source.read(tensor, 0, tensor.elements))


def test_an_order_is_read_from_a_remote_store_too(
    parents: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row where rows are long."""
    names = {"a": parents["a"], "b": parents["moved_b"]}
    near = open_merger(names)
    rules = (rule("linear", weight={"a": 0.25, "b": 0.75}),)
    expected = realize(near, ordered(near, rules, "b"))
    for long in (1, 1 << 16):
        monkeypatch.setattr(expert_rows_module, "LONG_ROW_ELEMENTS", long)
        far = Merger({name: open_remote(folder) for name, folder in names.items()})
        assert_same_bits(realize(far, ordered(far, rules, "b"), threads=2), expected)
        run = far.start(ordered(far, rules, "b"))
        gate = run.plan.child.by_name[GATE.format(0)]
        whole = run.read("b", gate, 0, gate.elements)
        for first, count in ((0, 0), (5, 3), (HIDDEN - 1, 2), (7, 3 * HIDDEN)):
            assert torch.equal(run.read("b", gate, first, count), whole[first : first + count])


def test_statistics_of_one_order_are_not_used_for_another(parents: dict[str, Path]) -> None:
    names = {"a": parents["a"], "b": parents["moved_b"]}
    rules = (rule("ties", weight=1.0, density=0.3),)

    def child(merger: Merger, orders: dict[int, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        recipe = recipe_for(merger, *rules)
        return realize(merger, replace(recipe, experts={"b": orders} if orders else {}))

    one = open_merger(names, parents["base"], keep_statistics=True)
    found = [child(one, orders) for orders in (WANTED, {}, ORDERS, WANTED)]
    for orders, child_of_one in zip((WANTED, {}, ORDERS, WANTED), found, strict=True):
        alone = open_merger(names, parents["base"])
        assert_same_bits(child_of_one, child(alone, orders))


def test_attribution_knows_the_order(parents: dict[str, Path], tmp_path: Path) -> None:
    """A child whose experts are the donor's is attributed to it, wherever that had them."""
    merger = open_merger({"a": parents["a"], "b": parents["moved_b"]}, parents["base"])
    rules = (rule("passthrough", Selector(components=("expert", "router")), source="b"),)
    recipe = ordered(merger, rules, "b")
    child = open_checkpoint(str(write_child(merger, recipe, tmp_path / "child")))
    run = merger.start(recipe)
    tensors = [t for t in run.plan.child.tensors if t.component in ("expert", "router")]
    products = [
        measure_chunk(run, Source(child), run.plan.child.by_name[name], first)
        for name, first in cut_chunks(tensors)
    ]
    found = attribute(products, sum(tensor.elements for tensor in tensors))
    assert found is not None
    assert found.coefficients == pytest.approx({"a": 0.0, "b": 1.0, "base": 0.0}, abs=1e-9)
    assert found.residual == pytest.approx(0.0, abs=1e-12)


# The recipe


def test_a_recipe_keeps_its_id_where_nothing_is_reordered(parents: dict[str, Path]) -> None:
    merger = open_merger({"a": parents["a"], "b": parents["b"]})
    plain = recipe_for(merger, rule("linear", weight=0.5))
    assert "experts" not in plain.to_dict()
    same = replace(plain, experts={"b": {0: tuple(range(EXPERTS))}})
    assert same.id == plain.id
    moved = replace(plain, experts={"b": {1: ORDERS[1], 0: tuple(range(EXPERTS))}})
    assert moved.id != plain.id
    data = json.loads(moved.canonical_json)
    assert data["experts"] == {"b": {"1": list(ORDERS[1])}}
    back = Recipe.from_dict(data)
    assert back.id == moved.id
    assert back.experts == {"b": {1: ORDERS[1]}}


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([], "is not a table of parents"),
        ({"nobody": {}}, r"'nobody' is none of \['b'\]"),
        ({"base": {}}, "'base' is none of"),
        ({"a": {"0": [0, 1]}}, "a: the father's experts .* keep their places"),
        ({"b": [1, 0]}, "b: .* is not a table of layers"),
        ({"b": {"first": [1, 0]}}, "b: 'first' is not the number of a layer"),
        ({"b": {"0": [1, 0], "00": [0, 1]}}, "b: '00' is not the number of a layer"),
        ({"b": {"9" * 5000: [1, 0]}}, "9' is not the number of a layer"),
        (
            {"b": {"0": [1, 1, 0]}},
            "b: layer 0: must name each of the parent's experts exactly once",
        ),
        ({"b": {"0": [1, 2]}}, "b: layer 0: must name each"),
        ({"b": {"0": [True, False]}}, "b: layer 0: must name each"),
        ({"b": {"0": "10"}}, "b: layer 0: must name each"),
    ],
)
def test_what_is_no_order(experts: Any, message: str, parents: dict[str, Path]) -> None:
    merger = open_merger({"a": parents["a"], "b": parents["b"]})
    data = recipe_for(merger).to_dict() | {"experts": experts}
    with pytest.raises(BadInputError, match=message):
        Recipe.from_dict(data)


def test_an_order_must_fit_the_experts_there_are(parents: dict[str, Path]) -> None:
    merger = open_merger({"a": parents["a"], "b": parents["b"]})
    plain = recipe_for(merger)
    for orders, message in (
        ({0: (1, 0)}, "b: layer 0: orders 2 experts, but layer 0 of .* has 6"),
        ({7: ORDERS[0]}, "b: layer 7: orders 6 experts, but layer 7 of .* has 0"),
    ):
        with pytest.raises(BadInputError, match=message):
            merger.start(replace(plain, experts={"b": orders}))
    stacked = ({"a": (0, 0)}, {"b": (1, 1)})
    with pytest.raises(BadInputError, match="experts: cannot be ordered where layers are stacked"):
        merger.start(replace(plain, experts={"b": WANTED}, layers=stacked))


# Routers merged as their experts


@pytest.mark.parametrize("is_remote", [False, True])
def test_each_row_is_merged_as_its_expert(is_remote: bool, parents: dict[str, Path]) -> None:
    """Against the plain formula of each expert's method, for that row alone."""
    names = {"a": parents["a"], "b": parents["b"], "c": parents["c"]}
    open_ = open_remote if is_remote else lambda folder: open_checkpoint(str(folder))
    merger = Merger({name: open_(path) for name, path in names.items()}, open_(parents["base"]))
    of = {
        0: rule("passthrough", source="c"),
        1: rule("ties", weight=1.0, density=0.4),
        2: rule("linear", weight={"a": 0.7, "b": 0.2, "c": 0.1}),
        3: rule("dare_linear", weight=0.5, density=0.5),
        4: rule("karcher", weight=1.0),
    }
    rules = [
        replace(way, where=Selector(components=("expert",), experts=(expert, expert)))
        for expert, way in of.items()
    ]
    recipe = recipe_for(
        merger, *rules, rule("as_experts", Selector(components=("router",))), seed=9
    )
    child = realize(merger, recipe, threads=2)
    values = {
        name: read_tensors(path) for name, path in (names | {"base": parents["base"]}).items()
    }
    for stem in (GATE, BIAS):
        for layer in (0, 1):
            name = stem.format(layer)
            found = to_float64(child[name]).reshape(EXPERTS, -1)
            rows = {
                p: to_float64(v[f"model.{name}"]).reshape(EXPERTS, -1) for p, v in values.items()
            }
            assert numpy.array_equal(found[5], rows["a"][5])  # no rule is for expert 5
            for expert, way in of.items():
                own = {p: rows[p][expert] for p in names}
                resolved = METHODS[way.method].resolve(way.parameters, tuple(names), True)
                if way.method == "dare_linear":
                    continue  # masks are drawn for the row's place in the router: see below
                resolved["shape"] = (1, found.shape[1])
                expected = REFERENCES[way.method](own, rows["base"][expert], resolved, (9, name))
                assert found[expert] == pytest.approx(expected, rel=2**-7, abs=2**-8)
    whole = realize(merger, recipe_for(merger, replace(of[3], where=Selector()), seed=9))
    name = GATE.format(0)
    masked = child[name].view(EXPERTS, -1)[3]
    assert torch.equal(masked, whole[name].view(EXPERTS, -1)[3])


def test_layers_that_are_stacked_have_their_own_routers(parents: dict[str, Path]) -> None:
    merger = open_merger({"a": parents["a"], "b": parents["b"]})
    rules = (
        rule("passthrough", Selector(components=("expert",), experts=(2, 2)), source="b"),
        rule("as_experts", Selector(components=("router",))),
    )
    stacked = ({"a": (1, 1), "b": (1, 1)}, {"a": (0, 1), "b": (0, 1)})
    child = realize(merger, replace(recipe_for(merger, *rules), layers=stacked))
    values = {name: read_tensors(parents[name]) for name in "ab"}
    for layer, own in enumerate((1, 0, 1)):
        stored = f"model.layers.{own}.mlp.gate.weight"
        expected = values["a"][stored].clone()
        expected[2] = values["b"][stored][2]
        assert torch.equal(child[GATE.format(layer)], expected.view(-1))


def test_a_routers_scale_of_hidden_states_stays_the_fathers(tmp_path: Path) -> None:
    """Gemma 4's has no row for each expert, not even where there are as many experts as hidden states."""
    generator = torch.Generator().manual_seed(0)
    folders = {}
    for name in "ab":
        stem = "model.layers.0"
        shapes = {
            f"{stem}.router.proj.weight": (4, 4),
            f"{stem}.router.scale": (4,),
            f"{stem}.router.per_expert_scale": (4,),
            f"{stem}.experts.gate_up_proj": (4, 6, 4),
            f"{stem}.experts.down_proj": (4, 4, 3),
        }
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        folders[name] = write_experts(tmp_path / name, tensors)
    merger = open_merger(folders)
    rules = (
        rule("passthrough", Selector(components=("expert",)), source="b"),
        rule("as_experts", Selector(components=("router",))),
    )
    recipe = replace(recipe_for(merger, *rules), experts={"b": {0: (3, 2, 1, 0)}})
    child = realize(merger, recipe)
    a, b = (read_tensors(folders[name]) for name in "ab")
    for role, expected in (
        ("scale", a["model.layers.0.router.scale"]),
        ("per_expert_scale", b["model.layers.0.router.per_expert_scale"].flip(0)),
        ("proj.weight", b["model.layers.0.router.proj.weight"].flip(0)),
    ):
        assert torch.equal(child[f"layers.0.router.{role}"], expected.reshape(-1)), role


@pytest.mark.parametrize(("name", "shape"), BIASES_BESIDE_ROUTERS)
def test_a_bias_beside_the_router_goes_with_the_experts(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    father, donor = (with_bias_beside(random_experts(seed), name, shape) for seed in (1, 2))
    moved = donor | reordered(donor, ORDERS)
    for layer, order in ORDERS.items():
        stored = f"model.layers.{layer}.{name}"
        moved[stored] = donor[stored].flatten()[list(order)].view(shape)
    folders = {
        key: write_experts(tmp_path / key, tensors)
        for key, tensors in {"father": father, "donor": donor, "moved": moved}.items()
    }
    straight, merger = (
        open_merger({"a": folders["father"], "b": folders[key]}, folders["father"])
        for key in ("donor", "moved")
    )
    transplanted = Selector(components=("expert",), experts=(1, 4))
    rules = (
        rule("passthrough", transplanted, source="b"),
        rule("as_experts", Selector(components=("router",))),
    )
    child = realize(merger, ordered(merger, rules, "b"))
    for layer in ORDERS:
        stored = f"model.layers.{layer}.{name}"
        own, other = father[stored].flatten(), donor[stored].flatten()
        found = child[canonical_name(stored)]
        assert torch.equal(found, torch.cat([own[:1], other[1:5], own[5:]]))
    for blended in (rule("linear", weight=0.5), rule("ties", weight=0.5, density=0.4)):
        expected = realize(straight, recipe_for(straight, blended))
        assert_same_bits(realize(merger, ordered(merger, (blended,), "b")), expected)


@pytest.mark.parametrize(("name", "shape"), BIASES_BESIDE_ROUTERS)
def test_a_router_with_a_bias_beside_it_is_not_plain(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """It routes by more than one matrix, whatever the shape of its bias and wherever it is stored."""
    plain = {k: v for k, v in random_experts(1).items() if not k.endswith("correction_bias")}
    folder = write_experts(tmp_path / "plain", plain)
    assert set(plain_routers(ArchitectureMap.of(open_checkpoint(str(folder))))) == {0, 1}
    folder = write_experts(tmp_path / "biased", with_bias_beside(plain, name, shape))
    with pytest.raises(BadInputError, match="belongs to a router that is more than one matrix"):
        plain_routers(ArchitectureMap.of(open_checkpoint(str(folder))))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp.gate.wide.weight", (EXPERTS + 2, HIDDEN)),  # with places for no expert, as in LongCat
        ("mlp.moe_statics.e_score_correction_bias", (2, EXPERTS)),
        ("mlp.gate.tid2eid", (20, 2)),  # DeepSeek-V4: the experts of each token
    ],
)
def test_experts_are_not_ordered_without_their_routers(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """A router that names experts otherwise than by a row for each would go on naming the old ones."""
    tensors = with_bias_beside(random_experts(1), name, shape)
    folders = {key: write_experts(tmp_path / key, tensors) for key in "ab"}
    merger = open_merger(folders)
    rules = (rule("linear", weight=0.5),)
    realize(merger, recipe_for(merger, *rules))
    known_as = re.escape(canonical_name(f"model.layers.0.{name}"))
    message = rf"experts: b: layer 0: tensor '{known_as}' of shape .* has no row"
    with pytest.raises(BadInputError, match=message):
        merger.start(ordered(merger, rules, "b"))


EXPERT_RULE = rule("linear", Selector(components=("expert",)), weight=0.5)
ROUTER_RULE = rule("as_experts", Selector(components=("router",)))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            (
                rule("passthrough", Selector(names=("*.3.down_proj.weight",)), source="b"),
                EXPERT_RULE,
                ROUTER_RULE,
            ),
            r"as_experts: expert 3 of layer 0: layers.0.mlp.experts.3.down_proj.weight and "
            r"layers.0.mlp.experts.3.gate_proj.weight are merged in different ways",
        ),
        (
            (rule("iso_c", Selector(components=("expert",)), weight=1.0), ROUTER_RULE),
            "as_experts: expert 0 of layer 0: is merged by iso_c, which needs whole matrices",
        ),
        (
            (rule("as_experts", Selector(components=("attention",))),),
            r"o_proj.weight' of shape .*: method as_experts is for routers.*give it a rule of its own",
        ),
        (
            (EXPERT_RULE, replace(ROUTER_RULE, parents=("b",))),
            "as_experts: has no post-step and no parents but its experts'",
        ),
        ((EXPERT_RULE, replace(ROUTER_RULE, parameters={"weight": 1.0})), "no parameter 'weight'"),
    ],
)
def test_what_cannot_be_merged_as_experts(
    rules: tuple[Rule, ...], message: str, parents: dict[str, Path]
) -> None:
    merger = open_merger({"a": parents["a"], "b": parents["b"]}, parents["base"])
    with pytest.raises(BadInputError, match=message):
        merger.start(recipe_for(merger, *rules))


def test_a_router_without_a_row_for_each_expert_is_not_merged_as_them(tmp_path: Path) -> None:
    """LongCat's has further rows, for experts that do nothing: it would stay the father's, unsaid."""
    tensors = {
        key.replace("mlp.gate.weight", "mlp.router.classifier.weight"): values
        for key, values in random_experts(1).items()
        if not key.endswith("correction_bias")
    }
    for layer in ORDERS:
        key = f"model.layers.{layer}.mlp.router.classifier.weight"
        tensors[key] = torch.cat([tensors[key], tensors[key][:2]])
    merger = open_merger({key: write_experts(tmp_path / key, tensors) for key in "ab"})
    merger.start(recipe_for(merger, EXPERT_RULE))
    with pytest.raises(BadInputError, match=r"layers.0.mlp.router.classifier.*as_experts is for"):
        merger.start(recipe_for(merger, EXPERT_RULE, ROUTER_RULE))


@pytest.mark.parametrize("router", [(), (ROUTER_RULE,)])
def test_a_table_of_each_tokens_experts_is_not_averaged(
    router: tuple[Rule, ...], tmp_path: Path
) -> None:
    """DeepSeek-V4's first routers look experts up by the token: numbers, in integers."""
    name = "model.layers.0.mlp.gate.tid2eid"
    tensors = {key: random_experts(seed) for seed, key in enumerate("ab")}
    for seed, key in enumerate("ab"):
        tensors[key][name] = torch.arange(40).roll(seed).reshape(20, 2) % EXPERTS
    parents = {key: write_experts(tmp_path / key, own) for key, own in tensors.items()}
    merger = open_merger(parents)
    child = realize(merger, recipe_for(merger, *router, rule("linear", weight=0.5)))
    stored = canonical_name(name)
    assert torch.equal(child[stored], tensors["a"][name].flatten())
    other = "layers.0.mlp.experts.0.down_proj.weight"
    assert not torch.equal(child[other], realize(merger, recipe_for(merger))[other])
    taken = realize(merger, recipe_for(merger, rule("passthrough", source="b")))
    assert torch.equal(taken[stored], tensors["b"][name].flatten())


@pytest.mark.parametrize(
    ("layer", "problem"),
    [(0, "layer 0: orders 2 experts, .* has 6"), (7, "layer 7: orders 2 experts, .* has 0")],
)
def test_an_order_that_changes_nothing_is_of_all_experts_too(
    layer: int, problem: str, parents: dict[str, Path], tmp_path: Path
) -> None:
    data = {
        "parents": [{"name": name, "path": str(parents[name])} for name in "ab"],
        "rules": [{"method": "linear", "parameters": {"weight": 1.0}}],
        "experts": {"b": {layer: [0, 1]}},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(BadInputError, match=rf"recipe.yaml: experts: b: {problem}"):
        load_recipe_file(str(file))


def test_verify_and_lineage_know_the_order(parents: dict[str, Path], tmp_path: Path) -> None:
    names = {"a": parents["a"], "b": parents["moved_b"]}
    data = {
        "parents": [{"name": name, "path": str(path)} for name, path in names.items()],
        "rules": [
            {"method": "passthrough", "parameters": {"source": "b"}, "where": {"experts": [0, 2]}},
            {"method": "as_experts", "where": {"components": ["router"]}},
        ],
        "experts": {"b": {str(layer): list(order) for layer, order in WANTED.items()}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    merge_recipe(str(tmp_path / "recipe.yaml"), str(tmp_path / "child"))
    lineage = json.loads((tmp_path / "child" / "lineage.json").read_text())
    assert lineage["recipe"]["experts"] == data["experts"]
    gate = next(row for row in lineage["tensors"] if row["name"] == GATE.format(0))
    assert gate["method"] == "as_experts"
    assert gate["parameters"] == {"weight": {"a": 0.5, "b": 0.5}}
    assert gate["changed"] == {"a": 3 * HIDDEN, "b": 3 * HIDDEN}
    verified = verify_child(str(tmp_path / "child"), [str(path) for path in names.values()])
    assert (verified["status"], verified["problems"]) == ("sound", [])
    counted = {name: sum(row["changed"][name] for row in lineage["tensors"]) for name in names}
    assert verified["changed"] == counted
    found = attribute_checkpoint(str(tmp_path / "child"), {n: str(p) for n, p in names.items()})
    experts = next(part for part in found["components"] if part["component"] == "expert")
    assert experts["explained"] == pytest.approx(1.0)
    assert experts["shares"] == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.1)
    assert experts["identical"] == {"a": 3 * 3 * 2, "b": 3 * 3 * 2}
