"""The probe against a plain one, and a streamed model against a whole one."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from orchestrator.mri.probe import ActivationProbe, cut_evenly, load_calibration_sets
from orchestrator.pool.calls import LocalCalls
from tests.checkpoint_files import open_remote, recipe_for, rule, write_child
from tests.families import EXPERTS, LINEAR_ATTENTION, SMALL, configuration, write_tokenizer
from workers.actors import MergeSpec, MergeWorker
from workers.checkpoints import Checkpoint, open_checkpoint
from workers.diagnostics.calibration import CalibrationSet, PromptPair
from workers.diagnostics.layers import find_decoder, find_layers
from workers.diagnostics.probe import (
    cosine_distance,
    encode,
    pack_states,
    probe_checkpoint,
    probe_model,
    probe_span,
    probe_streamed,
    unpack_states,
)
from workers.diagnostics.streaming import StreamedModel
from workers.errors import BadInputError
from workers.merging.executor import Merger

T = transformers
SLIDING = {"sliding_window": 4}
CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    name: (lambda name=name: configuration(name))
    for name in ("qwen3", "llama", "qwen3_moe", "mixtral", "qwen3_5", "qwen3_5_moe")
} | {
    "gemma2": lambda: T.Gemma2Config(**SMALL, **SLIDING, query_pre_attn_scalar=16),
    "gemma3": lambda: T.Gemma3TextConfig(
        **SMALL, **SLIDING, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma4": lambda: T.Gemma4TextConfig(
        **SMALL, **SLIDING, global_head_dim=16, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=40,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma4_moe": lambda: T.Gemma4TextConfig(
        **SMALL, **SLIDING, global_head_dim=16, num_kv_shared_layers=0,
        hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4, top_k_experts=2,
        moe_intermediate_size=16, layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "qwen3_next": lambda: T.Qwen3NextConfig(**SMALL, **LINEAR_ATTENTION, **EXPERTS),
    "deepseek_v3": lambda: T.DeepseekV3Config(
        **(SMALL | {"head_dim": 8, "num_key_value_heads": 2}), q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "dots1": lambda: T.Dots1Config(
        **SMALL, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1,
    ),
    "minimax_m2": lambda: T.MiniMaxM2Config(
        **(SMALL | {"intermediate_size": 16}), num_local_experts=4, num_experts_per_tok=2
    ),
    "ernie4_5_moe": lambda: T.Ernie4_5_MoeConfig(
        **SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1
    ),
    "glm4": lambda: T.Glm4Config(**SMALL),
    "olmo2": lambda: T.Olmo2Config(**SMALL),
    "falcon_h1": lambda: T.FalconH1Config(
        **SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
    ),
}  # fmt: skip
"""Rotary embeddings, windows, linear attention, experts, parts kept in fp32, norms of outputs, per-layer
inputs, keys and values shared by layers, layers that return tuples."""

KINDS = list(CONFIGURATIONS)
SETS = (
    CalibrationSet(
        "questions",
        (
            PromptPair("1", "what is this?", "who are you then"),
            PromptPair("2", "ab cd efg hij klm nop qrs tuv", "z y x"),
        ),
        "hash",
    ),
    CalibrationSet("letters", (PromptPair("1", "abc", "xyz"),), "hash"),
)
SAME = CalibrationSet("same", (PromptPair("1", "what is this?", "what is this?"),), "hash")


def write_kind(folder: Path, kind: str, seed: int = 1, **save: Any) -> Path:
    """A random model whose norms differ from channel to channel, as those of real models do."""
    torch.manual_seed(seed)
    model = T.AutoModelForCausalLM.from_config(CONFIGURATIONS[kind]()).to(torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn(weight.shape) * 0.1)
        for name, bias in (*model.named_buffers(), *model.named_parameters()):
            if name.endswith("e_score_correction_bias"):
                bias.copy_(torch.randn(bias.shape))
    model.save_pretrained(folder, **save)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("models")
    return {kind: open_checkpoint(str(write_kind(root / kind, kind))) for kind in KINDS}


def load(checkpoint: Checkpoint) -> tuple[Any, Any]:
    folder = checkpoint.location
    model = T.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model, T.AutoTokenizer.from_pretrained(folder)


def capture(model: Any, ids: list[int]) -> list[dict[str, list[list[float]]]]:
    """What attention and mlp of each layer return for a prompt, as lists of numbers, by hand."""
    layers = [m for n, m in model.named_modules() if n.split(".")[-2:-1] == ["layers"]]
    captured: list[dict[str, list[list[float]]]] = [{} for _ in layers]
    handles = []
    for number, layer in enumerate(layers):
        attention = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
        for component, module in (("attention", attention), ("mlp", layer.mlp)):

            def keep(
                module: Any,
                given: Any,
                output: Any,
                number: int = number,
                component: str = component,
            ) -> None:
                first = output[0] if isinstance(output, tuple) else output
                captured[number][component] = first.double().view(len(ids), -1).tolist()

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return captured


def plain_distance(one: list[float], two: list[float]) -> float:
    product = math.fsum(a * b for a, b in zip(one, two, strict=True))
    return 1 - product / math.hypot(*one) / math.hypot(*two)


def plain_mean(tokens: list[list[float]]) -> list[float]:
    """Over the tokens behind the first, which is `<s>`."""
    return [math.fsum(column) / len(column) for column in zip(*tokens[1:], strict=True)]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_moe", "qwen3_5", "qwen3_5_moe"])
def test_distances_are_those_of_a_plain_run(kind: str, checkpoints: dict[str, Checkpoint]) -> None:
    model, tokenizer = load(checkpoints[kind])
    found = probe_model(model, tokenizer, SETS, "model")
    for calibration in SETS:
        expected: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for pair in calibration.pairs:
            one, two = (
                capture(model, tokenizer(text)["input_ids"])
                for text in (pair.conditioned, pair.generic)
            )
            for layer, (first, second) in enumerate(zip(one, two, strict=True)):
                for component in ("attention", "mlp"):
                    a, b = first[component], second[component]
                    expected.setdefault((layer, component), []).append(
                        (plain_distance(plain_mean(a), plain_mean(b)), plain_distance(a[-1], b[-1]))
                    )
        rows = found[calibration.name]
        assert [(row["layer"], row["component"]) for row in rows] == list(expected)
        for row in rows:
            pairs = expected[row["layer"], row["component"]]
            means = [math.fsum(values) / len(values) for values in zip(*pairs, strict=True)]
            assert [row["mean_token"], row["last_token"]] == pytest.approx(means, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_equals_whole_equals_transformers(
    kind: str, checkpoints: dict[str, Checkpoint]
) -> None:
    """Bit by bit, also of what `from_pretrained` loads."""
    streamed = probe_checkpoint(checkpoints[kind], SETS, streamed=True)
    assert probe_checkpoint(checkpoints[kind], SETS, streamed=False) == streamed
    model, tokenizer = load(checkpoints[kind])
    assert probe_model(model, tokenizer, SETS, "model") == streamed
    values = [row["last_token"] for row in streamed["questions"]]
    assert len(set(values)) == len(values) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_behind_the_last_layer(kind: str, checkpoints: dict[str, Checkpoint]) -> None:
    """What goes from layer to layer, not only what is probed: compared where the model norms it."""
    streamed = StreamedModel(checkpoints[kind])
    prompts = encode(streamed.tokenizer, SETS, "model")
    states = streamed.run_span(0, len(streamed.layers), streamed.begin(prompts))
    model, _ = load(checkpoints[kind])
    decoder = model.get_submodule(find_decoder(model).name)
    norm = decoder.final_layernorm if kind == "falcon_h1" else decoder.norm
    seen: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.inference_mode():
        for prompt in prompts:
            model(prompt)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(states, seen, strict=True))
    assert len(seen) == 6


def test_a_prompt_is_not_told_from_itself(checkpoints: dict[str, Checkpoint]) -> None:
    for row in probe_checkpoint(checkpoints["qwen3_5"], [SAME])["same"]:
        assert (row["mean_token"], row["last_token"]) == (0.0, 0.0)


def test_attention_and_mlp_of_a_layer_differ(checkpoints: dict[str, Checkpoint]) -> None:
    rows = probe_checkpoint(checkpoints["llama"], SETS)["questions"]
    for attention, mlp in zip(rows[::2], rows[1::2], strict=True):
        assert (attention["layer"], attention["component"]) == (mlp["layer"], "attention")
        assert mlp["component"] == "mlp"
        assert attention["mean_token"] != mlp["mean_token"]
        assert attention["last_token"] != mlp["last_token"]


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "gemma4_moe", "olmo2", "glm4"])
def test_what_is_probed_is_what_is_added(kind: str, checkpoints: dict[str, Checkpoint]) -> None:
    """These norm outputs before they add them: input + both contributions must be the layer's output."""
    model, tokenizer = load(checkpoints[kind])
    layer = find_decoder(model).layers[1]
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, given, output: seen.__setitem__(name, output)

    for name, module in layer.outputs.items():
        module.register_forward_hook(hook(name))
    layer.module.register_forward_pre_hook(lambda module, given: seen.__setitem__("in", given[0]))
    layer.module.register_forward_hook(hook("out"))
    with torch.inference_mode():
        model(tokenizer("what is this?", return_tensors="pt")["input_ids"])
    added = seen["in"] + seen["attention"] + seen["mlp"]
    if kind == "gemma4_moe":
        added = added * layer.module.layer_scalar
    assert torch.equal(added, seen["out"])


def test_a_result_is_a_prompts_own(checkpoints: dict[str, Checkpoint]) -> None:
    """Whatever other sets, and longer prompts, are probed with it."""
    together = probe_checkpoint(checkpoints["qwen3_5_moe"], [*SETS, SAME])
    for calibration in (*SETS, SAME):
        alone = probe_checkpoint(checkpoints["qwen3_5_moe"], [calibration])
        assert alone[calibration.name] == together[calibration.name]


@pytest.mark.parametrize("kind", ["llama", "qwen3_5_moe", "gemma4"])
def test_memory_holds_one_layer(kind: str, checkpoints: dict[str, Checkpoint]) -> None:
    model = StreamedModel(checkpoints[kind])
    own = [sum(w.numel() for w in layer.module.state_dict().values()) for layer in model.layers]
    outside = sum(
        weight.numel()
        for name, weight in model.decoder.module.state_dict().items()
        if not name.startswith("layers.")
    )
    assert model.materialized == 0
    held: list[tuple[int, int]] = []
    model.model.get_input_embeddings().register_forward_hook(
        lambda module, given, output: held.append((-1, model.materialized))
    )
    states = model.begin(encode(model.tokenizer, SETS, "model"))
    assert {count for _, count in held} == {outside}
    held.clear()

    def around(layer: Any, number: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        held.append((layer.index, model.materialized))
        return run()

    model.run_span(0, len(own), states, around)
    assert sorted(set(held)) == list(enumerate(own))
    assert model.materialized == 0


@pytest.mark.parametrize(
    ("kind", "experts"),
    [("qwen3_5_moe", 1), ("qwen3_moe", 3), ("mixtral", 2), ("gemma4_moe", 1), ("deepseek_v3", 1)],
)
def test_experts_in_blocks(
    kind: str, experts: int, checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit what the whole model gives, with so many experts in memory at once."""
    checkpoint = checkpoints[kind]
    others = {"dense": checkpoints["qwen3"], "same": checkpoint}
    expected = probe_checkpoint(checkpoint, SETS, streamed=False, others=others)
    size = 3 * 32 * (16 if kind != "mixtral" else 48)
    model = StreamedModel(checkpoint, block_bytes=2 * size * experts)
    read, run = model.read_experts, model._run
    of_experts: list[int] = []
    of_layers: list[int] = []

    def watched_read(names: Any, numbers: Any) -> Any:
        found = read(names, numbers)
        of_experts.append(sum(values.numel() for values in found.values()))
        return found

    def watched_run(*given: Any) -> Any:
        of_layers.append(model.materialized)
        return run(*given)

    if kind == "mixtral":  # each prompt by itself: more than one are too much
        monkeypatch.setattr("workers.diagnostics.streaming.OUTPUT_BYTES", 1)
    monkeypatch.setattr(model, "read_experts", watched_read)
    monkeypatch.setattr(model, "_run", watched_run)
    assert probe_streamed(model, SETS, others) == expected
    assert max(of_experts) == experts * size
    if kind == "qwen3_5_moe":
        assert len(of_experts) == 4 * 4, "each expert of each layer is read once for all prompts"
    without_experts = [
        sum(
            weight.numel()
            for name, weight in layer.module.state_dict().items()
            if not re.search(r"(^|\.)experts\.", name)
        )
        for layer in model.layers
    ]
    assert max(of_layers) == max(without_experts)
    assert model.materialized == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
@pytest.mark.parametrize("kind", ["qwen3", "gemma4"])
def test_the_process_gives_back_what_a_layer_took(kind: str, tmp_path: Path) -> None:
    """Not only the tensors go: what the process holds does not grow from layer to layer.

    Gemma 4 also stores a buffer with each layer.
    """
    size = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "head_dim": 64}
    wide = SMALL | size | {"num_attention_heads": 16, "num_key_value_heads": 8}
    config = {
        "qwen3": lambda: T.Qwen3Config(**wide),
        "gemma4": lambda: T.Gemma4TextConfig(
            **wide, global_head_dim=64, num_kv_shared_layers=0, hidden_size_per_layer_input=0,
            layer_types=["full_attention"] * 6,
        ),
    }[kind]()  # fmt: skip
    with torch.device("meta"):
        model = T.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for weight in model.state_dict().values():
        weight.data.fill_(0.01)
    model.save_pretrained(tmp_path)
    del model
    write_tokenizer(tmp_path)

    def held() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024

    model = StreamedModel(open_checkpoint(str(tmp_path)))
    layer = 2 * sum(weight.numel() for weight in model.layers[0].module.parameters())
    states = model.begin(encode(model.tokenizer, SETS, "model"))
    taken: list[int] = []

    def around(layer: Any, number: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        taken.append(held())
        return run()

    model.run_span(0, 6, states, around)
    by_layer = [max(taken[first : first + len(states)]) for first in range(0, len(taken), 6)]
    assert len(by_layer) == 6
    # The first layers also pay for what the kernels keep for themselves.
    assert max(by_layer[3:]) - by_layer[2] < layer


def run_spans(folder: str, first: int, last: int, packed: Any, answers: Any) -> None:
    model = StreamedModel(open_checkpoint(folder))
    states = None if packed is None else unpack_states(packed)
    rows, states = probe_span(model, SETS, first, last, states)
    answers.put((rows, pack_states(states)))


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_moe"])
@pytest.mark.parametrize("cuts", [(0, 1, 4), (0, 2, 3, 4)])
def test_spans_compose(
    kind: str, cuts: tuple[int, ...], checkpoints: dict[str, Checkpoint]
) -> None:
    states = None
    rows: dict[str, list[dict[str, Any]]] = {calibration.name: [] for calibration in SETS}
    for first, last in pairwise(cuts):
        model = StreamedModel(checkpoints[kind])
        found, states = probe_span(model, SETS, first, last, states)
        for name, own in found.items():
            rows[name] += own
    assert rows == probe_checkpoint(checkpoints[kind], SETS)


def test_spans_in_processes_compose(checkpoints: dict[str, Checkpoint]) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    states = None
    rows: dict[str, list[dict[str, Any]]] = {calibration.name: [] for calibration in SETS}
    for first, last in ((0, 1), (1, 4)):
        folder = checkpoints["qwen3_5"].location
        process = context.Process(target=run_spans, args=(folder, first, last, states, answers))
        process.start()
        found, states = answers.get(timeout=300)
        process.join()
        for name, own in found.items():
            rows[name] += own
    assert rows == probe_checkpoint(checkpoints["qwen3_5"], SETS)


def test_layers_that_share_more_than_hidden_states_are_not_divided(
    checkpoints: dict[str, Checkpoint],
) -> None:
    model = StreamedModel(checkpoints["gemma4"])
    states = model.begin(encode(model.tokenizer, SETS, "model"))
    with pytest.raises(BadInputError, match=r"share 'shared_kv_states': they cannot be divided"):
        model.run_span(2, 4, states)


def test_other_layouts_and_stores(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """One file per expert, many files, and a store that is not this machine's disk."""
    expected = probe_checkpoint(checkpoints["qwen3_moe"], SETS)
    folder = write_kind(tmp_path / "shards", "qwen3_moe", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert probe_checkpoint(open_checkpoint(str(folder)), SETS) == expected
    remote = open_remote(folder)
    assert probe_checkpoint(remote, SETS) == expected
    assert probe_streamed(StreamedModel(remote, block_bytes=1), SETS) == expected


def test_fp8_codes_are_dequantized(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """As the model whose weights are codes times scales, rounded to BF16."""
    values = {}

    def pack(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            codes = (tensors[name].float() * 8192).to(torch.float8_e4m3fn)
            values[name] = (codes.float() / 8192).to(torch.bfloat16)
            tensors[name] = codes
            tensors[f"{name}_scale_inv"] = torch.full(
                tuple(-(-size // 16) for size in codes.shape), 1 / 8192
            )

    packed = changed(checkpoints["qwen3_moe"], tmp_path / "fp8", pack)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    packed = open_checkpoint(packed.location)
    assert values.keys() > {"model.layers.0.mlp.experts.0.gate_proj.weight"}
    plain = changed(checkpoints["qwen3_moe"], tmp_path / "bf16", lambda t: t.update(values))
    model, tokenizer = load(plain)
    expected = probe_model(model, tokenizer, SETS, "model")
    assert probe_checkpoint(packed, SETS) == expected
    assert probe_streamed(StreamedModel(packed, block_bytes=1), SETS) == expected
    assert probe_checkpoint(packed, SETS) != probe_checkpoint(checkpoints["qwen3_moe"], SETS)


def test_an_adapter_is_added(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """As the child that copies the adapted parent, written out and loaded by transformers."""
    base = checkpoints["llama"].location
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    generator = torch.Generator().manual_seed(3)
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    save_file(
        {
            f"{module}.lora_A.weight": torch.randn(4, 32, generator=generator),
            f"{module}.lora_B.weight": torch.randn(32, 4, generator=generator),
        },
        adapter / "adapter_model.safetensors",
    )
    adapted = open_checkpoint(f"{base}+{adapter}")
    merger = Merger({"a": adapted, "b": checkpoints["llama"]})
    recipe = recipe_for(merger, rule("passthrough", source="a"))
    child = open_checkpoint(str(write_child(merger, recipe, tmp_path / "child")))
    model, tokenizer = load(child)
    rows = probe_checkpoint(adapted, SETS)
    assert rows == probe_model(model, tokenizer, SETS, "model")
    plain = probe_checkpoint(checkpoints["llama"], SETS)["letters"]
    same = [one == two for one, two in zip(rows["letters"], plain, strict=True)]
    assert same == [True, True, *[False] * 6]


def calls_to(parents: dict[str, Checkpoint], processes: int = 1) -> LocalCalls:
    worker = MergeWorker(MergeSpec({}, None, {}))
    worker.parents = parents
    return LocalCalls(worker, processes)


def test_parents_are_probed_by_workers(checkpoints: dict[str, Checkpoint]) -> None:
    parents = {"father": checkpoints["qwen3"], "mother": checkpoints["qwen3_5"]}
    found = ActivationProbe(SETS).run(parents, calls_to(parents))
    assert found["sets"] == {
        "questions": {"prompts": 2, "sha256": "hash"},
        "letters": {"prompts": 1, "sha256": "hash"},
    }
    assert found["parents"] == {
        name: probe_checkpoint(parent, SETS) for name, parent in parents.items()
    }
    assert list(found["parents"]) == ["father", "mother"]
    assert ActivationProbe(SETS, streamed=False).run(parents, calls_to(parents)) == found
    assert ActivationProbe(SETS, spans=3).run(parents, calls_to(parents)) == found
    assert ActivationProbe(SETS, spans=9).run(parents, calls_to(parents)) == found


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "deepseek_v3"])
def test_experts_are_divided_among_workers(
    kind: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """However many: what the whole model gives, also where a layer has no experts."""
    other = open_checkpoint(str(write_kind(tmp_path, kind, seed=2)))
    parents = {"father": checkpoints[kind], "mother": other}
    expected = ActivationProbe(SETS, streamed=False).run(parents, calls_to(parents))
    for shards, processes in ((2, 2), (3, 1), (9, 1)):
        found = ActivationProbe(SETS, shards=shards).run(parents, calls_to(parents, processes))
        assert found == expected
    routing = expected["parents"]["father"]["letters"][-1]["routing"]
    assert set(routing["overlap"]) == {"mother"}


def test_spans_cover_the_layers() -> None:
    assert cut_evenly(4, 2) == [(0, 2), (2, 4)]
    assert cut_evenly(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert cut_evenly(2, 5) == [(0, 1), (1, 2)]


def test_the_shipped_family() -> None:
    """Its own sets: a skill's tag, or the tag of copying, before the same letters."""
    skills = ("reverse", "sort", "shift")
    sets = load_calibration_sets([f"strings_{skill}" for skill in skills])
    parents = {skill: open_checkpoint(f"shipped:strings/{skill}") for skill in skills}
    found = ActivationProbe(sets).run(parents, calls_to(parents, processes=2))["parents"]
    for rows in (rows for of_parent in found.values() for rows in of_parent.values()):
        assert len(rows) == 8
        assert all(0 < row["mean_token"] < 2 and 0 < row["last_token"] < 2 for row in rows)
    assert found["reverse"] == probe_checkpoint(parents["reverse"], sets)
    with pytest.raises(BadInputError, match=r"does not know .* set 'math': probe with a set"):
        probe_checkpoint(parents["sort"], load_calibration_sets(["math"]))
    # The tokenizer of the mixtures writes no unknown tokens: it drops what it does not know.
    mixture, korean = open_checkpoint("shipped:strings_moe/sort"), load_calibration_sets(["korean"])
    with pytest.raises(BadInputError, match=r"does not know .* set 'korean': probe with a set"):
        probe_checkpoint(mixture, korean)


def test_cosine_distance() -> None:
    one = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert cosine_distance(one, one * 7) == 0.0
    assert cosine_distance(one, -one) == pytest.approx(2.0)
    assert cosine_distance(one, torch.tensor([-4.0, 3.0]).double()) == pytest.approx(1.0)
    assert cosine_distance(one, one * 0) is None
    close = torch.tensor([3.0, 4.0 + 1e-7], dtype=torch.float64)
    angle = math.atan2(4.0 + 1e-7, 3.0) - math.atan2(4.0, 3.0)
    assert cosine_distance(one, close) == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-6)


def changed(
    checkpoint: Checkpoint, folder: Path, change: Callable[[dict[str, Any]], None]
) -> Checkpoint:
    """A copy with other tensors."""
    shutil.copytree(checkpoint.location, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_checkpoint(str(folder))


def test_a_component_that_adds_nothing_has_no_distance(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    def silence(tensors: dict[str, Any]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"].zero_()

    rows = probe_checkpoint(changed(checkpoints["llama"], tmp_path / "m", silence), SETS)["letters"]
    undefined = [(row["layer"], row["component"]) for row in rows if row["mean_token"] is None]
    assert undefined == [(2, "mlp")]
    assert rows[5]["last_token"] is None


def test_what_cannot_be_probed_is_refused(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    def break_number(tensors: dict[str, Any]) -> None:
        tensors["model.layers.2.self_attn.o_proj.weight"][0, 0] = math.nan

    def remove(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def cut(tensors: dict[str, Any]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()

    for number, (change, problem) in enumerate(
        (
            (break_number, "attention of layer 2 gives activations that are not finite"),
            (remove, r"lacks the weight 'layers\.1\.mlp\.up_proj\.weight' of LlamaForCausalLM"),
            (cut, r"is stored as \[48, 31\], LlamaForCausalLM wants \[48, 32\]"),
        )
    ):
        broken = changed(checkpoints["llama"], tmp_path / str(number), change)
        with pytest.raises(BadInputError, match=problem):
            probe_checkpoint(broken, SETS)
    model = T.AutoModelForCausalLM.from_config(
        T.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=40)
    )
    with pytest.raises(BadInputError, match="GPT2LMHeadModel: no decoder layers found"):
        find_decoder(model)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_of_the_configuration(kind: str) -> None:
    with torch.device("meta"):
        model = T.AutoModelForCausalLM.from_config(CONFIGURATIONS[kind]())
    assert list(find_layers(model)) == [f"model.layers.{number}" for number in range(4)]
    model.config.get_text_config().num_hidden_layers = 5
    assert len(find_layers(model)) == 4, "the names tell"


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (T.GPT2Config(n_layer=2, n_head=1, n_embd=8, vocab_size=40), "transformer.h"),
        (
            T.OPTConfig(
                num_hidden_layers=2, num_attention_heads=1, hidden_size=8, vocab_size=40,
                word_embed_proj_dim=8,
            ),
            "model.decoder.layers",
        ),
    ],
)  # fmt: skip
def test_layers_of_other_names_are_found_by_their_number(config: Any, names: str) -> None:
    with torch.device("meta"):
        model = T.AutoModelForCausalLM.from_config(config)
    assert list(find_layers(model)) == [f"{names}.0", f"{names}.1"]
    assert all(model.get_submodule(n) is layer for n, layer in find_layers(model).items())
    with pytest.raises(BadInputError, match="no decoder layers found"):
        find_decoder(model)
    config.num_hidden_layers = 3
    assert find_layers(model) == {}


def test_layers_behind_another_prefix_are_found_by_name() -> None:
    config = T.GPTNeoXConfig(
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_size=8,
        intermediate_size=8,
        vocab_size=40,
    )
    model = T.AutoModelForCausalLM.from_config(config)
    decoder = find_decoder(model)
    assert decoder.module is model.gpt_neox
    for layer, module in zip(decoder.layers, model.gpt_neox.layers, strict=True):
        assert layer.module is module
        assert layer.outputs == {"attention": module.attention, "mlp": module.mlp}


def test_a_tower_of_as_many_layers_is_not_the_decoder() -> None:
    decoder = T.GPT2LMHeadModel(T.GPT2Config(n_layer=2, n_head=1, n_embd=8, vocab_size=40))
    model = torch.nn.Module()
    model.vision = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    model.language_model = decoder
    model.config = decoder.config
    model.get_decoder = decoder.get_decoder
    found = ["language_model.transformer.h.0", "language_model.transformer.h.1"]
    assert list(find_layers(model)) == found


def test_a_kept_probe_is_of_the_same_software_and_threads(
    checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of other versions, or of other numbers of threads, differ in the last digits."""
    known = ActivationProbe(SETS).identity
    assert known == ActivationProbe(SETS).identity
    for package in ("torch", "transformers"):
        with monkeypatch.context() as other:
            other.setattr(
                "orchestrator.mri.probe.version",
                lambda name, package=package: "0.0" if name == package else version(name),
            )
            assert ActivationProbe(SETS).identity != known
    with monkeypatch.context() as other:
        other.setattr("orchestrator.mri.probe.ROWS_FORM", 1)  # without merits and overlaps
        assert ActivationProbe(SETS).identity != known
    seen: list[int] = []
    begin = StreamedModel.begin

    def watched(model: StreamedModel, prompts: Any) -> Any:
        seen.append(torch.get_num_threads())
        return begin(model, prompts)

    monkeypatch.setattr(StreamedModel, "begin", watched)
    for threads in (1, 3):
        worker = MergeWorker(MergeSpec({}, None, {}, threads=threads))
        worker.parents = {"father": checkpoints["llama"]}
        worker.probe("father", SETS, True)
        worker.probe_span("father", SETS, (0, 2), None)
    assert len(seen) == 4
    assert set(seen) == {known["threads"]}


def test_torch_keeps_its_threads(checkpoints: dict[str, Checkpoint]) -> None:
    before = torch.get_num_threads()
    probe_checkpoint(checkpoints["llama"], [SAME], threads=before + 1)
    assert torch.get_num_threads() == before
