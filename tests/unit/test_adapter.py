"""LoRA adapters as parents: the values are W + scaling * B A, and nothing in their files is ignored."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.overview import checkpoint_overview, render_checkpoint
from tests.checkpoint_files import (
    CONFIG,
    RemoteStore,
    assert_same_bits,
    merge,
    open_merger,
    read_tensors,
    recipe_for,
    rule,
    run,
    to_float64,
    write_checkpoint,
)
from tests.families import write_model
from workers.checkpoints import (
    ArchitectureMap,
    Checkpoint,
    absolute_checkpoint_location,
    localize,
    open_checkpoint,
)
from workers.checkpoints.adapter import HANDLED_KEYS, KEYS_WITHOUT_EFFECT
from workers.checkpoints.names import canonical_name
from workers.errors import BadInputError
from workers.evaluation.engines.transformers_engine import TransformersEngine
from workers.merging.sources import TORCH_DTYPES, Source

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
TABLE, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
GATE = "model.layers.0.mlp.gate"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
WEIGHTS = {
    f"{Q}.weight": (24, 20),
    f"{UP}.weight": (30, 20),
    f"{TABLE}.weight": (11, 20),
    f"{HEAD}.weight": (11, 20),
    f"{NORM}.weight": (20,),
    f"{GATE}.weight": (2, 20),
    EXPERTS: (2, 6, 20),
}
PREFIX = "base_model.model."


def random(shape: Any, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write_base(
    folder: Path, seed: int = 0, config: dict[str, Any] | None = None, **shapes: Any
) -> Path:
    tensors = {
        name: random(shape, seed * 100 + n)
        for n, (name, shape) in enumerate((shapes or WEIGHTS).items())
    }
    return write_checkpoint(folder, tensors, config=CONFIG if config is None else config)


def factors(
    module: str,
    out_in: tuple[int, int],
    rank: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 7,
) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": random((rank, out_in[1]), seed, dtype),
        f"{PREFIX}{module}.lora_B.weight": random((out_in[0], rank), seed + 1, dtype),
    }


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "target_modules": ["x"]}
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def adapted_values(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(f"{base}+{adapter}")
    source = Source(opened)
    values = {}
    for tensor in ArchitectureMap(opened).tensors:
        read = source.read(tensor, 0, tensor.elements).reshape(tensor.shape)
        assert read.dtype == TORCH_DTYPES[tensor.values_dtype]
        values[tensor.name] = read
    return values


def assert_adapted(
    found: torch.Tensor, weight: torch.Tensor, scaling: float, a: torch.Tensor, b: torch.Tensor
) -> None:
    """`found` is weight + scaling * b a, in fp32 with one rounding a term."""
    assert found.dtype == torch.float32
    a64, b64, weight64 = to_float64(a), to_float64(b), to_float64(weight)
    error = numpy.abs(to_float64(found) - (weight64 + scaling * (b64 @ a64)))
    size = numpy.abs(weight64) + scaling * (numpy.abs(b64) @ numpy.abs(a64))
    assert (error <= (len(a) + 3) * 2.0**-24 * size).all()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


# Values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["BF16", "F32"])
@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 6}, 1.5),
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"lora_alpha": 0.5, "alpha_pattern": {"k_proj": 9}}, 0.125),
        ({"alpha_pattern": {"q_proj": 10}}, 2.5),
        ({"alpha_pattern": {"proj": 10}}, 1.5),  # not the whole of a name's last part
        ({"alpha_pattern": {"self_attn": 10}}, 1.5),  # nor its last part
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 10}}, 2.5),
        ({"alpha_pattern": {r"layers\.[0-3]\..*": 2, "q_proj": 10}}, 0.5),  # the first that fits
        ({"r": 8, "rank_pattern": {"self_attn.q_proj": 4}}, 1.5),
        ({"init_lora_weights": "gaussian", "use_dora": False, "layer_replication": None}, 1.5),
    ],
)
def test_values_and_scaling(
    config: dict[str, Any], scaling: float, dtype: torch.dtype, base: Path, tmp_path: Path
) -> None:
    pair = factors(Q, (24, 20), dtype=dtype)
    found = adapted_values(base, write_adapter(tmp_path / "lora", pair, **config))
    weights = read_tensors(base)
    a, b = pair.values()
    assert_adapted(
        found.pop("layers.0.self_attn.q_proj.weight"), weights[f"{Q}.weight"], scaling, a, b
    )
    plain = ArchitectureMap(open_checkpoint(str(base)))
    assert all(torch.equal(found[t.name].view(-1), Source(plain.checkpoint).read(t, 0, t.elements))
               for t in plain.tensors if t.name in found)  # fmt: skip


def test_an_embedding_gets_the_transposed_product(base: Path, tmp_path: Path) -> None:
    a, b = random((4, 11), 1), random((20, 4), 2)
    for spelling in ("", ".default"):
        tensors = {
            f"{PREFIX}{TABLE}.lora_embedding_A{spelling}": a,
            f"{PREFIX}{TABLE}.lora_embedding_B{spelling}": b,
        }
        found = adapted_values(base, write_adapter(tmp_path / f"lora{spelling}", tensors))
        table = read_tensors(base)[f"{TABLE}.weight"]
        assert_adapted(found["embed_tokens.weight"].t(), table.t(), 1.5, a, b)


def test_a_replaced_table_and_factors_add_up(base: Path, tmp_path: Path) -> None:
    """PEFT saves a targeted embedding whole, too (`base_layer`)."""
    a, b, table = random((4, 11), 1), random((20, 4), 2), random((11, 20), 3)
    tensors = {
        f"{PREFIX}{TABLE}.lora_embedding_A": a,
        f"{PREFIX}{TABLE}.lora_embedding_B": b,
        f"{PREFIX}{TABLE}.base_layer.weight": table,
    }
    found = adapted_values(base, write_adapter(tmp_path / "lora", tensors))
    assert_adapted(found["embed_tokens.weight"].t(), table.t(), 1.5, a, b)


@pytest.mark.parametrize("spelling", ["", ".modules_to_save", ".modules_to_save.default"])
def test_modules_to_save_take_the_place_of_the_base(
    spelling: str, base: Path, tmp_path: Path
) -> None:
    saved = {HEAD: random((11, 20), 1, torch.float32), GATE: random((2, 20), 2)}
    tensors = {f"{PREFIX}{name}{spelling}.weight": value for name, value in saved.items()}
    experts = random((2, 6, 20), 3)
    if not spelling:
        tensors[PREFIX + EXPERTS] = experts
    adapter = write_adapter(tmp_path / "lora", tensors, modules_to_save=[HEAD, "gate"])
    found = adapted_values(base, adapter)
    assert_same_bits(
        {n: found[n] for n in ("lm_head.weight", "layers.0.mlp.gate.weight")},
        {"lm_head.weight": saved[HEAD], "layers.0.mlp.gate.weight": saved[GATE]},
    )
    if not spelling:
        assert torch.equal(found["layers.0.mlp.experts.1.up_proj.weight"], experts[1, 3:])


def test_one_expert_of_a_fused_tensor(base: Path, tmp_path: Path) -> None:
    """An adapter trained on experts one by one fits a base that stores them fused."""
    pair = factors("model.layers.0.mlp.experts.1.up_proj", (3, 20))
    found = adapted_values(base, write_adapter(tmp_path / "lora", pair))
    weight = read_tensors(base)[EXPERTS]
    assert_adapted(
        found["layers.0.mlp.experts.1.up_proj.weight"], weight[1, 3:], 1.5, *pair.values()
    )
    assert torch.equal(found["layers.0.mlp.experts.0.up_proj.weight"], weight[0, 3:])


def test_names_pair_whatever_the_wrapper(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base", **{"model.language_model.layers.0.self_attn.q_proj.weight": (24, 20)}
    )
    pair = {
        key.replace(".weight", ".default.weight"): value
        for key, value in factors(Q, (24, 20)).items()
    }
    found = adapted_values(base, write_adapter(tmp_path / "lora", pair))
    (weight,) = read_tensors(base).values()
    assert_adapted(found["layers.0.self_attn.q_proj.weight"], weight, 1.5, *pair.values())


@pytest.mark.parametrize("said", [True, False])
def test_conv1d_layers_store_in_out(said: bool, tmp_path: Path) -> None:
    """PEFT goes by the layer, and mends `fan_in_fan_out` where it says otherwise."""
    config = {"model_type": "gpt2"}
    base = write_base(
        tmp_path / "base",
        config=config,
        **{"h.0.attn.c_attn.weight": (8, 24), "h.0.mlp.c_proj.weight": (9, 9)},
    )
    pairs = factors("h.0.attn.c_attn", (24, 8)) | factors("h.0.mlp.c_proj", (9, 9), seed=3)
    adapter = write_adapter(tmp_path / "lora", pairs, fan_in_fan_out=said)
    # GPT-2 has no head of its own, and `lm_head` is not adapted here.
    found, weights = adapted_values(base, adapter), read_tensors(base)
    for name, (a, b) in {
        "h.0.attn.c_attn.weight": tuple(pairs.values())[:2],
        "h.0.mlp.c_proj.weight": tuple(pairs.values())[2:],
    }.items():
        assert_adapted(found[canonical_name(name)].t(), weights[name].t(), 1.5, a, b)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rank=st.integers(1, 9),
    kind=st.sampled_from(["linear", "embedding"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cuts=st.lists(st.floats(0, 1), max_size=5),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_bits_do_not_depend_on_the_range(
    shape: tuple[int, int],
    rank: int,
    kind: str,
    dtype: torch.dtype,
    cuts: list[float],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    module = Q if kind == "linear" else TABLE
    weights = {f"{module}.weight": random(shape, 5, dtype), "lm_head.weight": torch.ones(1, 1)}
    base = write_checkpoint(folder / "base", weights)
    pair = factors(module, shape if kind == "linear" else shape[::-1], rank, torch.float32)
    if kind == "embedding":
        pair = {
            key.replace("lora_", "lora_embedding_").removesuffix(".weight"): value
            for key, value in pair.items()
        }
    opened = open_checkpoint(f"{base}+{write_adapter(folder / 'lora', pair, r=rank)}")
    source = Source(opened)
    tensor = next(t for t in ArchitectureMap(opened).tensors if t.is_computed)
    size = tensor.elements
    ends = sorted({0, size, *(round(cut * size) for cut in cuts)})
    whole = source.read(tensor, 0, size).clone()
    parts = [source.read(tensor, a, b - a) for a, b in pairwise(ends)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(source.read(tensor, 0, size), whole)  # the mapped base is untouched


def test_an_adapter_on_an_fp8_base(tmp_path: Path) -> None:
    from tests.unit.test_fp8 import codes, dequantized, fp8_config, scales

    code, scale = codes((24, 20)), scales((3, 2), torch.float32)
    tensors = {f"{Q}.weight": code, f"{Q}.weight_scale_inv": scale}
    base = write_checkpoint(tmp_path / "base", tensors, config=fp8_config((8, 16)))
    pair = factors(Q, (24, 20))
    found = adapted_values(base, write_adapter(tmp_path / "lora", pair))
    exact = dequantized(code, scale, (8, 16)).float()
    assert_adapted(found["layers.0.self_attn.q_proj.weight"], exact, 1.5, *pair.values())


# Merges


def test_merges_see_the_adapted_values(tmp_path: Path) -> None:
    """Adapted mothers give the child that the same parents written out in fp32 give."""
    root = tmp_path / "adapted"
    for seed, name in enumerate(["a", "b0", "c", "base"]):
        write_base(root / name, seed)
    adapter = write_adapter(root / "lora", factors(Q, (24, 20)) | factors(UP, (30, 20), seed=9))
    parents = {"a": str(root / "a"), "b": f"{root / 'b0'}+{adapter}"}
    written = {f"model.{k}": v.float() for k, v in adapted_values(root / "b0", adapter).items()}
    plain = write_checkpoint(tmp_path / "plain", written)
    for way in (
        rule("linear", weight={"a": 0.3, "b": 0.7}),
        rule("slerp", t=0.4),
        rule("ties", weight=1.0, density=0.5),
        rule("passthrough", source="b"),
    ):
        one = run(open_merger(parents, root / "base"), way)  # type: ignore[arg-type]
        two = run(open_merger({"a": root / "a", "b": plain}, root / "base"), way)
        assert_same_bits(one, two)


def test_an_adapted_father_gives_the_layout_of_its_base(tmp_path: Path) -> None:
    """What is carried from it is its values, not the bits of the base."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "lora", factors(Q, (24, 20)))
    parents = {"a": Path(f"{base}+{adapter}"), "b": write_base(tmp_path / "b", 1)}
    child = merge(tmp_path / "child", parents, [rule("passthrough", source="a")])
    weights = read_tensors(base)
    values = adapted_values(base, adapter)["layers.0.self_attn.q_proj.weight"]
    assert_same_bits(child, weights | {f"{Q}.weight": values.to(torch.bfloat16)})
    assert not torch.equal(child[f"{Q}.weight"], weights[f"{Q}.weight"])
    names = {file.name for file in (tmp_path / "child").iterdir() if file.is_file()}
    assert names == {"config.json", "model.safetensors"}


def test_an_adapted_father_lives_in_an_engine(tmp_path: Path) -> None:
    """The engine loads his base; a recipe that takes everything from him gives the adapted model."""
    base = write_model(tmp_path / "base", "llama", seed=1)
    shape = tuple(read_tensors(base)[f"{Q}.weight"].shape)
    adapter = write_adapter(tmp_path / "lora", factors(Q, shape))
    parents = {"a": open_checkpoint(f"{base}+{adapter}"), "b": open_checkpoint(str(base))}
    engine = TransformersEngine(parents, None, dtype="float32")
    engine.realize(recipe_for(engine.merger, rule("passthrough", source="a")))
    wanted = adapted_values(base, adapter)["layers.0.self_attn.q_proj.weight"].to(torch.bfloat16)
    assert torch.equal(engine.model.state_dict()[f"{Q}.weight"], wanted.float())


# What is refused


def refuse(
    base: Path, tensors: dict[str, torch.Tensor], folder: Path, message: str, **config: Any
) -> None:
    adapter = write_adapter(folder, tensors, **config)
    with pytest.raises(BadInputError, match=message) as error:
        ArchitectureMap(open_checkpoint(f"{base}+{adapter}"))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "use_dora is True"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"something_of_tomorrow": {"x": 1}}, "something_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 8}, "factor of the rank 8"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*not a finite number"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"rank_pattern": {"q_proj": 2}}, "factor of the rank 2"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern.q_proj is 'x'"),
        ({"rank_pattern": {"(": 4}}, "regular expression"),
        ({"rank_pattern": {"a{99999999999}": 4}}, "regular expression"),
        ({"r": 10**400}, "r is 1000.*not a rank"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_configurations_that_are_refused(
    config: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    refuse(base, factors(Q, (24, 20)), tmp_path / "lora", message, **config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text("q_proj.*+([", max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(
    config=st.dictionaries(
        st.sampled_from(sorted(HANDLED_KEYS | KEYS_WITHOUT_EFFECT | {"use_dora", "other"})), JSON
    ),
    base=st.fixed_dictionaries({}, optional={"r": st.just(4), "lora_alpha": st.integers(1, 99)}),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_configuration_is_read_or_refused(
    config: dict[str, Any], base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And what is read has a scaling that is a number."""
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.exists():
        write_base(folder / "base")
        write_adapter(folder / "lora", factors(Q, (24, 20)))
    for said in (config, {"peft_type": "LORA", "r": 4, "lora_alpha": 6} | config | base):
        (folder / "lora" / "adapter_config.json").write_text(json.dumps(said))
        try:
            opened = open_checkpoint(f"{folder / 'base'}+{folder / 'lora'}")
        except BadInputError as error:
            message = str(error)
        else:
            message = f"{folder / 'lora'}"
            assert opened.adapter is not None
            (update,) = opened.adapter.low_rank.values()
            assert update.rank == 4 and numpy.isfinite(update.scaling)
        assert str(folder / "lora") in message


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{PREFIX}{Q}.lora_magnitude_vector": ONE}, "lora_magnitude_vector.*not understood"),
        ({f"{PREFIX}{Q}.lora_magnitude_vector.weight": ONE}, "lora_magnitude_vector"),
        ({f"{PREFIX}{Q}.lora_B.bias": ONE}, "lora_B.bias.*not understood"),
        ({f"{Q}.lora_A.weight": ONE}, f"{Q}.lora_A.weight.*not understood"),
        ({f"{PREFIX}{Q}.lora_A.other.weight": ONE}, "lora_A.other.weight"),
        ({f"{PREFIX}{Q}.lora_A.default.weight": ONE}, "are the same thing"),
        ({f"{PREFIX}{UP}.lora_A.weight": torch.ones(4, 20)}, "up_proj.lora_A.weight.*no counterpart"),
        ({f"{PREFIX}{Q}.bias": torch.ones(24)}, "q_proj.bias.*matches no tensor"),
        ({f"{PREFIX}score.weight": torch.ones(2, 20)}, "score.weight.*matches no tensor"),
        ({f"{PREFIX}{TABLE}.token_adapter.trainable_tokens_delta": ONE}, "matches no tensor"),
        ({f"{PREFIX}{NORM}.original_module.weight": ONE}, "matches no tensor"),
        ({f"{PREFIX}{HEAD}.weight": torch.ones(12, 20)}, r"\[12, 20\].*another base"),
        ({f"{PREFIX}{NORM}.weight": torch.ones(20, dtype=torch.int8)}, "norm.weight.*I8"),
        (factors("model.layers.7.self_attn.q_proj", (24, 20)), "layers.7.*matches no tensor"),
        (factors("model.layers.0.mlp.experts", (24, 20)), "mlp.experts.lora_A.*matches no tensor"),
        (factors(UP, (20, 30)), r"up_proj.lora_A.*\[20, 30\].*\[30, 20\]"),
        (factors(NORM, (20, 20)), r"norm.lora_A.*\[20\]"),
        ({f"{PREFIX}{UP}.lora_A.weight": ONE, f"{PREFIX}{UP}.lora_B.weight": ONE.clone()}, "shape"),
        (factors("model.language_model.layers.0.self_attn.q_proj", (24, 20)), "one module twice"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(
    tensors: dict[str, torch.Tensor], message: str, base: Path, tmp_path: Path
) -> None:
    refuse(base, factors(Q, (24, 20)) | tensors, tmp_path / "lora", message)


def test_codes_without_scales_are_no_weight(tmp_path: Path) -> None:
    weight = {f"{Q}.weight": random((24, 20), 0).to(torch.float8_e4m3fn)}
    base = write_checkpoint(tmp_path / "base", weight)
    refuse(base, factors(Q, (24, 20)), tmp_path / "lora", "q_proj.weight.*F8_E4M3.*dequantize")


def test_a_trained_bias_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", **{f"{Q}.weight": (24, 20), f"{Q}.bias": (24,)})
    tensors = factors(Q, (24, 20)) | {f"{PREFIX}{Q}.base_layer.bias": torch.ones(24)}
    refuse(base, tensors, tmp_path / "lora", "bias 'all'", bias="all")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("module", [HEAD, TABLE])
def test_one_side_of_a_tied_head_cannot_be_changed(module: str, tied: bool, tmp_path: Path) -> None:
    shapes = {f"{TABLE}.weight": (11, 20)} | ({f"{HEAD}.weight": (11, 20)} if tied else {})
    base = write_base(tmp_path / "base", config=CONFIG | {"tie_word_embeddings": tied}, **shapes)
    tensors = {f"{PREFIX}{module}.weight": random((11, 20), 1)}
    refuse(base, tensors, tmp_path / "lora", f"{module}.weight.*head of its own")


def test_the_table_of_gpt2_is_its_head(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base", config={"model_type": "gpt2"}, **{"transformer.wte.weight": (11, 20)}
    )
    stem = f"{PREFIX}transformer.wte.lora_embedding_"
    tensors = {f"{stem}A": random((4, 11), 1), f"{stem}B": random((20, 4), 2)}
    refuse(base, tensors, tmp_path / "lora", "wte.lora_embedding_A.*head of its own")


def test_files_that_are_no_adapter(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(Q, (24, 20)))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(BadInputError, match=r"no adapter_model.safetensors.*never read"):
        open_checkpoint(f"{base}+{adapter}")
    with pytest.raises(BadInputError, match=f"{base}: no adapter_config.json"):
        open_checkpoint(f"{base}+{base}")
    (adapter / "adapter_config.json").write_text("[]")
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    with pytest.raises(BadInputError, match=r"adapter_config\.json: not a JSON object"):
        open_checkpoint(f"{base}+{adapter}")
    with pytest.raises(BadInputError, match=r"nowhere: no adapter_config.json"):
        open_checkpoint(f"{base}+{tmp_path}/nowhere")


# Places


def test_a_folder_with_a_plus_in_its_name_wins(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(Q, (24, 20)))
    shutil.copytree(base, tmp_path / "base+lora")
    plain = open_checkpoint(str(tmp_path / "base+lora"))
    assert plain.adapter is None
    adapted = open_checkpoint(f"{base}+{adapter}")
    assert adapted.adapter is not None
    assert adapted.location == f"{base}+{adapter}"


def test_pluses_in_the_names_of_either_side(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "c++" / "my+lora", factors(Q, (24, 20)))
    base.rename(tmp_path / "c++" / "a+base")
    wanted = f"{tmp_path}/c++/a+base+{tmp_path}/c++/my+lora"
    assert open_checkpoint(wanted).location == wanted
    assert (
        open_checkpoint(f"{tmp_path}/c++/a+base+file://{tmp_path}/c++/my+lora").location == wanted
    )
    monkeypatch.chdir(tmp_path)
    assert absolute_checkpoint_location("c++/a+base+c++/my+lora") == wanted
    assert absolute_checkpoint_location("c++/a+base") == f"{tmp_path}/c++/a+base"


def test_two_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", factors(Q, (24, 20)))
    two = write_adapter(tmp_path / "two", factors(UP, (30, 20)))
    with pytest.raises(BadInputError, match="two adapters"):
        open_checkpoint(f"{base}+{one}+{two}")


def test_the_fingerprint_is_of_base_adapter_and_scaling(base: Path, tmp_path: Path) -> None:
    pair = factors(Q, (24, 20))
    changed = {key: value + (value == value.max()) for key, value in pair.items()}
    places = [
        str(base),
        f"{base}+{write_adapter(tmp_path / 'one', pair)}",
        f"{base}+{write_adapter(tmp_path / 'two', pair, lora_alpha=7)}",
        f"{base}+{write_adapter(tmp_path / 'three', changed)}",
        f"{write_base(tmp_path / 'other', 1)}+{tmp_path / 'one'}",
    ]
    assert len({open_checkpoint(place).fingerprint for place in places}) == len(places)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    copy = open_checkpoint(f"{base}+{tmp_path / 'copy'}")
    assert copy.fingerprint == open_checkpoint(places[1]).fingerprint


def open_remote_adapted(base: Path, adapter: Path) -> Checkpoint:
    opened = open_checkpoint(f"{base}+{adapter}")
    assert opened.adapter is not None
    weights = replace(opened.adapter.weights, store=RemoteStore(adapter))
    return replace(
        opened, store=RemoteStore(base), adapter=replace(opened.adapter, weights=weights)
    )


def test_base_and_adapter_are_copied_to_this_machine(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(Q, (24, 20)))
    remote = open_remote_adapted(base, adapter)
    assert remote.folder is None
    copy = localize(remote, tmp_path / "cache")
    assert copy.folder is not None and copy.folder.parent == tmp_path / "cache"
    assert copy.adapter is not None and copy.adapter.weights.folder is not None
    assert copy.fingerprint == remote.fingerprint
    sources = Source(remote), Source(copy)
    for tensor in ArchitectureMap(remote).tensors:
        one, two = (source.read(tensor, 0, tensor.elements) for source in sources)
        assert torch.equal(one, two)


def test_inspect_shows_the_adapter(base: Path, tmp_path: Path) -> None:
    tensors = factors(Q, (24, 20)) | {f"{PREFIX}{NORM}.weight": torch.ones(20)}
    place = f"{base}+{write_adapter(tmp_path / 'lora', tensors)}"
    overview = checkpoint_overview(place)
    assert overview["checkpoint"] == place
    assert overview["quantization"] is None
    assert overview["adapter"] == {
        "location": str(tmp_path / "lora"), "ranks": [4], "adapted_tensors": 2
    }  # fmt: skip
    console = Console(width=200, record=True)
    console.print(render_checkpoint(overview))
    assert "adapter: rank 4, tensors changed: 2" in console.export_text()


# A peer: PEFT's own merge, where it is installed


@pytest.mark.parametrize("kind", ["llama", "qwen3_5"])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "target_modules": "all-linear"},
        {"r": 8, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "o_proj"]},
        {"alpha_pattern": {r"layers\.\d\.mlp\.up_proj": 3}, "target_modules": "all-linear"},
        {"target_modules": ["embed_tokens", "k_proj", "lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
)  # fmt: skip
def test_the_values_are_those_of_pefts_merge(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    folder = write_model(tmp_path / "base", kind, seed=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(lora_alpha=6, **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(random(parameter.shape, len(name), torch.float32))
    wrapped.save_pretrained(tmp_path / "lora")
    found = adapted_values(folder, tmp_path / "lora")
    merged = wrapped.merge_and_unload().state_dict()
    changed = set()
    for name, value in merged.items():
        read = found[name.removeprefix("model.")].float()
        torch.testing.assert_close(read, value, rtol=1e-5, atol=1e-5)
        if not torch.equal(value, read_tensors(folder)[name].float()):
            changed.add(name)
    mapped = ArchitectureMap(open_checkpoint(f"{folder}+{tmp_path / 'lora'}"))
    assert changed == {tensor.stored for tensor in mapped.tensors if tensor.is_computed} != set()
