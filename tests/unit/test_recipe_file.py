"""Recipe files: what a person may write, and how a mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.recipe_file import RecipeFile, load_recipe_file
from tests.families import write_model
from workers.checkpoints import ArchitectureMap
from workers.errors import BadInputError
from workers.merging import Recipe
from workers.merging.plan import Plan

LINEAR: dict[str, Any] = {"method": "linear", "parameters": {"weight": 0.5}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and two relatives with a vision tower."""
    root = tmp_path_factory.mktemp("models")
    return [
        str(write_model(root / f"m{seed}", "qwen3_5_vision", seed, spread=0.02 if seed else 0.0))
        for seed in range(3)
    ]


class RecipeFolder:
    def __init__(self, folder: Path, models: list[str]) -> None:
        self.file = folder / "recipe.yaml"
        self.parents = [{"name": "a", "path": models[1]}, {"name": "b", "path": models[2]}]
        self.base = models[0]

    def load(self, **changes: Any) -> RecipeFile:
        """A recipe of one linear rule with keys changed; `None` removes one."""
        data = {"parents": self.parents, "rules": [LINEAR]} | changes
        self.file.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
        return load_recipe_file(str(self.file))

    def refusal(self, **changes: Any) -> str:
        with pytest.raises(BadInputError) as caught:
            self.load(**changes)
        message = str(caught.value)
        assert "\n" not in message
        return message


@pytest.fixture
def recipes(tmp_path: Path, models: list[str]) -> RecipeFolder:
    return RecipeFolder(tmp_path, models)


def assigned_methods(loaded: RecipeFile) -> dict[str, str]:
    maps = {name: ArchitectureMap(parent) for name, parent in loaded.parents.items()}
    plan = Plan(maps, ArchitectureMap(loaded.base) if loaded.base else None)
    return {name: way.method.name for name, way in plan.assign(loaded.recipe).items()}


# -- what is read ----------------------------------------------------------------------------


def test_a_recipe_names_its_parents_by_content(recipes: RecipeFolder) -> None:
    loaded = recipes.load(base=recipes.base, seed=7)
    assert list(loaded.parents) == ["a", "b"]
    assert [(r.name, r.fingerprint) for r in loaded.recipe.parents] == [
        (name, parent.fingerprint) for name, parent in loaded.parents.items()
    ]
    assert loaded.base is not None
    assert loaded.recipe.base is not None
    assert loaded.recipe.base.fingerprint == loaded.base.fingerprint
    assert loaded.recipe.seed == 7
    assert recipes.base not in loaded.recipe.canonical_json


def test_a_rule_without_where_is_for_all_but_what_is_carried(recipes: RecipeFolder) -> None:
    loaded = recipes.load()
    for tensor in ArchitectureMap(loaded.parents["a"]).tensors:
        carried = tensor.component in ("vision", "mtp", "unknown")
        wanted = "passthrough" if carried else "linear"
        assert assigned_methods(loaded)[tensor.name] == wanted, tensor.name


def test_the_first_rule_that_matches_counts(recipes: RecipeFolder) -> None:
    rules = [
        {"where": {"components": ["norm"]}, "method": "passthrough", "parameters": {"source": "b"}},
        {"where": {"layers": [0, 1]}, "method": "slerp", "parameters": {"t": 0.5}},
        {"where": {"names": ["*.mlp.*"]}, **LINEAR},
    ]
    found = assigned_methods(recipes.load(rules=rules))
    assert found["layers.0.input_layernorm.weight"] == "passthrough"
    assert found["layers.1.mlp.up_proj.weight"] == "slerp"
    assert found["layers.2.mlp.up_proj.weight"] == "linear"
    assert found["layers.2.linear_attn.out_proj.weight"] == "passthrough"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"weight": 1}, {"weight": 1.0}),
        ({"weight": {"a": 1, "b": 2}}, {"weight": {"b": 2.0, "a": 1.0}}),
        ({"weight": {"a": -0.0, "b": 1.0}}, {"weight": {"a": 0, "b": 1}}),
    ],
)
def test_equal_numbers_make_one_recipe(
    recipes: RecipeFolder, one: dict[str, Any], other: dict[str, Any]
) -> None:
    ids = [
        recipes.load(rules=[{"method": "linear", "parameters": parameters}]).recipe.id
        for parameters in (one, other)
    ]
    assert ids[0] == ids[1]


def test_a_single_parent_can_be_copied(recipes: RecipeFolder) -> None:
    rule = {"method": "passthrough", "parameters": {"source": "a"}}
    assert len(recipes.load(parents=recipes.parents[:1], rules=[rule]).parents) == 1


def test_no_rules_carry_everything_over(recipes: RecipeFolder) -> None:
    assert set(assigned_methods(recipes.load(rules=[])).values()) == {"passthrough"}


def test_a_rule_may_name_the_parents_that_it_sees(recipes: RecipeFolder) -> None:
    rules = [
        {"where": {"names": ["*mlp*"]}, "parents": ["b", "a"]}
        | {"method": "slerp", "parameters": {"t": 0}},
        {"parents": ["b"]} | LINEAR,
    ]
    loaded = recipes.load(rules=rules)
    maps = {name: ArchitectureMap(parent) for name, parent in loaded.parents.items()}
    ways = Plan(maps, None).assign(loaded.recipe)
    assert ways["layers.0.mlp.up_proj.weight"].parents == ("b", "a")
    assert ways["norm.weight"].parents == ("b",)
    assert Recipe.from_dict(loaded.recipe.to_dict()) == loaded.recipe


def test_the_form_of_the_child(recipes: RecipeFolder) -> None:
    layers = [{"a": [0, 1], "b": [1, 2]}, {"b": [3, 3]}]
    recipe = recipes.load(layers=layers, dtype="F16", shard_bytes="1.5 GiB").recipe
    assert recipe.layers == ({"a": (0, 1), "b": (1, 2)}, {"b": (3, 3)})
    assert (recipe.dtype, recipe.shard_bytes) == ("F16", 3 << 29)
    assert recipes.load(shard_bytes="5GB").recipe.shard_bytes == 5 * 10**9
    assert recipes.load(shard_bytes=4096).recipe.shard_bytes == 4096


def test_gradients_cases_and_tables_are_read_with_numbers_as_floats(recipes: RecipeFolder) -> None:
    cases = [{"where": {"layers": [0, 1]}, "value": [1, 2]}, {"value": 3}]
    rule = {"method": "linear", "parameters": {"weight": {"a": cases, "b": [0, 1]}}}
    (loaded,) = recipes.load(rules=[rule]).recipe.rules
    assert loaded.parameters["weight"]["b"] == [0.0, 1.0]
    assert loaded.parameters["weight"]["a"] == [
        {"where": {"layers": [0, 1]}, "value": [1.0, 2.0]},
        {"value": 3.0},
    ]
    numbers = [*loaded.parameters["weight"]["b"], loaded.parameters["weight"]["a"][1]["value"]]
    assert {type(number) for number in numbers} == {float}


def test_a_step_afterwards(recipes: RecipeFolder) -> None:
    rule = {
        "method": "task_arithmetic",
        "parameters": {"weight": 1},
        "post": {"method": "svc", "parameters": {"alpha": 0.5}},
    }
    (loaded,) = recipes.load(rules=[rule], base=recipes.base).recipe.rules
    assert loaded.post is not None
    assert (loaded.post.method, loaded.post.parameters) == ("svc", {"alpha": 0.5})


def test_a_degenerate_method_is_refused_unless_allowed(recipes: RecipeFolder) -> None:
    ties = {"method": "ties", "parameters": {"weight": 1, "density": 0.5}}
    parents = [recipes.parents[0], {"name": "b", "path": recipes.base}]
    message = recipes.refusal(rules=[LINEAR, ties], parents=parents, base=recipes.base)
    assert "rules.1: method ties" in message
    assert "b is the base" in message
    assert "dare_linear" in message
    recipes.load(rules=[LINEAR, ties], parents=parents, base=recipes.base, allow_degenerate=True)
    recipes.load(rules=[ties], base=recipes.base)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rules": None}, "rules"),
        ({"parents": None}, "parents"),
        ({"rule": []}, "rule"),
        ({"seed": "x"}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"base": 5}, "base"),
        ({"base": ["x"]}, "base"),
        ({"parents": {"a": "x"}}, "parents"),
        ({"parents": []}, "parents"),
        ({"parents": ["x"]}, "parents"),
        ({"parents": [{"name": "a"}]}, "parents"),
        ({"parents": [{"name": "a", "path": "x", "hub": "y"}]}, "parents"),
        ({"parents": [{"name": ["a"], "path": "x"}]}, "parents"),
        ({"parents": [{"name": "a", "path": 5}]}, "parents"),
        ({"parents": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, "parents"),
        ({"parents": [{"name": 5, "path": "x"}, {"name": "5", "path": "y"}]}, "parents"),
        ({"parents": [{"name": "base", "path": "x"}]}, "parents"),
        ({"rules": "all"}, "rules"),
        ({"parents": [{"name": "union", "path": "x"}]}, "parents"),
        ({"layers": {"a": [0, 1]}}, "layers"),
        ({"layers": [{"a": [1, 0]}]}, "layers"),
        ({"layers": [{"c": [0, 1]}]}, "layers"),
        ({"layers": [{"base": [0, 1]}]}, "layers"),
        ({"layers": [{"a": [0, 1], "b": [0, 2]}]}, "layers"),
        ({"dtype": "int8"}, "dtype"),
        ({"shard_bytes": "5 apples"}, "shard_bytes"),
        ({"shard_bytes": "0GB"}, "shard_bytes"),
        ({"shard_bytes": 1.5}, "shard_bytes"),
        ({"vocabulary": "c"}, "vocabulary"),
        ({"vocabulary": "base"}, "vocabulary"),
        ({"allow_degenerate": 1}, "allow_degenerate"),
        ({"rules": [LINEAR | {"parents": ["c"]}]}, "rules.0.parents"),
        ({"rules": [LINEAR | {"parents": ["a", "a"]}]}, "rules.0.parents"),
        ({"rules": [LINEAR | {"parents": "a"}]}, "rules.0.parents"),
        ({"rules": [LINEAR | {"post": "svc"}]}, "rules.0.post"),
        ({"rules": [LINEAR | {"post": {"method": "linear"}}]}, "rules.0.post"),
        ({"rules": [LINEAR | {"post": {"method": "none"}}]}, "rules.0.post"),
        ({"rules": [{"method": "svc"}]}, "rules.0"),
        ({"rules": [{"method": "slerp", "parameters": {"t": [0, 2]}}]}, "rules.0"),
        ({"rules": [{"method": "slerp", "parameters": {"t": [{"value": 2}]}}]}, "rules.0"),
        (
            {"rules": [{"method": "slerp", "parameters": {"t": [{"where": 5, "value": 1}]}}]},
            "rules.0",
        ),
        ({"rules": [{"method": "slerp", "parameters": {"t": [{"where": {}}]}}]}, "rules.0"),
        ({"rules": [{"method": "slerp", "parameters": {"t": []}}]}, "rules.0"),
        ({"rules": LINEAR}, "rules"),
        ({"rules": 5}, "rules"),
        ({"rules": ["linear"]}, "rules.0"),
        ({"rules": [LINEAR, {"parameters": {}}]}, "rules.1"),
        ({"rules": [{"method": "linear", "weight": 1}]}, "rules.0"),
        ({"rules": [{"method": "mean"}]}, "rules.0"),
        ({"rules": [{"method": ["linear"]}]}, "rules.0"),
        ({"rules": [{"method": "linear"}]}, "rules.0"),
        ({"rules": [{"method": "linear", "parameters": [1]}]}, "rules.0"),
        ({"rules": [{"method": "linear", "parameters": {"weigth": 1}}]}, "rules.0"),
        ({"rules": [{"method": "linear", "parameters": {"weight": "all"}}]}, "rules.0"),
        ({"rules": [{"method": "linear", "parameters": {"weight": {"a": 1}}}]}, "rules.0"),
        ({"rules": [{"method": "linear", "parameters": {"weight": {"c": 1}}}]}, "rules.0"),
        ({"rules": [{"method": "linear", "parameters": {"weight": True}}]}, "rules.0"),
        ({"rules": [{"method": "linear", "parameters": {"weight": float("nan")}}]}, "rules.0"),
        ({"rules": [{"method": "linear", "parameters": {"weight": float("inf")}}]}, "rules.0"),
        ({"rules": [{"method": "linear", "parameters": {"weight": 10**400}}]}, "rules.0"),
        ({"rules": [{"method": "slerp", "parameters": {"t": 1.5}}]}, "rules.0"),
        ({"rules": [{"method": "passthrough", "parameters": {"source": "c"}}]}, "rules.0"),
        ({"rules": [{"method": "ties", "parameters": {"weight": 1, "density": 1}}]}, "rules.0"),
        ({"rules": [LINEAR | {"where": "*norm*"}]}, "rules.0: where"),
        ({"rules": [LINEAR | {"where": ["norm"]}]}, "rules.0: where"),
        ({"rules": [LINEAR | {"where": 5}]}, "rules.0: where"),
        ({"rules": [LINEAR | {"where": []}]}, "rules.0: where"),
        ({"rules": [LINEAR | {"where": {"components": []}}]}, "rules.0: where.components"),
        ({"rules": [LINEAR | {"where": {"names": []}}]}, "rules.0: where.names"),
        (
            {
                "rules": [
                    {"method": "slerp", "parameters": {"t": [{"where": {"names": []}, "value": 1}]}}
                ]
            },
            "rules.0: where.names",
        ),
        ({"rules": [LINEAR | {"where": {"name": ["x"]}}]}, "rules.0: where"),
        ({"rules": [LINEAR | {"where": {"names": "*norm*"}}]}, "rules.0: where.names"),
        ({"rules": [LINEAR | {"where": {"names": [5]}}]}, "rules.0: where.names"),
        ({"rules": [LINEAR | {"where": {"components": "norm"}}]}, "rules.0: where.components"),
        ({"rules": [LINEAR | {"where": {"components": ["norms"]}}]}, "rules.0: where.components"),
        ({"rules": [LINEAR | {"where": {"layers": 3}}]}, "rules.0: where.layers"),
        ({"rules": [LINEAR | {"where": {"layers": [0]}}]}, "rules.0: where.layers"),
        ({"rules": [LINEAR | {"where": {"layers": [0, 1.5]}}]}, "rules.0: where.layers"),
    ],
)
def test_a_mistake_is_refused_with_file_and_key(
    recipes: RecipeFolder, changes: dict[str, Any], key: str
) -> None:
    message = recipes.refusal(**changes)
    assert message.startswith(f"{recipes.file}: ")
    assert key in message


@pytest.mark.parametrize(
    "content",
    [b"", b"5", b"[]", b"text", b"\xff\xfe\x00", b"\x00", b"parents: [", b"a: 2024-99-99",
     b"[" * 600 + b"]" * 600, b"!!python/object/apply:os.system ['exit 1']"],
)  # fmt: skip
def test_what_is_no_recipe_is_refused_by_its_file(recipes: RecipeFolder, content: bytes) -> None:
    recipes.file.write_bytes(content)
    with pytest.raises(BadInputError) as caught:
        load_recipe_file(str(recipes.file))
    assert str(caught.value).startswith(f"{recipes.file}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_missing_file_are_no_recipes(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing.yaml"):
        with pytest.raises(BadInputError, match="there is no file"):
            load_recipe_file(str(place))


def test_parents_that_are_not_there_or_do_not_fit_are_refused(
    recipes: RecipeFolder, tmp_path: Path
) -> None:
    missing = [*recipes.parents, {"name": "c", "path": str(tmp_path / "nowhere")}]
    assert "nowhere" in recipes.refusal(parents=missing)
    other = write_model(tmp_path / "other", "llama", 0)
    parents = [recipes.parents[0], {"name": "other", "path": str(other)}]
    assert recipes.refusal(parents=parents).startswith(f"other ({other}): config.json has ")
    assert recipes.refusal(base=str(other)).startswith(f"base ({other}): config.json has ")
