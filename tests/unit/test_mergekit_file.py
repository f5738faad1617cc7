"""mergekit's YAML files: each tensor gets what mergekit's rules say, worked out by hand here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.mergekit.methods import PEER_METHODS, REQUIRED
from orchestrator.mergekit.settings import name_patterns
from orchestrator.recipe_file import RecipeFile, load_recipe_file
from orchestrator.recipe_spelling import respell
from orchestrator.single_merge import merge_recipe
from tests.families import write_family
from workers.checkpoints import ArchitectureMap, open_checkpoint
from workers.errors import BadInputError
from workers.merging import METHODS, Selector
from workers.merging.plan import Assignment, Plan, form_of

LAYERS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and two relatives of four layers, with a head of their own."""
    return [str(path) for path in write_family(tmp_path_factory.mktemp("llama"), "llama")]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(path) for path in write_family(tmp_path_factory.mktemp("experts"), "qwen3_moe")]


class ConfigFolder:
    def __init__(self, folder: Path, models: list[str]) -> None:
        self.file = folder / "merge.yaml"
        self.base, self.one, self.two = models

    def load(self, data: Any) -> RecipeFile:
        self.file.write_text(yaml.safe_dump(data, sort_keys=False))
        return load_recipe_file(str(self.file))

    def assigned(self, data: Any) -> dict[str, Assignment]:
        return assigned(self.load(data))

    def refusal(self, data: Any) -> str:
        with pytest.raises(BadInputError) as caught:
            self.load(data)
        message = str(caught.value)
        assert message.startswith(f"{self.file}: ")
        assert "\n" not in message
        return message.removeprefix(f"{self.file}: ")

    def two_models(self, **changes: Any) -> dict[str, Any]:
        """A linear merge of two with keys changed; None removes one."""
        data = {
            "models": [{"model": self.one}, {"model": self.two}],
            "merge_method": "linear",
            "parameters": {"weight": 1},
        }
        return {key: value for key, value in (data | changes).items() if value is not None}


@pytest.fixture
def configs(tmp_path: Path, models: list[str]) -> ConfigFolder:
    return ConfigFolder(tmp_path, models)


def assigned(loaded: RecipeFile) -> dict[str, Assignment]:
    maps = {name: ArchitectureMap(parent) for name, parent in loaded.parents.items()}
    base = ArchitectureMap(loaded.base) if loaded.base else None
    return Plan(maps, base, form_of(loaded.recipe)).assign(loaded.recipe)


def values_of(ways: dict[str, Assignment], parameter: str, part: str) -> list[Any]:
    """A parameter's values for the tensor `part` of each layer."""
    names = [name for name in ways if name.startswith("layers.") and part in name]
    names.sort(key=lambda name: int(name.split(".")[1]))
    return [ways[name].values[parameter] for name in names]


OUTSIDE = ("embed_tokens.weight", "norm.weight", "lm_head.weight")


# -- who takes part --------------------------------------------------------------------------


def test_linear_has_a_weight_per_model_and_no_base(configs: ConfigFolder) -> None:
    loaded = configs.load(
        {
            "models": [
                {"model": configs.one, "parameters": {"weight": 0.75}},
                {"model": configs.two, "parameters": {"weight": 0.25}},
            ],
            "merge_method": "linear",
            "dtype": "float16",
        }
    )
    assert loaded.base is None
    assert [parent.location for parent in loaded.parents.values()] == [configs.one, configs.two]
    assert loaded.recipe.dtype == "F16"
    for way in assigned(loaded).values():
        assert way.method.name == "linear"
        assert way.values == {"weight": {"m1": 0.75, "m2": 0.25}, "normalize": 1.0}


@pytest.mark.parametrize("listed", [True, False])
def test_linear_counts_the_base_model_as_one_more_model(
    configs: ConfigFolder, listed: bool
) -> None:
    data = configs.two_models(base_model=configs.base)
    if listed:
        data["models"].append({"model": configs.base, "parameters": {"weight": 3}})
    loaded = configs.load(data)
    assert next(iter(loaded.parents.values())).location == configs.base
    for way in assigned(loaded).values():
        weight = 3.0 if listed else 1.0
        assert way.values["weight"] == {"m0": weight, "m1": 1.0, "m2": 1.0}


def test_linear_with_a_base_model_without_weight_is_refused(configs: ConfigFolder) -> None:
    data = configs.two_models(base_model=configs.base, parameters=None)
    for model in data["models"]:
        model["parameters"] = {"weight": 1}
    assert "'weight' for 'm0' is missing" in configs.refusal(data)


@pytest.mark.parametrize("listed", [True, False])
def test_a_method_of_differences_does_not_see_its_base(configs: ConfigFolder, listed: bool) -> None:
    models = [
        {"model": configs.one, "parameters": {"weight": 1, "density": 0.5}},
        {"model": configs.two, "parameters": {"weight": 0.5}},
    ]
    if listed:
        models.insert(1, {"model": configs.base})
    loaded = configs.load({"models": models, "merge_method": "ties", "base_model": configs.base})
    assert loaded.base is not None
    assert loaded.base.location == configs.base
    assert next(iter(loaded.parents.values())).location == configs.base, "config and tokenizer"
    assert loaded.warnings == ()
    for way in assigned(loaded).values():
        assert way.parents == ("m1", "m2")
        assert way.values["weight"] == {"m1": 1.0, "m2": 0.5}
        assert way.values["density"] == {"m1": 0.5, "m2": 1.0}, "mergekit keeps all by default"
        assert way.values["normalize"] == 1.0


def test_the_weight_of_a_base_has_no_effect_and_is_said_to_have_none(configs: ConfigFolder) -> None:
    models = [
        {"model": configs.base, "parameters": {"weight": 9}},
        {"model": configs.one, "parameters": {"weight": 1}},
    ]
    loaded = configs.load(
        {"models": models, "merge_method": "task_arithmetic", "base_model": configs.base}
    )
    assert assigned(loaded)["norm.weight"].values["weight"] == {"m1": 1.0}
    assert any("models.0.parameters" in warning for warning in loaded.warnings)


def test_only_a_base_is_the_result_itself(configs: ConfigFolder) -> None:
    data = {
        "models": [{"model": configs.base}],
        "merge_method": "task_arithmetic",
        "base_model": configs.base,
    }
    ways = configs.assigned(data)
    assert {(way.method.name, way.parents) for way in ways.values()} == {("passthrough", ("m0",))}


@pytest.mark.parametrize("base", ["one", "two"])
def test_slerp_begins_at_the_base(configs: ConfigFolder, base: str) -> None:
    data = configs.two_models(
        merge_method="slerp", base_model=getattr(configs, base), parameters={"t": 0.25}
    )
    wanted = ("m1", "m2") if base == "one" else ("m2", "m1")
    for way in configs.assigned(data).values():
        assert (way.method.name, way.parents, way.values) == ("slerp", wanted, {"t": 0.25})


def test_a_model_may_be_named_in_every_way_that_mergekit_has(configs: ConfigFolder) -> None:
    data = configs.two_models(
        models=[
            {"model": {"model": {"path": configs.one}}},
            {"model": {"path": configs.two, "revision": None}},
        ]
    )
    assert [p.location for p in configs.load(data).parents.values()] == [configs.one, configs.two]


# -- which value a tensor gets ---------------------------------------------------------------


def test_a_gradient_runs_over_the_layers_and_its_first_value_is_outside(
    configs: ConfigFolder,
) -> None:
    ways = configs.assigned(configs.two_models(parameters={"weight": [1, 2, 5]}))
    # Four layers at 0, 1/3, 2/3 and 1; three points at 0, 1/2 and 1.
    wanted = [1.0, 1 + 2 / 3, 3.0, 5.0]
    assert values_of(ways, "weight", "q_proj") == [
        {"m1": pytest.approx(value), "m2": pytest.approx(value)} for value in wanted
    ]
    for name in OUTSIDE:
        assert ways[name].values["weight"] == {"m1": 1.0, "m2": 1.0}


def test_the_first_filter_that_is_part_of_the_name_counts(configs: ConfigFolder) -> None:
    """The example of mergekit's own documentation."""
    data = {
        "slices": [
            {
                "sources": [
                    {"model": configs.one, "layer_range": [0, LAYERS]},
                    {"model": configs.two, "layer_range": [0, LAYERS]},
                ]
            }
        ],
        "merge_method": "slerp",
        "base_model": configs.one,
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
        "dtype": "bfloat16",
    }
    ways = configs.assigned(data)
    # Four layers on five points: positions 0, 4/3, 8/3 and 4.
    attention = [0.0, 0.5 - 0.2 / 3, 0.3 + 0.4 * 2 / 3, 1.0]
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert values_of(ways, "t", part) == pytest.approx(attention)
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert values_of(ways, "t", part) == pytest.approx([1 - value for value in attention])
    assert values_of(ways, "t", "layernorm") == [0.5] * 8
    assert [ways[name].values["t"] for name in OUTSIDE] == [0.5] * 3


def test_four_levels_are_asked_one_after_the_other(configs: ConfigFolder) -> None:
    data = {
        "slices": [
            {
                "sources": [
                    {
                        "model": configs.one,
                        "layer_range": [0, 2],
                        "parameters": {"weight": [{"filter": "q_proj", "value": 1}]},
                    },
                    {"model": configs.two, "layer_range": [0, 2]},
                ],
                "parameters": {"weight": {"filter": "self_attn", "value": 2}},
            },
            {
                "sources": [
                    {"model": configs.one, "layer_range": [2, 4]},
                    {"model": configs.two, "layer_range": [2, 4], "parameters": {"weight": 4}},
                ],
                "parameters": {"normalize": False},
            },
        ],
        "merge_method": "linear",
        "parameters": {"weight": 3},
    }
    loaded = configs.load(data)
    assert loaded.recipe.layers == (), "each layer stays where it is"
    ways = assigned(loaded)
    assert values_of(ways, "weight", "q_proj") == [
        {"m1": 1.0, "m2": 2.0},
        {"m1": 1.0, "m2": 2.0},
        {"m1": 3.0, "m2": 4.0},
        {"m1": 3.0, "m2": 4.0},
    ]
    assert values_of(ways, "weight", "k_proj")[:2] == [{"m1": 2.0, "m2": 2.0}] * 2
    assert values_of(ways, "weight", "mlp.up_proj")[:2] == [{"m1": 3.0, "m2": 3.0}] * 2
    assert values_of(ways, "normalize", "q_proj") == [1.0, 1.0, 0.0, 0.0]
    assert ways["embed_tokens.weight"].values == {
        "weight": {"m1": 3.0, "m2": 3.0},
        "normalize": 1.0,
    }
    for name in ("norm.weight", "lm_head.weight"):
        assert ways[name].values == {"weight": {"m1": 3.0, "m2": 4.0}, "normalize": 0.0}


def test_a_gradient_over_one_layer_is_its_last_value(configs: ConfigFolder) -> None:
    data = {
        "slices": [
            {
                "sources": [
                    {"model": model, "layer_range": [n, n + 1]}
                    for model in (configs.one, configs.two)
                ]
            }
            for n in range(LAYERS)
        ],
        "merge_method": "linear",
        "parameters": {"weight": [1, 2]},
    }
    ways = configs.assigned(data)
    assert values_of(ways, "weight", "q_proj") == [{"m1": 2.0, "m2": 2.0}] * LAYERS
    assert ways["lm_head.weight"].values["weight"] == {"m1": 1.0, "m2": 1.0}


def test_a_gradient_of_flags_takes_one_of_them_in_each_layer(configs: ConfigFolder) -> None:
    data = configs.two_models(parameters={"weight": 1, "normalize": [True, False, "true"]})
    ways = configs.assigned(data)
    # Entry floor(t * 2) at t = 0, 1/3, 2/3 and 1.
    assert values_of(ways, "normalize", "q_proj") == [1.0, 1.0, 0.0, 1.0]
    assert [ways[name].values["normalize"] for name in OUTSIDE] == [1.0] * 3


def test_numbers_may_be_texts_and_flags(configs: ConfigFolder) -> None:
    ways = configs.assigned(configs.two_models(parameters={"weight": ["5e-1", True]}))
    assert values_of(ways, "weight", "q_proj")[0] == {"m1": 0.5, "m2": 0.5}
    assert values_of(ways, "weight", "q_proj")[-1] == {"m1": 1.0, "m2": 1.0}


def test_a_filter_is_plain_text(configs: ConfigFolder) -> None:
    weight = [
        {"filter": "*proj", "value": 5},
        {"filter": "q_pro?", "value": 6},
        {"filter": "[kq]_proj", "value": 7},
        {"filter": "layers.1.", "value": 1},
        {"filter": "*", "value": 2},
        {"value": 3},
    ]
    ways = configs.assigned(configs.two_models(parameters={"weight": weight}))
    assert [value["m1"] for value in values_of(ways, "weight", "q_proj")] == [2.0, 1.0, 2.0, 2.0]


def test_filters_may_match_nothing_in_the_child(configs: ConfigFolder, tmp_path: Path) -> None:
    """As in mergekit; and what `darwin recipe` makes of such a file can be merged, too."""
    source = {"model": configs.one, "layer_range": [0, 2]}
    data = {
        "slices": [{"sources": [source, source | {"model": configs.two}]}],
        "merge_method": "linear",
        "parameters": {
            "weight": [
                {"filter": "no_such", "value": 5},
                {"filter": f"layers.{LAYERS - 1}.", "value": 6},  # cut off
                {"filter": "q_proj", "value": 7},
                {"value": 1},
            ],
            # Each layer has its own case, and the filter is of one of them alone.
            "normalize": [{"filter": "layers.1.", "value": [True, False]}, {"value": True}],
        },
    }
    ways = configs.assigned(data)
    assert [value["m1"] for value in values_of(ways, "weight", "q_proj")] == [7.0, 7.0]
    assert values_of(ways, "normalize", "q_proj") == [1.0, 0.0]
    (tmp_path / "own.yaml").write_text(respell(str(configs.file)))
    assert assigned(load_recipe_file(str(tmp_path / "own.yaml"))) == ways


def test_experts_are_known_by_their_fused_names(tmp_path: Path, experts: list[str]) -> None:
    weight = [
        {"filter": "gate_proj", "value": 5},
        {"filter": "experts.1.", "value": 6},
        {"filter": "gate_up_proj", "value": 1},
        {"filter": "experts", "value": 2},
        {"filter": ".weight", "value": 3},
    ]
    configs = ConfigFolder(tmp_path, experts)
    ways = configs.assigned(configs.two_models(parameters={"weight": weight}))
    for part, wanted in [
        ("experts.1.gate_proj", 1.0),
        ("experts.1.up_proj", 1.0),
        ("experts.1.down_proj", 2.0),
        ("mlp.gate.weight", 3.0),
        ("q_proj", 3.0),
    ]:
        assert [value["m1"] for value in values_of(ways, "weight", part)] == [wanted] * LAYERS, part


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("block_sparse_moe", {"router", "expert"}),
        ("input_linear", {"expert", "shared_expert"}),  # that of shared_mlp, too
        ("router", {"router"}),
        ("experts", set()),
    ],
)
def test_experts_that_are_stored_as_one_tensor_are_known_by_its_name(
    text: str, reached: set[str], tmp_path: Path
) -> None:
    """Of Granite mergekit knows `block_sparse_moe.input_linear.weight`, as it is stored."""
    family = write_family(tmp_path / "granite", "granitemoehybrid")
    father = ArchitectureMap(open_checkpoint(str(family[1])))
    patterns = name_patterns(text, father)
    found = {t for t in father.tensors if patterns and Selector(names=tuple(patterns)).matches(t)}
    assert {tensor.component for tensor in found} == reached
    assert found == {tensor for tensor in father.tensors if text in tensor.stored}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mlp", {"mlp.gate", "gate_proj", "up_proj", "down_proj"}),
        ("block_sparse_moe", set()),
        ("gate_up_proj", {"gate_proj", "up_proj"}),
        ("mlp.gate.", {"mlp.gate"}),
        ("w2", set()),
    ],
)
def test_mixtral_is_known_by_the_names_it_has_in_memory(
    text: str, parts: set[str], tmp_path: Path
) -> None:
    """mergekit's own: `mlp.gate.weight` and `mlp.experts.gate_up_proj`, though neither is stored so."""
    father = ArchitectureMap(open_checkpoint(str(write_family(tmp_path / "m", "mixtral")[0])))
    patterns = name_patterns(text, father)
    found = {
        t.name for t in father.tensors if patterns and Selector(names=tuple(patterns)).matches(t)
    }
    network = {t.name for t in father.tensors if t.component in ("router", "expert")}
    assert found == {name for name in network if any(f"{part}." in name for part in parts)}


def test_a_filter_that_matches_nothing_is_told_of(configs: ConfigFolder) -> None:
    weight = [{"filter": "self_atn", "value": 5}, {"filter": "self_attn", "value": 2}, {"value": 1}]
    (warning,) = configs.load(configs.two_models(parameters={"weight": weight})).warnings
    assert "parameter 'weight': the filter 'self_atn' is in the name of no tensor of" in warning


def test_a_key_that_stands_twice_is_refused(configs: ConfigFolder) -> None:
    configs.file.write_text(f"merge_method: linear\nmodels: [{configs.one}]\nmerge_method: slerp\n")
    with pytest.raises(BadInputError, match=r"merge.yaml: .*line 3: the key 'merge_method' stands"):
        load_recipe_file(str(configs.file))


# -- stacked layers --------------------------------------------------------------------------


def test_layers_are_stacked(configs: ConfigFolder) -> None:
    data = {
        "slices": [
            {"sources": [{"model": configs.one, "layer_range": [0, 3]}]},
            {"sources": [{"model": configs.two, "layer_range": [1, 4]}]},
        ],
        "merge_method": "passthrough",
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    loaded = configs.load(data)
    assert loaded.recipe.layers == ({"m1": (0, 2)}, {"m2": (1, 3)})
    assert loaded.recipe.dtype == "BF16"
    ways = assigned(loaded)
    assert values_of(ways, "source", "q_proj") == ["m1"] * 3 + ["m2"] * 3
    assert [ways[name].values["source"] for name in OUTSIDE] == ["m1", "m2", "m2"]


def test_a_model_stacked_on_itself_is_one_parent(configs: ConfigFolder) -> None:
    data = {
        "slices": [
            {"sources": [{"model": configs.one, "layer_range": span}]} for span in ([0, 3], [1, 4])
        ],
        "merge_method": "passthrough",
    }
    loaded = configs.load(data)
    assert list(loaded.parents) == ["m1"]
    assert loaded.recipe.layers == ({"m1": (0, 2)}, {"m1": (1, 3)})


def test_a_stack_of_differences_names_the_layers_of_its_base(configs: ConfigFolder) -> None:
    data = {
        "slices": [
            {
                "sources": [
                    {"model": configs.one, "layer_range": [0, 2], "parameters": {"weight": 1}},
                    {"model": configs.base, "layer_range": [1, 3]},
                ]
            }
        ],
        "merge_method": "task_arithmetic",
        "base_model": configs.base,
    }
    loaded = configs.load(data)
    assert loaded.recipe.layers == ({"m1": (0, 1), "base": (1, 2)},)
    maps = {name: ArchitectureMap(parent) for name, parent in loaded.parents.items()}
    assert loaded.base is not None
    plan = Plan(maps, ArchitectureMap(loaded.base), form_of(loaded.recipe))
    assert len(plan.assign(loaded.recipe)) == 2 * 9 + len(OUTSIDE)
    tensor = plan.child.by_name["layers.1.self_attn.q_proj.weight"]
    own, base = plan.source("m1", tensor), plan.source("base", tensor)
    assert own is not None
    assert base is not None
    assert (own.layer, base.layer) == (1, 2)


def test_models_of_other_depths_need_slices(configs: ConfigFolder, tmp_path: Path) -> None:
    """mergekit refuses them in `models`, too; slices say which layers are wanted."""
    sliced = {"model": configs.two, "layer_range": [0, LAYERS - 1]}
    shallow = tmp_path / "shallow"
    cut = {"slices": [{"sources": [sliced]}], "merge_method": "passthrough"}
    configs.load(cut)
    merge_recipe(str(configs.file), str(shallow))
    models = [{"model": str(shallow)}, {"model": configs.one}]
    data = {"models": models, "merge_method": "linear", "parameters": {"weight": 1}}
    with pytest.raises(BadInputError, match=rf"m1 .*has {LAYERS} layers"):
        configs.assigned(data)
    sources = [part | {"layer_range": [0, LAYERS - 1]} for part in models]
    ways = configs.assigned(data | {"models": None, "slices": [{"sources": sources}]})
    assert values_of(ways, "weight", "q_proj") == [{"shallow": 1.0, "m1": 1.0}] * (LAYERS - 1)


def test_a_filter_with_a_number_is_refused_where_layers_move(configs: ConfigFolder) -> None:
    data = {
        "slices": [
            {"sources": [{"model": configs.one, "layer_range": [0, 2]}]},
            {
                "sources": [
                    {
                        "model": configs.two,
                        "layer_range": [1, 3],
                        "parameters": {"weight": {"filter": "layers.1.", "value": 2}},
                    }
                ]
            },
        ],
        "merge_method": "linear",
        "parameters": {"weight": 1},
    }
    assert "'layers.1.'" in configs.refusal(data)


# -- the child's form ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, "BF16"),
        ({"dtype": "torch.float16"}, "F16"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "BF16"),
        ({"out_dtype": "float32"}, "F32"),
    ],
)
def test_the_output_dtype(configs: ConfigFolder, keys: dict[str, str], dtype: str | None) -> None:
    assert configs.load(configs.two_models(**keys)).recipe.dtype == dtype


def test_whose_vocabulary_the_child_has(configs: ConfigFolder) -> None:
    def vocabulary(**keys: Any) -> tuple[str | None, list[str]]:
        loaded = configs.load(configs.two_models(**keys))
        return loaded.recipe.vocabulary, list(loaded.parents)

    assert vocabulary() == (None, ["m1", "m2"])
    assert vocabulary(tokenizer_source="union") == ("union", ["m1", "m2"])
    assert vocabulary(tokenizer={"source": "union", "tokens": {}}) == ("union", ["m1", "m2"])
    assert vocabulary(tokenizer_source="base") == ("m1", ["m1", "m2"])
    assert vocabulary(tokenizer_source="base", base_model=configs.two)[0] == "m2"
    assert vocabulary(tokenizer_source=configs.two) == ("m2", ["m1", "m2"])
    assert vocabulary(tokenizer={"source": configs.base}) == ("m0", ["m1", "m2", "m0"])


def test_a_model_that_lends_only_its_tokens_is_not_merged(configs: ConfigFolder) -> None:
    ways = configs.assigned(configs.two_models(tokenizer_source=configs.base))
    assert {way.parents for way in ways.values()} == {("m1", "m2")}


def test_a_chat_template_becomes_a_file_of_the_child(configs: ConfigFolder, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert configs.load(configs.two_models(chat_template=template)).files == {
        "chat_template.jinja": template.encode()
    }
    assert configs.load(configs.two_models(chat_template="auto")).files == {}
    for model in (configs.one, configs.two):
        copy = tmp_path / Path(model).name
        copy.mkdir()
        for file in Path(model).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    (tmp_path / "m2" / "chat_template.jinja").write_text(template)
    copies = [{"model": str(tmp_path / name)} for name in ("m1", "m2")]
    loaded = configs.load(configs.two_models(models=copies, chat_template="auto"))
    assert loaded.files == {"chat_template.jinja": template.encode()}


def test_parents_get_short_names_of_their_own(configs: ConfigFolder, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a/base", "b/base", "union", "x y")]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(configs.one)
    data = configs.two_models(models=[{"model": str(place)} for place in places])
    assert list(configs.load(data).parents) == ["a-base", "b-base", f"{tmp_path.name}-union", "x-y"]


# -- what is refused -------------------------------------------------------------------------

SOURCES = [{"model": "A", "layer_range": [0, 2]}, {"model": "B", "layer_range": [0, 2]}]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"merge_method": None}, "merge_method"),
        ({"merge_method": "moe"}, "merge_method: 'moe'"),
        ({"merge_method": ["linear"]}, "merge_method"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "base_model"),
        ({"models": None}, "models"),
        ({"models": {}}, "models"),
        ({"models": "A"}, "models"),
        ({"models": ["A"]}, "models.0"),
        ({"models": [{"model": "A", "weight": 1}]}, "models.0.weight"),
        ({"models": [{"model": 5}]}, "models.0.model"),
        ({"models": [{"model": "A"}, {"model": "A"}]}, "'A' is given twice"),
        ({"models": [{"model": "A+B+C"}]}, "models.0.model"),
        ({"models": [{"model": "./A@main"}]}, "models.0.model"),
        ({"models": [{"model": {"model": "A", "override_architecture": "B"}}]},
         "models.0.model.override_architecture"),
        ({"models": [{"model": {"model": "A", "x": "B"}}]}, "models.0.model.x"),
        ({"slices": [{"sources": SOURCES}]}, "either models or slices"),
        ({"models": None, "slices": [{"sources": SOURCES, "x": 1}]}, "slices.0.x"),
        ({"models": None, "slices": [{"sources": SOURCES, "residual_weight": 1}]},
         "slices.0.residual_weight"),
        ({"models": None, "slices": [{"sources": []}]}, "slices.0.sources"),
        ({"models": None, "slices": [{"sources": [{"model": "A"}]}]}, "slices.0.sources.0.layer_range"),
        ({"models": None, "slices": [{"sources": [{"model": "A", "layer_range": [2, 2]}]}]},
         "slices.0.sources.0.layer_range"),
        ({"models": None, "slices": [{"sources": [*SOURCES, {"model": "C", "layer_range": [0, 3]}]}]},
         "slices.0.sources"),
        ({"models": None, "modules": {"text": {}}}, "modules"),
        ({"name": "x"}, "name"),
        ({"dtype": "float64"}, "dtype: 'float64'"),
        ({"dtype": 16}, "dtype: 16"),
        ({"out_dtype": "int64"}, "out_dtype: 'int64'"),
        ({"parameters": [1]}, "parameters"),
        ({"parameters": {"weigth": 1}}, "parameters.weigth"),
        ({"parameters": {"weight": "much"}}, "parameters.weight"),
        ({"parameters": {"weight": float("nan")}}, "parameters.weight"),
        ({"parameters": {"weight": 10**400}}, "parameters.weight"),
        ({"parameters": {"weight": None}}, "parameters.weight"),
        ({"parameters": {"weight": []}}, "parameters.weight"),
        ({"parameters": {"weight": [1, {"value": 2}]}}, "parameters.weight.0"),
        ({"parameters": {"weight": [{"filter": "x"}]}}, "parameters.weight.0"),
        ({"parameters": {"weight": [{"filter": 5, "value": 1}]}}, "parameters.weight.0.filter"),
        ({"parameters": {"weight": [{"value": [{"value": 1}]}]}}, "parameters.weight.0.value"),
        ({"parameters": {"weight": 1, "normalize": 2}}, "parameters.normalize"),
        ({"parameters": {"weight": 1, "normalize": "maybe"}}, "parameters.normalize"),
        ({"models": [{"model": "A", "parameters": {"normalize": True}}]},
         "models.0.parameters.normalize"),
        ({"tokenizer_source": "base", "tokenizer": {"source": "base"}}, "tokenizer"),
        ({"tokenizer_source": 5}, "tokenizer_source"),
        ({"tokenizer": "union"}, "tokenizer"),
        ({"tokenizer": {"pad_to_multiple_of": 8}}, "tokenizer.pad_to_multiple_of"),
        ({"tokenizer": {"tokens": {"<x>": {"source": "A"}}}}, "tokenizer.tokens.<x>"),
        ({"tokenizer": {"sauce": "A"}}, "tokenizer.sauce"),
        ({"chat_template": "chatml"}, "chat_template: 'chatml'"),
        ({"chat_template": 5}, "chat_template"),
        ({"merge_method": "passthrough", "parameters": None}, "passthrough takes one model"),
        ({"merge_method": "karcher", "parameters": {"max_iter": 1.5}}, "max_iter"),
        ({"merge_method": "karcher", "parameters": {"max_iter": [5, 10]}}, "max_iter"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(
    configs: ConfigFolder, changes: dict[str, Any], key: str
) -> None:
    if changes.get("merge_method") in ("karcher",) and "karcher" not in METHODS:
        pytest.skip("no such method")
    assert key in configs.refusal(configs.two_models(**changes))


def test_a_value_that_its_method_refuses_is_named_without_a_rule_of_ours(
    configs: ConfigFolder,
) -> None:
    data = configs.two_models(
        merge_method="ties", base_model=configs.base, parameters={"weight": 1, "density": 2}
    )
    message = configs.refusal(data)
    assert message.startswith("method ties: parameter 'density' for ")
    assert message.endswith(": 2.0 is outside [0, 1]")


def test_a_base_must_be_among_the_sources_of_a_slice(configs: ConfigFolder) -> None:
    data = {
        "slices": [{"sources": [{"model": configs.one, "layer_range": [0, 4]}]}],
        "merge_method": "task_arithmetic",
        "base_model": configs.base,
        "parameters": {"weight": 1},
    }
    assert configs.refusal(data).startswith("slices.0: the base_model ")


def test_slices_may_have_bases_of_their_own_where_the_base_is_merged(configs: ConfigFolder) -> None:
    def slices(method: str, **parameters: Any) -> dict[str, Any]:
        return {
            "slices": [
                {
                    "sources": [
                        {"model": model, "layer_range": span}
                        for model in (configs.one, configs.two)
                    ],
                    "base_model": base,
                }
                for span, base in (([0, 2], configs.one), ([2, 4], configs.two))
            ],
            "merge_method": method,
            "parameters": parameters,
        }

    ways = configs.assigned(slices("slerp", t=0.25))
    seen = [ways[f"layers.{n}.mlp.up_proj.weight"].parents for n in range(LAYERS)]
    assert seen == [("m1", "m2")] * 2 + [("m2", "m1")] * 2
    assert [ways[name].parents[0] for name in OUTSIDE] == ["m1", "m2", "m2"]
    assert "different base_models" in configs.refusal(slices("task_arithmetic", weight=1))


def test_a_method_that_degenerates_is_merged_with_a_warning(configs: ConfigFolder) -> None:
    data = configs.two_models(
        models=[{"model": configs.one}], merge_method="ties", base_model=configs.base
    )
    assert METHODS["ties"].least_task_vectors == 2
    (warning,) = configs.load(data).warnings
    assert warning.startswith(f"{configs.file}: method ties needs 2 parents ")


# -- examples as they are found --------------------------------------------------------------

EXAMPLES = """
models:
  - model: ONE
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: TWO
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: THREE
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: BASE
parameters:
  normalize: true
  int8_mask: true
dtype: float16
---
models:
  - model: ONE
    # no parameters necessary for base model
  - model: TWO
    parameters: {density: 0.53, weight: 0.4}
  - model: THREE
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: ONE
parameters:
  int8_mask: true
dtype: bfloat16
---
slices:
  - sources:
      - model: ONE
        layer_range: [0, 3]
  - sources:
      - model: TWO
        layer_range: [1, 4]
merge_method: passthrough
dtype: float16
---
models:
  - model: ONE
    parameters: {weight: 1.0}
  - model: TWO
    parameters: {weight: 0.3}
  - model: THREE
    parameters: {weight: 0.5}
merge_method: linear
dtype: float16
---
slices:
  - sources:
      - model: ONE
        layer_range: [0, 4]
      - model: TWO
        layer_range: [0, 4]
merge_method: slerp
base_model: ONE
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
---
merge_method: task_arithmetic
base_model: BASE
models:
  - model: ONE
    parameters: {weight: 0.6}
  - model: TWO
    parameters: {weight: 0.4}
parameters: {lambda: 1.1, normalize: false}
---
merge_method: model_stock
base_model: BASE
models: [{model: ONE}, {model: TWO}, {model: THREE}]
parameters: {filter_wise: false}
tokenizer_source: base
---
merge_method: della
base_model: BASE
models:
  - model: ONE
    parameters: {weight: 0.5, density: 0.6, epsilon: 0.1}
  - model: TWO
    parameters: {weight: 0.5, density: 0.4, epsilon: 0.1}
parameters: {lambda: 1.0, rescale: true}
---
merge_method: breadcrumbs
base_model: BASE
models:
  - model: ONE
    parameters: {weight: 0.5, density: 0.9, gamma: 0.01}
  - model: TWO
    parameters: {weight: 0.5, density: 0.9, gamma: 0.01}
---
merge_method: sce
base_model: BASE
models: [{model: ONE}, {model: TWO}]
parameters: {select_topk: 0.8}
---
merge_method: nuslerp
models:
  - model: ONE
    parameters: {weight: 0.3}
  - model: TWO
    parameters: {weight: 0.7}
parameters: {nuslerp_flatten: false}
---
merge_method: multislerp
models:
  - model: ONE
    parameters: {weight: 0.3}
  - model: TWO
    parameters: {weight: 0.7}
---
merge_method: karcher
models: [{model: ONE}, {model: TWO}, {model: THREE}]
parameters: {max_iter: 10, tol: 1e-5}
---
merge_method: nearswap
base_model: ONE
models: [{model: ONE}, {model: TWO}]
parameters: {t: 0.0001}
---
merge_method: arcee_fusion
base_model: ONE
models: [{model: ONE}, {model: TWO}]
---
merge_method: ramplus_tl
base_model: BASE
models: [{model: ONE}, {model: TWO}]
parameters: {r: 0.2, alpha: 0.3}
---
merge_method: passthrough
slices:
  - sources:
      - model: ONE
        layer_range: [0, 2]
  - sources:
      - model: ONE
        layer_range: [1, 3]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0.0}
            - {value: 1.0}
  - sources:
      - model: ONE
        layer_range: [3, 4]
"""


@pytest.fixture(scope="module")
def third(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another name of a model."""
    place = tmp_path_factory.mktemp("third") / "three"
    place.symlink_to(models[2])
    return str(place)


def filled_in(text: str, models: list[str], third: str) -> str:
    for word, place in zip(("BASE", "ONE", "TWO", "THREE"), (*models, third), strict=True):
        text = text.replace(f"model: {word}", f"model: {place}")
    return text


@pytest.mark.parametrize(
    "text", EXAMPLES.split("---"), ids=lambda t: yaml.safe_load(t)["merge_method"]
)
def test_examples_as_they_are_found_are_read_and_round_trip(
    configs: ConfigFolder, models: list[str], third: str, text: str, tmp_path: Path
) -> None:
    data = yaml.safe_load(filled_in(text, models, third))
    loaded = configs.load(data)
    wanted = assigned(loaded)
    assert {name.partition(".")[0] for name in wanted} == {
        "layers",
        "embed_tokens",
        "norm",
        "lm_head",
    }
    own = tmp_path / "own.yaml"
    own.write_text(respell(str(configs.file), "darwin"))
    assert load_recipe_file(str(own)).recipe.id == loaded.recipe.id
    back = tmp_path / "back.yaml"
    back.write_text(respell(str(own), "mergekit"))
    again = assigned(load_recipe_file(str(back)))
    assert {n: (w.method.name, w.values, w.parents) for n, w in again.items()} == {
        n: (w.method.name, w.values, w.parents) for n, w in wanted.items()
    }


def test_the_example_of_the_docs_is_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    (example,) = re.findall(r"```yaml\n(# mergekit\.yaml.*?)```", text, flags=re.S)
    file = tmp_path / "mergekit.yaml"
    file.write_text(example)
    ways = assigned(load_recipe_file(str(file)))
    layers = len(values_of(ways, "density", "q_proj"))
    assert layers > 1
    assert values_of(ways, "density", "q_proj")[-1] == {"reverse": 0.5, "sort": 1.0}
    assert values_of(ways, "weight", "up_proj") == [{"reverse": 1.0, "sort": 0.7}] * layers
    assert ways["norm.weight"].values["density"] == {"reverse": 0.9, "sort": 1.0}
    assert ways["norm.weight"].values["rescale"] == "l1"


def test_rescaling_is_what_mergekit_calls_so(configs: ConfigFolder) -> None:
    data = configs.two_models(merge_method="dare_ties", base_model=configs.base)
    assert configs.assigned(data)["norm.weight"].values["rescale"] == "l1"
    data["parameters"]["rescale"] = False
    assert configs.assigned(data)["norm.weight"].values["rescale"] == "none"
    data["merge_method"] = "ties"
    del data["parameters"]["rescale"]
    assert configs.assigned(data)["norm.weight"].values["rescale"] == "none"


# -- from ours to mergekit's -----------------------------------------------------------------


class OwnRecipes(ConfigFolder):
    def respelt(self, *rules: dict[str, Any], **keys: Any) -> str:
        data = {
            "parents": [{"name": "a", "path": self.one}, {"name": "b", "path": self.two}],
            "rules": list(rules),
        } | keys
        self.file.write_text(yaml.safe_dump(data, sort_keys=False))
        return respell(str(self.file))

    def refused(self, *rules: dict[str, Any], **keys: Any) -> str:
        with pytest.raises(BadInputError) as caught:
            self.respelt(*rules, **keys)
        return str(caught.value).removeprefix(f"{self.file}: ")


@pytest.fixture
def own(tmp_path: Path, models: list[str]) -> OwnRecipes:
    return OwnRecipes(tmp_path, models)


def linear(weight: Any, **where: Any) -> dict[str, Any]:
    rule = {"method": "linear", "parameters": {"weight": weight}}
    return rule | ({"where": where} if where else {})


def test_rules_for_names_become_filters(own: OwnRecipes) -> None:
    data = yaml.safe_load(own.respelt(linear(2, names=["*mlp*", "*norm*"]), linear(1)))
    assert data == {
        "merge_method": "linear",
        "base_model": own.one,
        "models": [{"model": own.one}, {"model": own.two}],
        "parameters": {
            "weight": [
                {"filter": "mlp", "value": 2.0},
                {"filter": "norm", "value": 2.0},
                {"value": 1.0},
            ]
        },
    }


def test_rules_for_layers_become_slices(own: OwnRecipes) -> None:
    text = own.respelt(
        linear({"a": 1, "b": 0}, layers=[0, 1]), linear({"a": [0, 1], "b": 2}, layers=[2, 3]),
        linear({"a": 1, "b": 0}, components=["embedding"]), linear({"a": 0, "b": 2}),
    )  # fmt: skip
    data = yaml.safe_load(text)
    assert [part["sources"] for part in data["slices"]] == [
        [
            {"model": own.one, "layer_range": [0, 2], "parameters": {"weight": 1.0}},
            {"model": own.two, "layer_range": [0, 2], "parameters": {"weight": 0.0}},
        ],
        [
            {"model": own.one, "layer_range": [2, 4], "parameters": {"weight": [0.0, 1.0]}},
            {"model": own.two, "layer_range": [2, 4], "parameters": {"weight": 2.0}},
        ],
    ]


def test_what_a_file_cannot_hold_is_said_in_comments(own: OwnRecipes) -> None:
    rule = {"method": "task_arithmetic", "parameters": {"weight": 1}}
    text = own.respelt(rule, base=own.base, seed=7, shard_bytes="5GB")
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert len(comments) == 3
    assert "base_model" in comments[0]
    assert "seed 7" in comments[1]
    assert "5000000000" in comments[2]


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ([], "rules"),
        ([linear(2, components=["mlp"]), linear(1)], "rules.0.where"),
        ([linear(2, names=["layers.?.mlp*"]), linear(1)], "rules.0.where"),
        ([linear(2, names=["*mlp*"], layers=[0, 3]), linear(1)], "rules.0.where"),
        ([linear(2, layers=[1, 3]), linear(1)], "rules.1: "),
        ([linear(2, layers=[0, 3]), linear(1)], "rules.1: "),
        ([linear(2, names=["*mlp*"])], "rules: none is for lm_head.weight"),
        ([linear([1, 2])], "rules.0: "),
        ([linear(1, names=["*mlp*"]), {"method": "slerp", "parameters": {"t": 0.5}}], "rules.1: "),
        ([linear(1) | {"parents": ["a"], "where": {"names": ["*mlp*"]}}, linear(1)], "rules.1: "),
        ([linear([{"where": {"components": ["mlp"]}, "value": 2}, {"value": 1}])],
         "rules.0.parameters.weight"),
        ([{"method": "passthrough",
           "parameters": {"source": [{"where": {"names": ["*q*"]}, "value": "a"}, {"value": "b"}]}}],
         "rules.0: "),
    ],
)  # fmt: skip
def test_a_rule_that_mergekit_cannot_express_is_named(
    own: OwnRecipes, rules: list[dict[str, Any]], problem: str
) -> None:
    assert own.refused(*rules).startswith(problem)


def test_a_spelling_that_there_is_not_is_refused(own: OwnRecipes) -> None:
    own.respelt(linear(1))
    with pytest.raises(BadInputError, match="--to: 'yaml'"):
        respell(str(own.file), "yaml")


# -- anything at all -------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["model", "models", "slices", "sources", "layer_range", "merge_method", "base_model", "parameters",
     "weight", "density", "t", "normalize", "value", "filter", "dtype", "out_dtype", "tokenizer_source",
     "tokenizer", "source", "tokens", "chat_template", "modules", "path", "revision", "lora", "float16",
     "linear", "slerp", "ties", "passthrough", "task_arithmetic", "union", "base", "auto", "mlp", "*",
     "scale", "ONE", "TWO", "BASE", "ONE+TWO", "org/x@main", "", "\0"]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.integers(), st.floats(), WORDS, st.dates()
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(WORDS | st.integers(), inner, max_size=4)
    ),
    max_leaves=15,
)
NUMBERS = st.floats(0, 1) | st.sampled_from([0, 1, True, "1e-1"])
PLAIN = NUMBERS | st.lists(NUMBERS, min_size=1, max_size=4)
FILTERS = st.sampled_from(
    ["mlp", "self_attn", "*", "", "layers.1.", "norm", "no such tensor", "[", None]
)
SETTINGS = st.one_of(
    PLAIN,
    st.lists(
        st.fixed_dictionaries({"value": PLAIN}, optional={"filter": FILTERS}),
        min_size=1,
        max_size=3,
    ),
    SCALARS,
)
MODELS = st.sampled_from(["ONE", "TWO", "BASE"])


def likely(method: str) -> st.SearchStrategy[dict[str, Any]]:
    """Files of a method that are mostly sound."""
    peer = PEER_METHODS[method]
    names = {"shared": [], "input": [], "task_vector": []}  # type: dict[str, list[str]]
    for parameter in peer.parameters:
        names[parameter.scope].append(parameter.name)
    per_model = names["input"] + names["task_vector"]
    needed = {p.name: SETTINGS for p in peer.parameters if p.default is REQUIRED}
    optional = {p.name: SETTINGS for p in peer.parameters if p.default is not REQUIRED}
    parameters = st.fixed_dictionaries(needed, optional=optional)
    own = st.dictionaries(st.sampled_from(per_model), SETTINGS, max_size=2) if per_model else (
        st.just({})
    )  # fmt: skip
    most = 1 if method == "passthrough" else 3
    entry = st.fixed_dictionaries({"model": MODELS}, optional={"parameters": own})
    ranges = st.sampled_from([[0, 4], [0, 2], [2, 4], [1, 3]])

    def same_model(part: dict[str, Any]) -> str:
        return str(part["model"])

    models = st.lists(entry, min_size=1, max_size=most, unique_by=same_model)
    slices = st.tuples(models, ranges, parameters | st.none()).map(
        lambda drawn: {
            "sources": [source | {"layer_range": drawn[1]} for source in drawn[0]],
            "parameters": drawn[2],
        }
    )
    return st.one_of(
        st.fixed_dictionaries({key: value})
        for key, value in (
            ("models", models),
            ("slices", st.lists(slices, min_size=1, max_size=3)),
        )
    ).flatmap(
        lambda inputs: st.fixed_dictionaries(
            {
                "merge_method": st.just(method),
                "parameters": parameters,
                **{key: st.just(value) for key, value in inputs.items()},
                **({"base_model": MODELS} if peer.base == "required" else {}),
            },
            optional={
                "dtype": st.sampled_from(["float16", "torch.bfloat16", "int8"]),
                "tokenizer_source": st.sampled_from(["union", "base", "ONE", "nowhere"]),
            },
        )
    )


LIKELY = st.sampled_from(["linear", "slerp", "ties", "passthrough", "task_arithmetic"]).flatmap(
    likely
)


@given(data=st.one_of(LIKELY, st.dictionaries(WORDS, TREES, max_size=6), TREES))
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_tree_is_a_recipe_or_a_clear_refusal(
    configs: ConfigFolder, models: list[str], data: Any
) -> None:
    places = dict(zip(("BASE", "ONE", "TWO"), models, strict=True))

    def placed(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: placed(value) for key, value in node.items()}
        if isinstance(node, list):
            return [placed(part) for part in node]
        return places.get(node, node) if isinstance(node, str) else node

    configs.file.write_text(yaml.safe_dump(placed(data)))
    try:
        loaded = load_recipe_file(str(configs.file))
        assigned(loaded)
        respell(str(configs.file))
        respell(str(configs.file), "mergekit")
    except BadInputError:
        pass
