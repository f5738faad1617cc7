"""Attribution: what was measured against plain float64 least squares on the weights themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml

from orchestrator.child_writer import ChildWriter
from orchestrator.descent import attribution as attribution_module
from orchestrator.descent.attribution import attribute_checkpoint, attribute_written
from orchestrator.descent.lineage import ATTRIBUTION_FILE
from orchestrator.recipe_file import named_places
from orchestrator.single_merge import merge_recipe
from tests.checkpoint_files import (
    local_calls,
    open_merger,
    read_tensors,
    recipe_for,
    rule,
    to_float64,
    write_checkpoint,
)
from workers.checkpoints import open_checkpoint
from workers.errors import BadInputError
from workers.merging import Rule, Selector
from workers.storage.folder import FolderStore

SHAPES = {
    "model.embed_tokens.weight": (11, 16),
    "model.layers.0.self_attn.q_proj.weight": (24, 16),
    "model.layers.0.mlp.up_proj.weight": (40, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.1.self_attn.q_proj.weight": (24, 16),
    "model.layers.1.mlp.up_proj.weight": (40, 16),
    "model.norm.weight": (16,),
}
COMPONENT = {"embed": "embedding", "attn": "attention", "mlp": "mlp", "norm": "norm"}
ATTENTION, MLP = Selector(components=("attention",)), Selector(components=("mlp",))
EVERYTHING = Selector()

Tensors = dict[str, torch.Tensor]


def component(name: str) -> str:
    return next(value for key, value in COMPONENT.items() if key in name)


def write_family(
    folder: Path, dtype: torch.dtype, changes: dict[tuple[str, str], str]
) -> dict[str, Path]:
    """A base and its relatives `a`, `b`, `c`: task vectors of different length. `changes`: (who, tensor) ->
    whose values it has instead."""
    generator = torch.Generator().manual_seed(4)

    def random() -> Tensors:
        return {
            n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()
        }

    base = random()
    tensors = {"base": base}
    for number, name in enumerate(("a", "b", "c")):
        tensors[name] = {n: base[n] + 0.3 * (1 + number) * d for n, d in random().items()}
    for (name, tensor), source in changes.items():
        tensors[name][tensor] = tensors[source][tensor].clone()
    return {
        name: write_checkpoint(folder / name, {n: t.to(dtype) for n, t in own.items()})
        for name, own in tensors.items()
    }


def write_child(folders: dict[str, Path], names: str, base: bool, *rules: Rule) -> Path:
    """The child of these parents and rules, as it lies in a store before it is published, and after."""
    merger = open_merger({name: folders[name] for name in names}, folders["base"] if base else None)
    target = folders[names[0]].parent / "child"
    store = FolderStore(target)
    writer = ChildWriter.create(recipe_for(merger, *rules), merger.parents, merger.base, store)
    calls = local_calls(merger, store)
    writer.write(calls)
    found = attribute_written(writer, calls)
    writer.publish({})
    published = attribute_checkpoint(
        str(target),
        {name: str(folders[name]) for name in names},
        str(folders["base"]) if base else None,
    )
    for key in ("total", "components", "cells", "tensors"):
        assert found[key] == published[key]
    return target


def measured(child: Path, folders: dict[str, Path], names: str, base: bool) -> dict[str, Any]:
    places = {name: str(folders[name]) for name in names}
    return attribute_checkpoint(str(child), places, str(folders["base"]) if base else None)


def reference(
    child: Tensors, points: Sequence[Tensors], names: Sequence[str]
) -> tuple[numpy.ndarray, float, float]:
    """Least squares with coefficients that sum to 1 over these tensors as one vector, the first point the
    origin; what it explains; what each tensor's own solution leaves, per element."""

    def solve(tensors: Sequence[str]) -> tuple[numpy.ndarray, float]:
        origin, *others = (
            numpy.concatenate([to_float64(point[name]).ravel() for name in tensors])
            for point in points
        )
        own = numpy.concatenate([to_float64(child[name]).ravel() for name in tensors])
        matrix = numpy.stack([other - origin for other in others], axis=1)
        found = numpy.linalg.lstsq(matrix, own - origin, rcond=None)[0]
        rest = float(((own - origin - matrix @ found) ** 2).sum())
        return numpy.array([1.0 - found.sum(), *found]), rest

    coefficients, together = solve(names)
    distances = [
        sum(float(((to_float64(child[n]) - to_float64(p[n])) ** 2).sum()) for n in names)
        for p in points
    ]
    distance = sum(distances) / len(points)
    apart = sum(solve([name])[1] for name in names)
    elements = sum(child[name].numel() for name in names)
    assert together >= apart - 1e-12
    return coefficients, 1.0 - apart / distance, math.sqrt(apart / elements)


FAMILIES = [
    (method, names, base)
    for method in ("linear", "task_arithmetic", "ties", "slerp", "passthrough")
    for names in ("ab", "abc", "cab")
    for base in (True, False)
    if (base or method not in ("ties", "task_arithmetic")) and (method, len(names)) != ("slerp", 3)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "names", "base"), FAMILIES)
def test_every_group_is_the_least_squares_solution(
    method: str, names: str, base: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    parameters: dict[str, dict[str, Any]] = {
        "linear": {"weight": {"a": 0.2, "b": 0.7, "c": 0.3}},
        "task_arithmetic": {"weight": {"a": 0.4, "b": -0.3, "c": 1.2}},
        "ties": {"weight": 1.0, "density": 0.6},
        "slerp": {"t": 0.3},
        "passthrough": {"source": names[1]},
    }
    given = parameters[method]
    if isinstance(given.get("weight"), dict):
        given["weight"] = {name: given["weight"][name] for name in names}
    folders = write_family(tmp_path, dtype, {})
    child = write_child(folders, names, base, rule(method, EVERYTHING, **given))
    found = measured(child, folders, names, base)
    points = [*names, *(["base"] if base else [])]
    tensors = {name: read_tensors(folder) for name, folder in folders.items()}
    own = read_tensors(child)
    groups = [(found["total"], list(SHAPES))]
    groups += [
        (part, [name for name in SHAPES if component(name) == part["component"]])
        for part in found["components"]
    ]
    groups += [(part, ["model." + part["name"]]) for part in found["tensors"]]
    for part, names_in_group in groups:
        coefficients, explained, residual = reference(
            own, [tensors[point] for point in points], names_in_group
        )
        assert part["coefficients"] == pytest.approx(
            dict(zip(points, coefficients, strict=True)), abs=2e-6
        )
        assert part["explained"] == pytest.approx(explained, abs=2e-6)
        assert part["residual"] == pytest.approx(residual, rel=1e-4, abs=1e-7)
        positive = {name: max(value, 0.0) for name, value in zip(points, coefficients, strict=True)}
        shares = {name: value / sum(positive.values()) for name, value in positive.items()}
        assert part["shares"] == pytest.approx(shares, abs=3e-6)
        assert part["undetermined"] == []


def test_ffn_from_the_mother_attention_from_the_father(tmp_path: Path) -> None:
    folders = write_family(tmp_path, torch.bfloat16, {})
    child = write_child(
        folders,
        "ab",
        False,
        rule("linear", ATTENTION, weight={"a": 0.93, "b": 0.07}),
        rule("linear", MLP, weight={"a": 0.07, "b": 0.93}),
    )
    found = measured(child, folders, "ab", False)
    shares = {part["component"]: part["shares"] for part in found["components"]}
    assert shares["attention"] == pytest.approx({"a": 0.93, "b": 0.07}, abs=2e-3)
    assert shares["mlp"] == pytest.approx({"a": 0.07, "b": 0.93}, abs=2e-3)
    assert shares["norm"] == {"a": 1.0, "b": 0.0}
    cells = {(c["component"], c["layer"]): c["shares"] for c in found["cells"]}
    assert cells["mlp", 1] == pytest.approx({"a": 0.07, "b": 0.93}, abs=2e-3)
    assert cells["embedding", None] == {"a": 1.0, "b": 0.0}
    identical = {part["component"]: part["identical"] for part in found["components"]}
    assert identical["norm"] == {"a": 2, "b": 0}
    assert identical["mlp"] == {"a": 0, "b": 0}


def test_a_negative_coefficient_is_no_share(tmp_path: Path) -> None:
    folders = write_family(tmp_path, torch.float32, {})
    child = write_child(
        folders, "ab", False, rule("linear", EVERYTHING, weight={"a": 1.5, "b": -0.5}, normalize=0)
    )
    total = measured(child, folders, "ab", False)["total"]
    assert total["coefficients"] == pytest.approx({"a": 1.5, "b": -0.5}, abs=1e-5)
    assert total["shares"] == {"a": 1.0, "b": 0.0}


def test_tensors_in_which_parents_are_alike(tmp_path: Path) -> None:
    q, up, norm = (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    )
    changes = {("b", q): "a", ("a", up): "base", ("a", norm): "base", ("b", norm): "base",
               ("c", norm): "base"}  # fmt: skip
    folders = write_family(tmp_path, torch.float32, changes)
    weight = {"a": 0.2, "b": 0.3, "c": 0.5}
    child = write_child(folders, "abc", True, rule("linear", EVERYTHING, weight=weight))
    found = {part["name"]: part for part in measured(child, folders, "abc", True)["tensors"]}
    # What the father and mother have in common is theirs together.
    same = found[q.removeprefix("model.")]
    assert same["shares"] == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5, "base": 0.0}, abs=1e-5)
    assert same["undetermined"] == ["a", "b"]
    # The father is the base: it is his.
    assert found[up.removeprefix("model.")]["shares"] == pytest.approx(weight, abs=1e-5)
    # Nothing is told by what all have.
    alike = found[norm.removeprefix("model.")]
    assert alike["shares"] is None
    assert alike["explained"] is None
    assert alike["residual"] < 1e-6
    # Nor does it count beside what tells: the component is solved as one long tensor.
    parts = measured(child, folders, "abc", True)["components"]
    assert next(p for p in parts if p["component"] == "norm")["shares"] == pytest.approx(
        weight | {"base": 0.0}, abs=1e-5
    )


def test_tensors_that_hardly_differ_do_not_outvote_the_others(tmp_path: Path) -> None:
    folders = write_family(tmp_path, torch.float32, {})
    tensors = {name: read_tensors(folders[name]) for name in "ab"}
    one, other = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2))
    tensors["b"][other] = tensors["a"][other].clone()
    tensors["b"][other][0, 0] += 1e-3
    child = dict(tensors["a"])
    child[one] = 0.1 * tensors["a"][one] + 0.9 * tensors["b"][one]
    written = {
        name: write_checkpoint(tmp_path / "again" / name, own)
        for name, own in (tensors | {"child": child}).items()
    }
    parts = measured(written["child"], written, "ab", False)["components"]
    mlp = next(part for part in parts if part["component"] == "mlp")
    assert mlp["shares"] == pytest.approx({"a": 0.1, "b": 0.9}, abs=1e-4)  # not the mean, 0.55


def test_what_only_the_father_has_is_his(tmp_path: Path) -> None:
    folders = write_family(tmp_path, torch.float32, {})
    own = read_tensors(folders["a"])
    tower = {"model.visual.proj.weight": torch.ones(3, 5)}
    folders["a"] = write_checkpoint(tmp_path / "father", own | tower)
    child = write_child(folders, "ab", False, rule("linear", MLP, weight=1.0))
    parts = measured(child, folders, "ab", False)["components"]
    vision = next(part for part in parts if part["component"] == "vision")
    assert (vision["shares"], vision["residual"]) == ({"a": 1.0}, 0.0)
    assert vision["identical"] == {"a": 1, "b": 0}


def test_a_lineage_that_lies_is_unmasked(tmp_path: Path) -> None:
    """It says half and half, but the child is its father, trained on."""
    folders = write_family(tmp_path, torch.bfloat16, {})
    places = [{"name": name, "path": str(folders[name])} for name in "ab"]
    rules = [{"method": "linear", "parameters": {"weight": 0.5}}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"parents": places, "rules": rules}))
    merge_recipe(str(tmp_path / "recipe.yaml"), str(tmp_path / "child"))
    honest = measured(tmp_path / "child", folders, "ab", False)
    generator = torch.Generator().manual_seed(9)
    trained = {
        name: (t.float() + 0.2 * torch.randn(t.shape, generator=generator)).bfloat16()
        for name, t in read_tensors(folders["a"]).items()
    }
    lineage = (tmp_path / "child" / "lineage.json").read_bytes()
    liar = write_checkpoint(tmp_path / "liar", trained, files={"lineage.json": lineage})
    found = measured(liar, folders, "ab", False)
    for result in (honest, found):
        assert result["intended"]["mlp"] == {"a": 0.5, "b": 0.5}
    assert honest["total"]["shares"] == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-3)
    assert honest["total"]["explained"] > 0.999
    assert found["total"]["shares"]["a"] > 0.95
    assert found["total"]["explained"] < 0.9


def test_numbers_that_are_read_as_others_than_they_are_are_told_of(tmp_path: Path) -> None:
    folders = write_family(tmp_path, torch.float32, {})
    places = [{"name": name, "path": str(folders[name])} for name in "ab"]
    rules = [{"method": "task_arithmetic", "parameters": {"weight": 0.5}}]
    recipe = {"parents": places, "base": str(folders["base"]), "rules": rules}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge_recipe(str(tmp_path / "recipe.yaml"), str(tmp_path / "child"))
    assert measured(tmp_path / "child", folders, "ab", True)["warnings"] == []
    (warning,) = measured(tmp_path / "child", folders, "ab", False)["warnings"]
    assert "was merged with a base, and none is given" in warning
    other = attribute_checkpoint(
        str(tmp_path / "child"),
        {"x": str(folders["a"]), "b": str(folders["b"])},
        str(folders["base"]),
    )
    (warning,) = other["warnings"]
    assert "the lineage calls the parents a, b" in warning


@pytest.mark.parametrize(("group_bytes", "processes"), [(1, 1), (1, 3), (1 << 12, 1), (1 << 30, 1)])
def test_the_same_numbers_however_the_work_is_cut(
    group_bytes: int, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.diagnostics import attribution as measuring

    monkeypatch.setattr(measuring, "CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(attribution_module, "CHUNK_ELEMENTS", 100)
    folders = write_family(tmp_path, torch.bfloat16, {})
    child = write_child(folders, "abc", True, rule("linear", EVERYTHING, weight=1.0))
    products: list[dict[str, Any]] = []
    describe = attribution_module._describe

    def watch(tensors: Any, found: Any, parents: Any) -> dict[str, Any]:
        products.append({name: (part.sums, part.changed) for name, part in found.items()})
        return describe(tensors, found, parents)

    monkeypatch.setattr(attribution_module, "_describe", watch)
    measured(child, folders, "abc", True)
    monkeypatch.setattr(attribution_module, "GROUP_BYTES", group_bytes)
    places = {name: str(folders[name]) for name in "abc"}
    attribute_checkpoint(str(child), places, str(folders["base"]), processes)
    assert products[0] == products[-1]


def test_layers_that_are_stacked_are_compared_with_those_they_came_from(tmp_path: Path) -> None:
    folders = write_family(tmp_path, torch.float32, {})
    recipe = {
        "parents": [{"name": name, "path": str(folders[name])} for name in "ab"],
        "layers": [{"a": [0, 1]}, {"a": [0, 0], "b": [1, 1]}],
        "rules": [
            {
                "where": {"components": ["mlp"], "layers": [2, 2]},
                "method": "linear",
                "parameters": {"weight": {"a": 0.25, "b": 0.75}},
            }
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge_recipe(str(tmp_path / "recipe.yaml"), str(tmp_path / "child"))
    found = measured(tmp_path / "child", folders, "ab", False)
    cells = {(c["component"], c["layer"]): c["shares"] for c in found["cells"]}
    assert cells["mlp", 0] == cells["mlp", 1] == {"a": 1.0}
    assert cells["mlp", 2] == pytest.approx({"a": 0.25, "b": 0.75}, abs=1e-5)
    with pytest.raises(BadInputError, match=r"lineage\.json.*names that they have there"):
        attribute_checkpoint(
            str(tmp_path / "child"), {"x": str(folders["a"]), "y": str(folders["b"])}
        )


@pytest.mark.parametrize("change", [
    {"tensors": "x"}, {"tensors": [{"component": "mlp", "elements": 1, "method": "ties",
     "parameters": {"weight": 3}}]}, {"parents": None}, {"recipe": []}, {"recipe": {"layers": None}},
], ids=str)  # fmt: skip
def test_a_lineage_that_is_none_is_not_read(change: dict[str, Any], tmp_path: Path) -> None:
    folders = write_family(tmp_path, torch.float32, {})
    child = write_child(folders, "ab", False, rule("linear", EVERYTHING, weight=1.0))
    wanted = measured(child, folders, "ab", False)
    lineage = {"recipe": {}, "parents": [{"name": "a"}], "tensors": []} | change
    (child / "lineage.json").write_text(json.dumps(lineage))
    assert measured(child, folders, "ab", False)["cells"] == wanted["cells"]


def test_values_that_are_no_numbers_tell_nothing(tmp_path: Path) -> None:
    folders = write_family(tmp_path, torch.float32, {})
    own = read_tensors(folders["a"])
    own["model.norm.weight"][3] = math.nan
    broken = write_checkpoint(tmp_path / "broken", own)
    parts = {p["name"]: p for p in measured(broken, folders, "ab", False)["tensors"]}
    norm = parts.pop("norm.weight")
    assert norm["shares"] is norm["explained"] is norm["residual"] is None
    assert {part["shares"]["a"] for part in parts.values()} == {1.0}


def test_a_model_of_another_family_is_no_child(tmp_path: Path) -> None:
    folders = write_family(tmp_path, torch.float32, {})
    stranger = write_checkpoint(tmp_path / "stranger", {"model.norm.weight": torch.ones(3)})
    with pytest.raises(BadInputError, match="no tensor of the name and shape"):
        measured(stranger, folders, "ab", False)


def test_an_attribution_is_taken_up_again(tmp_path: Path) -> None:
    """A campaign that is killed after the child was published measures nothing twice."""
    folders = write_family(tmp_path, torch.float32, {})
    merger = open_merger({name: folders[name] for name in "ab"})
    store = FolderStore(tmp_path / "child")
    recipe = recipe_for(merger, rule("linear", EVERYTHING, weight=1.0))
    writer = ChildWriter.create(recipe, merger.parents, None, store)
    calls = local_calls(merger, store)
    writer.write(calls)
    found = attribute_written(writer, calls)
    writer.publish({ATTRIBUTION_FILE: json.dumps(found).encode()})

    class Refusing:
        def group_bytes(self, total: int) -> int:
            raise AssertionError

        def each(self, method: str, arguments: list[tuple[Any, ...]]) -> Any:
            raise AssertionError

    assert attribute_written(writer, Refusing()) == found


def test_a_father_that_is_a_child_does_not_hand_on_his_attribution(tmp_path: Path) -> None:
    folders = write_family(tmp_path, torch.float32, {})
    (folders["a"] / ATTRIBUTION_FILE).write_text("{}")
    child = write_child(folders, "ab", False, rule("linear", EVERYTHING, weight=1.0))
    assert ATTRIBUTION_FILE in open_checkpoint(str(folders["a"])).companions
    assert not (child / ATTRIBUTION_FILE).exists()


@pytest.mark.parametrize("given", [["a"], ["a="], ["=b"], ["a=x", "a=y"], ["base=x"]], ids=str)
def test_parents_need_a_name_and_a_place(given: list[str]) -> None:
    with pytest.raises(BadInputError, match="--parent"):
        named_places(given)
