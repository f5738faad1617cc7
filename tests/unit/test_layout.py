"""Children of another form than their father's: stacked layers, another dtype, other shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.checkpoint_files import (
    assert_same_bits,
    open_merger,
    read_tensors,
    rule,
    write_checkpoint,
    write_child,
)
from tests.families import write_family
from workers.checkpoints import open_checkpoint
from workers.errors import BadInputError
from workers.merging import Recipe, Rule, Selector


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Kind -> `base`, `a`, `b`."""
    root = tmp_path_factory.mktemp("families")
    return {
        kind: dict(zip(("base", "a", "b"), write_family(root / kind, kind), strict=True))
        for kind in ("qwen3", "qwen3_5", "qwen3_moe", "gpt2")
    }


def child_of(
    parents: dict[str, Path], target: Path, *rules: Rule, base: Path | None = None, **form: Any
) -> Path:
    merger = open_merger(parents, base)
    recipe = Recipe(merger.references, rules, merger.base_reference, **form)
    assert Recipe.from_dict(json.loads(recipe.canonical_json)) == recipe
    return write_child(merger, recipe, target)


def load(folder: Path) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model


STACK = ({"a": (0, 2)}, {"b": (1, 3)}, {"a": (3, 3)})
"""Of two models of four layers one of seven."""


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5", "qwen3_moe"])
def test_stacked_layers_are_those_of_the_parents(
    kind: str, families: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """As transformers loads them, layer by layer."""
    parents = {name: families[kind][name] for name in "ab"}
    child = load(child_of(parents, tmp_path / "child", layers=STACK))
    loaded = {name: load(folder) for name, folder in parents.items()}
    sources = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("a", 3)]
    assert child.config.num_hidden_layers == len(child.model.layers) == 7
    for layer, (name, number) in zip(child.model.layers, sources, strict=True):
        expected = loaded[name].model.layers[number].state_dict()
        found = layer.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    assert torch.equal(child.model.embed_tokens.weight, loaded["a"].model.embed_tokens.weight)
    assert torch.equal(child.model.norm.weight, loaded["a"].model.norm.weight)
    child(torch.tensor([[1, 5, 6]]))


def test_layers_that_are_called_otherwise_are_stacked(
    families: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """GPT-2 has `transformer.h`, and `n_layer` of them."""
    parents = {name: families["gpt2"][name] for name in "ab"}
    child = load(child_of(parents, tmp_path / "child", layers=STACK))
    assert child.config.n_layer == len(child.transformer.h) == 7
    last = load(parents["a"]).transformer.h[3].state_dict()
    assert all(torch.equal(w, last[key]) for key, w in child.transformer.h[6].state_dict().items())
    child(torch.tensor([[1, 5, 6]]))


def test_slices_of_two_parents_are_merged(
    families: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """Layer i of one with layer i + 1 of the other, and a method with a base whose layers are the first's."""
    parents = {name: families["qwen3"][name] for name in "ab"}
    layers = ({"a": (0, 1), "b": (1, 2)}, {"b": (3, 3)})
    folder = child_of(
        parents,
        tmp_path / "child",
        rule("task_arithmetic", Selector(layers=(0, 1)), weight={"a": 0.25, "b": 0.5}),
        base=families["qwen3"]["base"],
        layers=layers,
    )
    child = read_tensors(folder)
    stored = {name: read_tensors(path) for name, path in families["qwen3"].items()}
    for number in (0, 1):
        key = "model.layers.{}.mlp.up_proj.weight"
        base = stored["base"][key.format(number)].float()
        a = stored["a"][key.format(number)].float() - base
        b = stored["b"][key.format(number + 1)].float() - base
        assert torch.equal(child[key.format(number)], (base + a * 0.25 + b * 0.5).bfloat16())
    top = "model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(child[top.format(2)], stored["b"][top.format(3)])


def test_gradients_run_over_the_stacked_layers(
    families: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    parents = {name: families["qwen3"][name] for name in "ab"}
    layers = ({"a": (0, 3), "b": (0, 3)}, {"a": (0, 0), "b": (0, 0)})
    rules = [rule("linear", weight={"a": [1.0, 0.0], "b": [0.0, 1.0]})]
    child = read_tensors(child_of(parents, tmp_path / "child", *rules, layers=layers))
    stored = {name: read_tensors(path) for name, path in families["qwen3"].items()}
    key = "model.layers.{}.mlp.up_proj.weight"
    for number, share in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        one, two = (stored[name][key.format(number % 4)].float() for name in "ab")
        expected = (one * (1 - share) + two * share).bfloat16()
        assert torch.equal(child[key.format(number)], expected), number


def test_a_gradient_ends_at_the_last_layer_that_there_is(
    families: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """A range that reaches beyond the model is for the layers that it has."""
    parents = {name: families["qwen3"][name] for name in "ab"}
    children = [
        child_of(
            parents,
            tmp_path / str(last),
            rule("linear", Selector(layers=(1, last)), weight={"a": [1.0, 0.0], "b": [0.0, 1.0]}),
        )
        for last in (3, 99)
    ]
    assert_same_bits(*map(read_tensors, children))


def test_layers_that_are_not_there_are_refused(families: dict[str, dict[str, Path]]) -> None:
    merger = open_merger({name: families["qwen3"][name] for name in "ab"})
    for layers, message in (
        (({"a": (2, 4)},), r"a \(.*has no layer 4"),
        (({"a": (0, 1)}, {"a": (1, 1), "b": (4, 4)}), "no tensor"),
    ):
        with pytest.raises(BadInputError, match=message):
            merger.start(Recipe(merger.references, (rule("linear", weight=0.5),), layers=layers))


def test_layers_known_by_number_are_not_stacked(tmp_path: Path) -> None:
    """`first_k_dense_replace: 1` would speak of another layer afterwards."""
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(2, 2) for n in range(2)}
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "first_k_dense_replace": 1}
    merger = open_merger({"a": write_checkpoint(tmp_path / "a", tensors, config=config)})
    with pytest.raises(BadInputError, match="first_k_dense_replace"):
        merger.start(Recipe(merger.references, (), layers=({"a": (1, 1)},)))


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("F32", "float32"), ("F16", "float16")])
def test_a_dtype_may_be_chosen(
    dtype: str, torch_dtype: str, families: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    parents = {name: families["qwen3"][name] for name in "ab"}
    folder = child_of(
        parents, tmp_path / "child", rule("linear", weight={"a": 0.25, "b": 0.75}), dtype=dtype
    )
    child, stored = read_tensors(folder), [read_tensors(path) for path in parents.values()]
    wanted = getattr(torch, torch_dtype)
    for name, tensor in child.items():
        expected = stored[0][name].float() * 0.25 + stored[1][name].float() * 0.75
        assert tensor.dtype == wanted
        assert torch.equal(tensor, expected.to(wanted)), name
    assert load(folder).dtype == wanted


def test_what_the_father_keeps_in_more_digits_stays_so(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.linear_attn.A_log": torch.randn(7),
        "model.layers.0.mlp.up_proj.weight": torch.randn(9, 5).bfloat16(),
        "model.norm.weight": torch.randn(5).bfloat16(),
    }
    father = write_checkpoint(tmp_path / "a", tensors)
    child = read_tensors(child_of({"a": father}, tmp_path / "child", dtype="F16"))
    assert {name: tensor.dtype for name, tensor in child.items()} == {
        "model.layers.0.linear_attn.A_log": torch.float32,
        "model.layers.0.mlp.up_proj.weight": torch.float16,
        "model.norm.weight": torch.float16,
    }
    log = "model.layers.0.linear_attn.A_log"
    assert torch.equal(child[log], tensors[log])


@pytest.mark.parametrize("limit", [20_000, 60_000, 10**9])
def test_shards_are_no_larger_than_asked(
    limit: int, families: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    father = families["qwen3"]["a"]
    folder = child_of({"a": father}, tmp_path / "child", shard_bytes=limit)
    assert {k: v.tolist() for k, v in read_tensors(folder).items()} == {
        k: v.tolist() for k, v in read_tensors(father).items()
    }
    child = open_checkpoint(str(folder))
    largest = max(entry.stop - entry.start for entry in child.tensors.values())
    for file in child.weight_files:
        assert file.size - len(file.header.raw) <= max(limit, largest)
        assert all(entry.start % 2 == 0 for entry in file.header.entries)
    assert (len(child.weight_files) == 1) == (limit == 10**9)
    load(folder)


def test_a_fathers_form_is_his_bytes(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    father = families["qwen3"]["a"]
    folder = child_of({"a": father}, tmp_path / "child")
    for file in father.iterdir():
        if file.name != "README.md":
            assert (folder / file.name).read_bytes() == file.read_bytes()


def test_what_the_new_dtype_cannot_hold_is_no_silent_infinity(tmp_path: Path) -> None:
    """Only what is infinite in the father already may be so in the child."""
    name = "model.layers.0.mlp.up_proj.weight"
    father = write_checkpoint(tmp_path / "a", {name: torch.full((3, 5), 1e5).bfloat16()})
    with pytest.raises(BadInputError, match=r"up_proj.*15 elements that are NaN or infinite"):
        child_of({"a": father}, tmp_path / "narrow", dtype="F16")
    enlarged = rule("passthrough", source="a", scale=1e35)
    with pytest.raises(BadInputError, match=r"up_proj.*15 elements that are NaN or infinite"):
        child_of({"a": father}, tmp_path / "scaled", enlarged)
    broken = write_checkpoint(tmp_path / "b", {name: torch.full((3, 5), torch.inf).bfloat16()})
    for number, dtype in enumerate((None, "F32")):
        child = child_of({"a": broken}, tmp_path / f"kept{number}", dtype=dtype)
        assert torch.equal(read_tensors(child)[name].float(), torch.full((3, 5), torch.inf))


def layers_of(prefix: str, layers: int, seed: int, fused: bool, dtype: Any) -> dict[str, Any]:
    """A model of experts: fused, or one tensor for each."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(dtype)

    tensors = {f"{prefix}embed_tokens.weight": random(6, 4), f"{prefix}norm.weight": random(4)}
    for layer in range(layers):
        mlp = f"{prefix}layers.{layer}.mlp"
        tensors[f"{prefix}layers.{layer}.input_layernorm.weight"] = random(4)
        gate_up, down = random(2, 6, 4), random(2, 4, 3)
        if fused:
            tensors[f"{mlp}.experts.gate_up_proj"] = gate_up
            tensors[f"{mlp}.experts.down_proj"] = down
            continue
        for expert in range(2):
            stem = f"{mlp}.experts.{expert}"
            tensors[f"{stem}.gate_proj.weight"] = gate_up[expert, :3].clone()
            tensors[f"{stem}.up_proj.weight"] = gate_up[expert, 3:].clone()
            tensors[f"{stem}.down_proj.weight"] = down[expert].clone()
    return tensors


@pytest.mark.parametrize("fused", [False, True])
def test_stacked_layers_are_stored_as_the_fathers_are(fused: bool, tmp_path: Path) -> None:
    """In his names, his fusion and his dtype: of anything else no model could be loaded."""
    a = layers_of("model.", 2, 1, fused, torch.bfloat16)
    b = layers_of("model.language_model.", 3, 2, not fused, torch.float32)
    alike = layers_of("model.", 3, 2, fused, torch.bfloat16)
    parents = {
        name: write_checkpoint(tmp_path / name, tensors, config={"model_type": "qwen3_moe"})
        for name, tensors in {"a": a, "b": b}.items()
    }
    child = read_tensors(
        child_of(parents, tmp_path / "child", layers=({"a": (0, 0)}, {"b": (1, 2)}))
    )
    expected = {name: tensor for name, tensor in a.items() if ".layers.1." not in name}
    for name, tensor in alike.items():
        for number in (1, 2):
            if f".layers.{number}." in name:
                expected[name] = tensor
    assert_same_bits(child, expected)


def test_layers_of_prediction_that_are_numbered_behind_the_others_are_not_overwritten(
    tmp_path: Path,
) -> None:
    """DeepSeek's are layers 2, 3, ... of a model of two; a third stacked layer would take their name."""
    tensors = {
        f"model.layers.{n}.mlp.up_proj.weight": torch.full((2, 2), n) * 1.0 for n in range(3)
    }
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    merger = open_merger({"a": write_checkpoint(tmp_path / "a", tensors, config=config)})
    with pytest.raises(BadInputError, match=r"model\.layers\.2\.mlp.*behind the last layer"):
        merger.start(Recipe(merger.references, (), layers=({"a": (0, 1)}, {"a": (0, 1)})))


def test_kinds_of_layers_known_by_their_place_are_spelt_out(tmp_path: Path) -> None:
    """Qwen3-Next as published: every fourth layer is one of full attention."""
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(2, 2) for n in range(4)}
    config = {"model_type": "qwen3_next", "num_hidden_layers": 4, "full_attention_interval": 2}
    folder = write_checkpoint(tmp_path / "a", tensors, config=config)
    child = child_of({"a": folder}, tmp_path / "child", layers=({"a": (0, 0)}, {"a": (2, 3)}))
    found = transformers.AutoConfig.from_pretrained(child)
    assert found.layer_types == ["linear_attention", "linear_attention", "full_attention"]


FOUR_LAYERS = {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(2, 2) * n for n in range(4)}
HALF = ({"a": (0, 0)}, {"a": (2, 2)})


def stacked_config(
    tmp_path: Path, layers: Any = HALF, /, nested: bool = False, **said: Any
) -> dict[str, Any]:
    """The configuration of a child of four layers, of which so much is said."""
    text = {"num_hidden_layers": 4} | said
    config = {"model_type": "a"} | ({"text_config": text} if nested else text)
    folder = write_checkpoint(tmp_path / "a", FOUR_LAYERS, config=config)
    child = child_of({"a": folder}, tmp_path / "child", layers=layers)
    found: dict[str, Any] = json.loads((child / "config.json").read_text())
    return found["text_config"] if nested else found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window_pattern", 6),
        ("decoder_sparse_step", 2),
        ("attn_layer_period", 8),  # Jamba
        ("expert_layer_period", 2),
        ("moe_layer_interval", 2),  # Ernie 4.5
        ("moe_layer_start_index", 1),
        ("moe_layer_end_index", 3),
        ("moe_layer_end_index", 0),
        ("full_attn_idxs", [1, 3]),  # LFM2
        ("num_dense_layers", 2),
        ("global_attn_every_n_layers", 4),  # AFMoE
        ("attn_layer_indices", [2]),  # Bamba
        ("hybrid_layer_ids", [2]),  # Zamba 2
        ("num_hash_layers", 3),  # DeepSeek-V4
        ("compress_ratios", [0, 4, 4, 128, 0]),  # with one for the prediction layer
        ("moe_layers_enum", "2,3"),  # Step 3
        ("scale_attn_by_inverse_layer_idx", True),  # GPT-2
        ("linear_attn_config", {"kda_layers": [1, 2, 3], "full_attn_layers": [4]}),  # Kimi Linear
    ],
)
def test_keys_that_speak_of_layers_by_number_are_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match=f"config.json: {key}.* speaks of layers by number"):
        stacked_config(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_layer_period", 1),
        ("moe_layer_start_index", 0),
        ("moe_layer_end_index", -1),  # the last layer, whichever that is
        ("moe_layer_interval", 1),
        ("linear_attn_config", {"head_dim": 128}),
        ("linear_attn_config", None),
        ("full_attn_idxs", None),
        ("num_dense_layers", 0),
    ],
)
def test_keys_that_mean_all_layers_alike_are_kept(key: str, value: Any, tmp_path: Path) -> None:
    assert stacked_config(tmp_path, **{key: value})[key] == value


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key", ["layer_types", "mlp_layer_types", "attn_type_list"])
def test_lists_with_an_entry_for_each_layer_are_cut_along(
    key: str, nested: bool, tmp_path: Path
) -> None:
    found = stacked_config(tmp_path, nested=nested, **{key: ["w", "x", "y", "z"]})
    assert found[key] == ["w", "y"]
    assert found["num_hidden_layers"] == 2


@pytest.mark.parametrize("nested", [False, True])
def test_an_unknown_list_as_long_as_the_layers_is_refused(nested: bool, tmp_path: Path) -> None:
    with pytest.raises(
        BadInputError, match=r"a/config\.json: limits has as many entries as layers"
    ):
        stacked_config(tmp_path, nested=nested, limits=[1, 2, 3, 4])


def test_a_list_beside_the_text_configuration_is_refused_too(tmp_path: Path) -> None:
    config = {"text_config": {"num_hidden_layers": 4}, "layer_types": ["w", "x", "y", "z"]}
    folder = write_checkpoint(tmp_path / "a", FOUR_LAYERS, config=config)
    with pytest.raises(BadInputError, match="layer_types has as many entries as layers"):
        child_of({"a": folder}, tmp_path / "child", layers=HALF)


def test_other_lists_are_kept(tmp_path: Path) -> None:
    """Those of other lengths, those of tokens, and any where the layers stay what they were."""
    lists = {"limits": [1, 2, 3], "eos_token_id": [1, 2, 3, 4]}
    found = stacked_config(tmp_path / "half", **lists)
    assert {key: found[key] for key in lists} == lists
    halves = ({"a": (0, 1)}, {"a": (2, 3)})
    found = stacked_config(tmp_path / "same", halves, limits=[1, 2, 3, 4])
    assert found["limits"] == [1, 2, 3, 4]
    turned = ({"a": (2, 3)}, {"a": (0, 1)})
    with pytest.raises(BadInputError, match="limits has as many entries as layers"):
        stacked_config(tmp_path / "turned", turned, limits=[1, 2, 3, 4])


def test_a_list_of_one_layer_says_nothing_of_layers(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 1, "architectures": ["A"]}
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}
    folder = write_checkpoint(tmp_path / "a", tensors, config=config)
    child = child_of({"a": folder}, tmp_path / "child", layers=({"a": (0, 0)}, {"a": (0, 0)}))
    assert json.loads((child / "config.json").read_text())["architectures"] == ["A"]
