"""Mother-centric ratio interpolation: the card's values at any depth, and the merge that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.config import GenomeConfig, find_shipped
from orchestrator.genomes.build import build_space
from orchestrator.mother_centric import PRESET, expand, parse_tables, ratio
from orchestrator.recipe_file import load_recipe_file
from orchestrator.single_merge import merge_recipe
from tests.checkpoint_files import described, read_tensors, to_float64, write_checkpoint
from workers.checkpoints import ArchitectureMap, open_checkpoint
from workers.errors import BadInputError
from workers.merging import ParentReference

INSIDE = {
    "self_attn.q_proj.weight": "attention",
    "mlp.down_proj.weight": "mlp",
    "input_layernorm.weight": "norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "norm",
    "lm_head.weight": "lm_head",
    "model.vision_tower.patch.weight": "vision",
    "mtp.fc.weight": "mtp",
    "rope_table": "unknown",
}
CARD_BANDS = [0.25] * 30 + [0.70] * 30 + [0.50] * 28
"""Of the layers 0-29, 30-59 and 60-87."""


def dense_map(layers: int) -> ArchitectureMap:
    shapes: dict[str, list[int]] = {name: [4, 4] for name in OUTSIDE}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": [4, 4] for name in INSIDE}
    return ArchitectureMap(
        described(shapes, {"model_type": "mistral", "num_hidden_layers": layers})
    )


def shipped() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(find_shipped("recipe", PRESET).read_text())
    return data


def ratios(layers: int, **changes: Any) -> dict[str, list[float]]:
    """Component -> the ratios of its tensors, in the order of the layers; what is outside comes first."""
    found = dense_map(layers)
    tables = parse_tables("file", shipped()[PRESET] | changes)
    ordered = sorted(found.tensors, key=lambda t: -1 if t.layer is None else t.layer)
    result: dict[str, list[float]] = {}
    for tensor in ordered:
        if not changes:
            assert ratio(tensor, layers) == tables.ratio(tensor, layers)
        result.setdefault(tensor.component, []).append(tables.ratio(tensor, layers))
    return result


def test_the_values_of_the_card_on_its_88_layers() -> None:
    assert ratios(88) == {
        "embedding": [0.0],
        "lm_head": [0.0],
        "attention": [0.5] * 88,
        "norm": [0.5] * 89,
        "mlp": CARD_BANDS,
        "vision": [0.0],
        "mtp": [0.0],
        "unknown": [0.0],
    }


@pytest.mark.parametrize(("combination", "attention", "norm"), [
    ("band", CARD_BANDS, 0.5),
    ("mean", [(0.5 + band) / 2 for band in CARD_BANDS], 0.5),
    ("product", [0.5 * band for band in CARD_BANDS], 0.5),
])  # fmt: skip
def test_other_ways_to_combine_category_and_band(
    combination: str, attention: list[float], norm: float
) -> None:
    found = ratios(88, combination=combination)
    assert found["attention"] == attention
    assert found["norm"] == [norm, *attention]  # the final one is in no band
    assert found["mlp"] == CARD_BANDS  # it has no category
    assert found["embedding"] == found["lm_head"] == found["vision"] == [0.0]


@pytest.mark.parametrize(("layers", "ends"), [(1, (1, 1)), (3, (2, 3)), (32, (11, 22)), (44, (15, 30)),
                                              (88, (30, 60)), (176, (60, 120))])  # fmt: skip
def test_bands_at_any_depth(layers: int, ends: tuple[int, int]) -> None:
    low, middle = ends
    assert ratios(layers)["mlp"] == [0.25] * low + [0.7] * (middle - low) + [0.5] * (
        layers - middle
    )


@pytest.mark.parametrize("combination", ["category", "band", "mean", "product"])
def test_the_rules_give_each_tensor_its_ratio(combination: str) -> None:
    found = dense_map(9)
    data = shipped()
    data[PRESET]["combination"] = combination
    data[PRESET]["categories"] |= {"vision": 1.0}
    tables = parse_tables("file", data[PRESET])
    rules = expand("file", data, found)["rules"]
    for tensor in found.tensors:
        wanted = tables.ratio(tensor, 9)
        matching = [
            rule
            for rule in rules
            if tensor.component in rule["where"]["components"]
            and (
                "layers" not in rule["where"]
                or tensor.layer in range(rule["where"]["layers"][0], rule["where"]["layers"][1] + 1)
            )
        ]
        if wanted == 0.0:
            assert not matching or matching[0]["parameters"] == {"source": "father"}
        elif wanted == 1.0:
            assert matching[0]["parameters"] == {"source": "mother"}
        else:
            assert matching[0]["method"] == "linear"
            assert matching[0]["parameters"]["weight"] == {"father": 1 - wanted, "mother": wanted}


@pytest.mark.parametrize("recipe", ["mother_centric", "path"])
def test_a_merge_of_any_two_parents(recipe: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    names = [*OUTSIDE, *(f"model.layers.{layer}.{name}" for layer in range(6) for name in INSIDE)]
    parents: dict[str, dict[str, torch.Tensor]] = {
        parent: {name: torch.randn(8, 4, generator=generator).bfloat16() for name in names}
        for parent in ("father", "mother")
    }
    config = {"model_type": "mistral", "num_hidden_layers": 6}
    places = {
        parent: str(write_checkpoint(tmp_path / parent, tensors, config=config))
        for parent, tensors in parents.items()
    }
    path = recipe if recipe == "mother_centric" else str(find_shipped("recipe", PRESET))
    merge_recipe(path, str(tmp_path / "child"), parents=places)
    child = read_tensors(tmp_path / "child")
    bands = [0.25, 0.25, 0.25, 0.7, 0.7, 0.5]  # 6 * 30/88 = 2.05, 6 * 60/88 = 4.09
    for name in names:
        share = 0.0
        for part, component in INSIDE.items():
            if name.endswith(part) and ".layers." in name:
                share = bands[int(name.split(".")[2])] if component == "mlp" else 0.5
        if name == "model.norm.weight":
            share = 0.5
        father, mother = (to_float64(parents[parent][name]) for parent in ("father", "mother"))
        exact = (1.0 - share) * father + share * mother
        if share == 0.0:
            assert torch.equal(child[name], parents["father"][name]), name
        else:
            error = abs(to_float64(child[name]) - exact)
            assert (error <= 2.0**-8 * abs(exact) + 1e-6).all(), name


def start_of_space(space: str) -> tuple[ArchitectureMap, dict[str, float]]:
    """The genome at which a search over two of the shipped parents begins."""
    father = ArchitectureMap(open_checkpoint("shipped:strings/reverse"))
    parents = tuple(ParentReference(letter, letter * 64) for letter in "ab")
    config = GenomeConfig(space, "linear", start=PRESET)
    found = build_space(config, father, parents, None, 0)
    return father, found.point(found.start)


def test_a_search_may_start_at_the_preset() -> None:
    father, start = start_of_space("per_layer")
    assert father.layers == 4
    wanted = {f"attn_{n}_ratio": 0.5 for n in range(4)} | {"embed_ratio": 0.0, "norm_ratio": 0.5}
    wanted |= {f"ffn_{n}_ratio": band for n, band in enumerate([0.25, 0.25, 0.7, 0.5])}
    assert start == wanted


def test_a_gene_about_many_tensors_starts_at_their_mean() -> None:
    father, start = start_of_space("darwin14")
    assert start["attn_ratio"] == 0.5
    assert start["embed_ratio"] == 0.0
    assert start["ffn_ratio"] == pytest.approx((0.25 + 0.25 + 0.7 + 0.5) / 4)
    blended = [(ratio(tensor, 4), tensor.elements) for tensor in father.tensors]
    mean = sum(share * n for share, n in blended) / sum(n for _, n in blended)
    assert start["global_ratio"] == pytest.approx(mean, abs=1e-6)
    assert start["block_0_ratio"] < start["block_2_ratio"]


def test_a_space_without_ratio_genes_has_no_such_start() -> None:
    with pytest.raises(BadInputError, match=r"genome\.start: 'mother_centric' is no start"):
        start_of_space("mri_only")


def test_places_on_the_command_line_are_checked(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"'father' has no path; give --parent father=PLACE"):
        load_recipe_file(PRESET)
    with pytest.raises(
        BadInputError, match=r"'uncle' is none of the parents \['father', 'mother'\]"
    ):
        load_recipe_file(PRESET, {"uncle": "x"})
    with pytest.raises(BadInputError, match="is no recipe that ships"):
        load_recipe_file("father_centric")
    (tmp_path / "kit.yaml").write_text("merge_method: linear\nmodels: []\n")
    with pytest.raises(BadInputError, match="not for mergekit"):
        load_recipe_file(str(tmp_path / "kit.yaml"), {"father": "x"})


def test_places_go_over_those_of_a_file(tmp_path: Path) -> None:
    recipe = {
        "parents": [{"name": "a", "path": "shipped:strings/sort"}, {"name": "b", "path": "gone"}],
        "base": "gone too",
        "rules": [{"method": "task_arithmetic", "parameters": {"weight": 0.5}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe_file(
        str(tmp_path / "recipe.yaml"), {"b": "shipped:strings/shift"}, "shipped:strings/base"
    )
    assert [parent.location.rpartition("/")[2] for parent in loaded.parents.values()] == [
        "sort",
        "shift",
    ]
    assert loaded.base is not None


@pytest.mark.parametrize(("change", "problem"), [
    ({"combination": "sum"}, "combination: 'sum' is none of"),
    ({"categories": {"ffn": 0.5}}, "categories: 'ffn' is none of"),
    ({"categories": {"mlp": 1.5}}, r"categories\.mlp: 1\.5 is not a number from 0 to 1"),
    ({"categories": {"mlp": True}}, r"categories\.mlp: True"),
    ({"bands": []}, "bands a list"),
    ({"bands": [{"until": "1/0", "ratio": 0.5}]}, r"bands\.0\.until: '1/0' is no share"),
    ({"bands": [{"until": 0.5, "ratio": 0.5}]}, "the last one at 1"),
    ({"bands": [{"until": 1, "ratio": 0.5}] * 2}, "each must end above the one before"),
    ({"more": 1}, "needs exactly the keys"),
])  # fmt: skip
def test_tables_that_are_none(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadInputError, match=problem):
        parse_tables("file", shipped()[PRESET] | change)


def test_it_is_for_two_parents_and_instead_of_rules() -> None:
    found = dense_map(2)
    with pytest.raises(BadInputError, match="for two"):
        expand("file", shipped() | {"parents": [{"name": "a"}]}, found)
    with pytest.raises(BadInputError, match="both rules and mother_centric"):
        expand("file", shipped() | {"rules": []}, found)
