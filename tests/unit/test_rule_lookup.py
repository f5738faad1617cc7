"""Rules that name their tensors are looked up: the same choice as by matching, in linear time."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from tests.checkpoint_files import assert_same_bits, open_merger, recipe_for, write_checkpoint
from tests.checkpoint_files import realize as realized
from tests.families import write_family
from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor
from workers.checkpoints.checkpoint import WeightFile
from workers.checkpoints.safetensors_format import Header, TensorEntry
from workers.errors import BadInputError
from workers.merging import ParentReference, Recipe, Rule, Selector
from workers.merging.plan import RECENT_CHOICES, Plan
from workers.merging.selector import parse_selector
from workers.storage import open_store

PARENTS = (ParentReference("a", "0" * 64), ParentReference("b", "1" * 64))


def blend(where: Selector, share: float) -> Rule:
    return Rule(where, "linear", {"weight": {"a": 1.0 - share, "b": share}})


def plan_of(stored: list[str], folder: Path) -> Plan:
    entries = tuple(TensorEntry(n, "F32", (1,), 4 * i, 4 * i + 4) for i, n in enumerate(stored))
    file = WeightFile("model.safetensors", 4 * len(stored), Header(entries, b""))
    father = ArchitectureMap(Checkpoint(open_store(str(folder)), {}, (file,), ()))
    return Plan({"a": father, "b": father}, None)


def matches(where: Selector, tensor: LogicalTensor) -> bool:
    """What a selector means, by its documentation."""
    return (
        (not where.components or tensor.component in where.components)
        and (where.layers is None or (tensor.layer is not None
             and where.layers[0] <= tensor.layer <= where.layers[1]))
        and (not where.names or any(
            fnmatchcase(name, pattern) for pattern in where.names
            for name in (tensor.name, tensor.stored)))
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_each_tensor_takes_the_first_rule_that_matches_it(seed: int, tmp_path: Path) -> None:
    """Exact names (canonical or stored), patterns, and names together with other conditions, mixed."""
    chance = random.Random(seed)
    stored = [
        f"model.layers.{layer}.{part}.weight"
        for layer in range(12)
        for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    ] + ["model.embed_tokens.weight", "model.norm.weight"]
    plan = plan_of(stored, tmp_path)
    rules = []
    for _ in range(25):
        names = chance.sample(stored, chance.randint(1, 6))
        names = [name if chance.random() < 0.5 else name.removeprefix("model.") for name in names]
        if chance.random() < 0.2:
            names.append(chance.choice(["layers.1?.*", "*up_proj*", "*.[23].mlp.*"]))
        where = Selector(
            components=("mlp", "norm") if chance.random() < 0.2 else (),
            layers=(2, 9) if chance.random() < 0.2 else None,
            names=tuple(names),
        )
        if any(matches(where, tensor) for tensor in plan.child.tensors):
            rules.append(where)
    recipe = Recipe(PARENTS, tuple(blend(where, n / 100) for n, where in enumerate(rules)))
    assigned = plan.assign(recipe)
    for tensor in plan.child.tensors:
        number = next((n for n, where in enumerate(rules) if matches(where, tensor)), None)
        way = assigned[tensor.name]
        if number is None:
            assert way.copies
        else:
            assert way.values["weight"]["b"] == number / 100


def test_a_stored_name_selects_all_experts_in_it(tmp_path: Path) -> None:
    fused = "model.layers.0.mlp.experts.down_proj"
    file = write_checkpoint(tmp_path / "m", {fused: torch.zeros(4, 6, 2)}, config={})
    merger = open_merger({"a": file, "b": file})
    names = merger.plan.select(Selector(names=(fused,)))
    assert names == {f"layers.0.mlp.experts.{n}.down_proj.weight" for n in range(4)}
    one = merger.plan.select(Selector(names=(fused,), experts=(2, 2)))
    assert one == {"layers.0.mlp.experts.2.down_proj.weight"}


SPANS = ((0, 1), (3, 3))


@pytest.mark.parametrize("rest", [{}, {"components": ("expert", "norm")}, {"layers": (1, 9)},
                                  {"experts": (1, 3)}, {"names": ("*down*", "*gate*")}])  # fmt: skip
def test_places_select_experts_of_layers(rest: dict, tmp_path: Path) -> None:
    """By the index as by asking tensor by tensor, and as text tells; alone and with other conditions."""
    stored = [
        f"model.layers.{layer}.mlp.{part}.weight"
        for layer in range(4)
        for part in (
            "gate",
            *(f"experts.{e}.{n}" for e in range(5) for n in ("up_proj", "down_proj")),
        )
    ]
    plan = plan_of(stored, tmp_path)
    where = Selector(places=((0, ((2, 2),)), (2, SPANS), (3, ((4, 4),))), **rest)
    expected = {
        name
        for name, tensor in plan.child.by_name.items()
        if (tensor.layer, tensor.expert) in {(0, 2), (2, 0), (2, 1), (2, 3), (3, 4)}
        and matches(replace(where, places=(), experts=None), tensor)
        and (where.experts is None or 1 <= (tensor.expert or 0) <= 3)
    }
    assert plan.select(where) == expected
    assert {t.name for t in plan.child.tensors if where.matches(t)} == expected
    assert parse_selector(json.loads(json.dumps(where.to_dict()))) == where


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ({"experts": [0, 20]}, r"where.experts: \[0, 20\] are not experts of .*experts 0 to 4"),
        ({"experts": [5, 5], "names": ["*down*"]}, r"where.experts: \[5, 5\] are not"),
        ({"experts": [-1, 2]}, r"where.experts: \[-1, 2\] are not"),
        ({"experts": [3, 1]}, r"where.experts: \[3, 1\] are not"),
        ({"places": {0: [[0, 1], [4, 10**12]]}}, r"where.places.0: \[4, 1000000000000\] are not"),
        ({"places": {7: [[0, 0]]}}, "where.places.7: .* has 1 layers, from 0 to 0"),
    ],
)
def test_experts_that_there_are_not_are_refused(where: dict, problem: str, tmp_path: Path) -> None:
    """Also where others of the rule are there: what was meant by them is not known."""
    plan = plan_of([f"model.layers.0.mlp.experts.{e}.down_proj.weight" for e in range(5)], tmp_path)
    with pytest.raises(BadInputError, match=problem):
        plan.select(parse_selector(where))


def test_experts_of_a_dense_model_are_refused(tmp_path: Path) -> None:
    plan = plan_of(["model.layers.0.mlp.down_proj.weight"], tmp_path)
    with pytest.raises(BadInputError, match=r"where.experts: .* no routed experts"):
        plan.select(parse_selector({"experts": [0, 3]}))


def test_places_are_read_with_layers_as_numbers_or_texts() -> None:
    wanted = Selector(places=((2, SPANS), (10, ((5, 7),))))
    for two, ten in ((2, 10), ("2", "10")):
        assert parse_selector({"places": {ten: [[5, 7]], two: [[0, 1], [3, 3]]}}) == wanted


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ([], "where.places: .* is not a dict"),
        ({}, "names no layer"),
        ({"1": []}, "where.places.1: names no expert"),
        ({"1": [3]}, "where.places.1: 3 is not a list"),
        ({"1": [[1, 2, 3]]}, r"where.places.1: \[1, 2, 3\] is not \[first, last\]"),
        ({"x": [[1, 2]]}, "'x' is not a layer's number"),
        ({-1: [[1, 2]]}, "-1 is not a layer's number"),
        ({1: [[1, 2]], "1": [[1, 2]]}, "or stands there twice"),
        ({True: [[1, 2]]}, "True is not a layer's number"),
    ],
)
def test_places_that_are_none_are_refused(places: object, problem: str) -> None:
    with pytest.raises(BadInputError, match=problem):
        parse_selector({"places": places})


def test_places_of_a_search_are_not_kept(tmp_path: Path) -> None:
    plan = plan_of([f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(5)], tmp_path)
    for expert in range(5):
        assert len(plan.select(Selector(places=((0, ((expert, expert),)),)))) == 1
    assert plan._selected == {}


def test_a_name_that_there_is_not_is_refused(tmp_path: Path) -> None:
    plan = plan_of(["model.norm.weight"], tmp_path)
    with pytest.raises(BadInputError, match="matches no tensor"):
        plan.assign(Recipe(PARENTS, (blend(Selector(names=("norm.wait",)), 0.5),)))


def test_bits_are_those_of_rules_by_pattern(tmp_path: Path) -> None:
    """A pattern that means one tensor, `[l]ayers...`, is matched; its plain name is looked up."""
    base, *parents = write_family(tmp_path, "qwen3")
    merger = open_merger(dict(zip("ab", parents, strict=True)), base)
    tensors = merger.plan.child.tensors

    def child(pattern: bool) -> dict:
        names = [f"[{t.name[0]}]{t.name[1:]}" if pattern else t.name for t in tensors]
        rules = [
            Rule(Selector(names=(name,)), "dare_linear",
                 {"weight": {"a": n / 50, "b": 1 - n / 50}, "density": 0.7})
            for n, name in enumerate(names)
        ]  # fmt: skip
        return realized(merger, recipe_for(merger, *rules))

    assert_same_bits(child(False), child(True))


def test_twelve_thousand_rules_on_as_many_tensors_are_assigned_at_once(tmp_path: Path) -> None:
    """Matching each rule with each tensor would take minutes."""
    stored = [
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
        for layer in range(120)
        for expert in range(100)
    ]
    plan = plan_of(stored, tmp_path)
    rules = [blend(Selector(names=(t.name,)), n / 12000) for n, t in enumerate(plan.child.tensors)]
    recipe = Recipe(PARENTS, tuple(rules))
    started = time.process_time()
    assigned = plan.assign(recipe)
    assert time.process_time() - started < 5.0  # half a second when the machine is quiet
    assert [way.values["weight"]["b"] for way in assigned.values()] == [
        n / 12000 for n in range(12000)
    ]


def test_a_search_does_not_fill_the_memory_with_its_candidates_rules(tmp_path: Path) -> None:
    stored = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(40)]
    plan = plan_of(stored, tmp_path)
    for cut in range(1, 40):
        halves = (Selector(names=tuple(stored[:cut])), Selector(names=tuple(stored[cut:])))
        plan.assign(Recipe(PARENTS, (blend(halves[0], 0.2), blend(halves[1], 0.8))))
    assert len(plan._chosen) <= RECENT_CHOICES
    assert not plan._selected
