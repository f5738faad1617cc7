"""Routing of experts: counted as a plain run of router and experts chooses and adds, and what is dead."""

from __future__ import annotations

import math
import re
import shutil
from base64 import b64decode
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

from orchestrator.mri.dead_experts import dead_by_layer, dead_expert_notes, dead_experts
from orchestrator.mri.expert_charts import expert_figures
from orchestrator.mri.experts import (
    expert_notes,
    relative_frequency,
    routing_by_layer,
    summarize_experts,
)
from tests.checkpoint_files import read_tensors
from tests.families import EXPERTS, SMALL, write_tokenizer
from tests.unit.test_probe import SETS, load, write_kind
from workers.checkpoints import open_checkpoint
from workers.diagnostics.calibration import CalibrationSet
from workers.diagnostics.layers import find_decoder
from workers.diagnostics.probe import probe_checkpoint
from workers.diagnostics.routing import routed

MIXTURES = ["qwen3_moe", "mixtral", "qwen3_5_moe", "gemma4_moe", "deepseek_v3", "dots1"]


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen3_5_moe"])
def test_choices_and_weights_are_those_of_the_router(kind: str, tmp_path: Path) -> None:
    """By the definition: a softmax over all experts, the k largest, made to sum to 1 if the model says so."""
    checkpoint = open_checkpoint(str(write_kind(tmp_path / "own", kind)))
    model, tokenizer = load(checkpoint)
    model.float().requires_grad_(False)
    other = open_checkpoint(str(write_kind(tmp_path / "other", kind, seed=2)))
    others = load(other)[0].double().requires_grad_(False).base_model.layers
    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    states: dict[int, list[torch.Tensor]] = {}
    routers = {}
    for number, layer in enumerate(model.base_model.layers):

        def keep(module: Any, arguments: Any, number: int = number) -> None:
            states.setdefault(number, []).append(arguments[0].reshape(-1, config.hidden_size))

        layer.mlp.register_forward_pre_hook(keep)
        routers[number] = layer.mlp.gate.weight.double()
    found = probe_checkpoint(checkpoint, SETS, dtype="float32", others={"mother": other})
    for calibration in SETS:
        states.clear()
        with torch.inference_mode():
            for pair in calibration.pairs:
                for text in (pair.conditioned, pair.generic):
                    ids = torch.tensor([tokenizer(text)["input_ids"]])
                    model(input_ids=ids, use_cache=False)
        rows = [row for row in found[calibration.name] if row["component"] == "mlp"]
        assert all("routing" not in row for row in found[calibration.name] if row not in rows)
        for row in rows:
            inputs = torch.cat(states[row["layer"]]).double()
            softmax = (inputs @ routers[row["layer"]].T).softmax(-1)
            shares, chosen = softmax.topk(config.num_experts_per_tok)
            if getattr(config, "norm_topk_prob", True):
                shares = shares / shares.sum(-1, keepdim=True)
            routing = row["routing"]
            assert routing["tokens"] == len(inputs)
            assert routing["per_token"] == config.num_experts_per_tok
            counts = torch.bincount(chosen.reshape(-1), minlength=experts)
            assert routing["choices"] == counts.tolist()
            sums = torch.zeros(experts, dtype=torch.float64)
            sums.index_add_(0, chosen.reshape(-1), shares.reshape(-1))
            assert routing["weights"] == pytest.approx((sums / len(inputs)).tolist(), abs=1e-5)
            merit = torch.zeros(experts, dtype=torch.float64)
            weights = deepcopy(model.base_model.layers[row["layer"]].mlp.experts).double()
            for token, own in enumerate(zip(chosen.tolist(), shares.tolist(), strict=True)):
                for expert, share in zip(*own, strict=True):
                    gate, up = (weights.gate_up_proj[expert] @ inputs[token]).chunk(2)
                    added = weights.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    merit[expert] += share * added.square().sum().sqrt()
            assert routing["merit"] == pytest.approx((merit / len(inputs)).tolist(), rel=1e-5)
            load_shares = (counts / counts.sum()).tolist()
            assert routing["load_entropy"] == pytest.approx(
                -sum(share * math.log2(share) for share in load_shares if share)
            )
            entropies = -(softmax * softmax.log2()).sum(-1)
            assert routing["token_entropy"] == pytest.approx(float(entropies.mean()), rel=1e-5)
            wanted = (inputs @ others[row["layer"]].mlp.gate.weight.T).topk(
                config.num_experts_per_tok
            )
            pairs = zip(chosen.tolist(), wanted.indices.tolist(), strict=True)
            common = [len(set(one) & set(two)) / config.num_experts_per_tok for one, two in pairs]
            assert routing["overlap"] == {"mother": pytest.approx(sum(common) / len(common))}


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [*((kind, "grouped_mm") for kind in MIXTURES), ("mixtral", "batched_mm"), ("dots1", "eager")],
)
def test_the_model_is_not_changed_by_looking(
    kind: str, implementation: str, tmp_path: Path
) -> None:
    """The same bits behind the last layer, however transformers runs its experts."""
    model, tokenizer = load(open_checkpoint(str(write_kind(tmp_path, kind))))
    model.set_experts_implementation(implementation)
    ids = torch.tensor([tokenizer("what is this? who are you then")["input_ids"]])
    with torch.inference_mode():
        expected = model.base_model(ids).last_hidden_state
        with routed(find_decoder(model).layers) as seen:
            found = model.base_model(ids).last_hidden_state
        again = model.base_model(ids).last_hidden_state
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert len(seen) == (4 if "experts" not in kind and kind not in ("deepseek_v3", "dots1") else 3)
    for routing in seen.values():
        assert (routing.norms > 0).tolist() == (routing.choices > 0).tolist()


def test_a_sigmoid_has_no_entropy(tmp_path: Path) -> None:
    """DeepSeek's router; its choices by groups and correction biases are made with the other one's."""
    checkpoint = open_checkpoint(str(write_kind(tmp_path / "own", "deepseek_v3")))
    other = open_checkpoint(str(write_kind(tmp_path / "other", "deepseek_v3", seed=2)))
    rows = probe_checkpoint(checkpoint, SETS, others={"same": checkpoint, "mother": other})
    found = [row["routing"] for row in rows["questions"] if "routing" in row]
    assert len(found) == 3
    for routing in found:
        assert "token_entropy" not in routing
        assert "load_entropy" in routing
        assert routing["overlap"]["same"] == 1.0
    assert min(routing["overlap"]["mother"] for routing in found) < 1.0


@pytest.mark.parametrize("kind", ["minimax_m2", "ernie4_5_moe"])
def test_choices_of_others_are_made_with_their_biases(kind: str, tmp_path: Path) -> None:
    """Wherever these are kept: of two models that differ in the biases alone, where these are so large that
    nothing else counts, the overlap is that of the experts with the largest."""
    folder = write_kind(tmp_path / "own", kind)
    tensors = read_tensors(folder)
    biases = {key: value for key, value in tensors.items() if key.endswith("correction_bias")}
    assert len(biases) in (3, 4)
    found = {}
    for name, large in (("own", (0, 1)), ("mother", (0, 2)), ("other", (2, 3))):
        changed = dict(tensors)
        for key, bias in biases.items():
            row = torch.zeros(4).index_fill_(0, torch.tensor(large), 100.0)
            changed[key] = row.view(bias.shape).to(bias.dtype)
        target = shutil.copytree(folder, tmp_path / f"{name}_biased")
        safetensors.torch.save_file(changed, target / "model.safetensors", {"format": "pt"})
        found[name] = open_checkpoint(str(target))
    others = {"same": found["own"], "mother": found["mother"], "other": found["other"]}
    rows = probe_checkpoint(found["own"], SETS, others=others)["questions"]
    overlaps = [row["routing"]["overlap"] for row in rows if "routing" in row]
    assert overlaps == [{"same": 1.0, "mother": 0.5, "other": 0.0}] * len(biases)


def test_a_router_of_another_shape_is_not_compared(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_kind(tmp_path / "own", "qwen3_moe")))
    dense = open_checkpoint(str(write_kind(tmp_path / "dense", "qwen3")))
    (row, *_) = [
        r
        for r in probe_checkpoint(checkpoint, SETS, others={"d": dense})["letters"]
        if "routing" in r
    ]
    assert "overlap" not in row["routing"]
    assert "token_entropy" in row["routing"]


def test_a_planted_dead_expert_is_found(tmp_path: Path) -> None:
    """Two of the rows u, -u, v, -v give something positive: a row of zeros is never one of the first two."""
    torch.manual_seed(1)
    config = transformers.Qwen3MoeConfig(**SMALL, **(EXPERTS | {"num_experts": 6}))
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    dead = {0: 4, 1: 0, 2: 5, 3: 2}
    with torch.no_grad():
        for layer, expert in dead.items():
            u, v = torch.randn(2, 32)
            rows = torch.stack([u, -u, v, -v, u + v]).bfloat16()
            alive = [number for number in range(6) if number != expert]
            weight = model.model.layers[layer].mlp.gate.weight
            weight[alive], weight[expert] = rows, 0.0
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    rows = probe_checkpoint(open_checkpoint(str(tmp_path)), SETS)
    scan = {"probe": {"parents": {"mother": rows}}}
    assert dead_by_layer(scan)["mother"] == {layer: [expert] for layer, expert in dead.items()}
    for layer, routing in routing_by_layer(scan)["mother"].items():
        assert routing["merit"][dead[layer]] == 0.0
        frequency = relative_frequency(routing)
        assert frequency[dead[layer]] == 0.0
        assert sum(frequency) == pytest.approx(6)


def test_sets_together_are_one_set_of_all_prompts(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_kind(tmp_path / "own", "qwen3_moe")))
    other = open_checkpoint(str(write_kind(tmp_path / "other", "qwen3_moe", seed=2)))
    whole = CalibrationSet("all", tuple(pair for one in SETS for pair in one.pairs), "hash")
    probed = probe_checkpoint(checkpoint, [*SETS, whole], others={"mother": other})
    expected = [row["routing"] for row in probed.pop("all") if "routing" in row]
    found = routing_by_layer({"probe": {"parents": {"father": probed}}})["father"]
    for routing, own in zip(found.values(), expected, strict=True):
        assert routing.keys() == own.keys()
        for key, value in own.items():
            assert routing[key] == (
                {name: pytest.approx(share) for name, share in value.items()}
                if key == "overlap"
                else pytest.approx(value)
            )


def routing_of(choices: list[int], **found: Any) -> dict[str, Any]:
    return {"tokens": sum(choices) // 2, "per_token": 2, "choices": choices, **found}


def test_routers_in_words() -> None:
    layers = {
        1: routing_of([5, 5, 5, 5], load_entropy=2.0, token_entropy=1.5, overlap={"father": 0.5}),
        4: routing_of([10, 10, 0, 0], load_entropy=1.0, token_entropy=0.5, overlap={"father": 0.9}),
    }
    assert expert_notes(summarize_experts({"mother": layers})) == [
        "routers of mother choose 2 of 4 experts; load entropy 1.50 of 2.00 bits, least 1.00 in layer 4; "
        "entropy per token 1.00",
        "of the experts that mother chooses, the routers of others would choose, too: father 70% "
        "(least 50% in layer 1)",
    ]
    layers[1]["overlap"]["father"], layers[4]["overlap"]["father"] = 0.5, 0.56
    assert expert_notes(summarize_experts({"mother": layers}))[2].startswith(
        "the router of father agrees with mother no more than by chance (50%): their experts may have other "
    )
    without = {"mother": {1: routing_of([5, 5, 5, 5], load_entropy=2.0)}}
    (line,) = expert_notes(summarize_experts(without))
    assert line.endswith("least 2.00 in layer 1")
    assert expert_notes(summarize_experts({})) == []


def test_a_map_of_many_experts_is_a_small_image_of_them() -> None:
    """A pixel for each: deeper where chosen more often, clear where never, or where there are no experts."""
    layers = {
        layer: routing_of([(37 * layer + 11 * expert) % 50 for expert in range(512)])
        for layer in range(3, 60)
    }
    (figure,) = expert_figures({"mother": layers}, ["father", "mother"])
    (image,) = re.findall(r'href="data:image/png;base64,([^"]*)"', figure["chart"])
    assert len(figure["chart"]) < 40_000
    with Image.open(BytesIO(b64decode(image))) as opened:
        assert opened.size == (512, 60)
        pixels = opened.convert("RGBA")
    for layer in range(60):
        depths = [pixels.getpixel((e, layer))[3] for e in range(512)]
        counts = layers[layer]["choices"] if layer in layers else [0] * 512
        ordered = [depth for _, depth in sorted(zip(counts, depths, strict=True))]
        assert ordered == sorted(ordered)
        assert [depth == 0 for depth in depths] == [count == 0 for count in counts]
    again = expert_figures({"mother": layers}, ["father", "mother"])
    assert again == [figure]


def test_a_balanced_layer_has_no_dead_experts() -> None:
    """Each of 256 is chosen for 3.1 % of the tokens if 8 are: the published rule would call all dead."""
    tokens, experts, per_token = 6400, 256, 8
    choices = [tokens * per_token // experts] * experts
    assert choices[0] / tokens < 0.05
    assert dead_experts(choices, tokens, per_token) == []
    choices[3], choices[7] = 9, 10  # of 200 at an even load
    assert dead_experts(choices, tokens, per_token) == [3]


def test_few_tokens_tell_nothing() -> None:
    assert dead_experts([0] * 256, 100, 8) is None


def scan_of(*choices: list[int]) -> dict[str, Any]:
    rows = [
        {"layer": 4, "component": "mlp", "mean_token": 0.1, "last_token": 0.1,
         "routing": {"tokens": 20, "per_token": 2, "choices": own, "weights": [0.5] * 4}}
        for own in choices
    ]  # fmt: skip
    return {"probe": {"parents": {"mother": {f"set{n}": [row] for n, row in enumerate(rows)}}}}


def test_an_expert_of_one_set_is_not_dead() -> None:
    """All sets count together: an expert for Korean is silent in code."""
    assert dead_by_layer(scan_of([40, 0, 0, 0], [0, 20, 20, 0])) == {"mother": {4: [3]}}
    (line,) = dead_expert_notes(dead_by_layer(scan_of([40, 0, 0, 0], [0, 20, 20, 0])))
    assert line == (
        "dead experts of mother (chosen less than 5% as often as at an even load): 1 (layer 4: 1)"
    )
    assert dead_by_layer({"probe": {}}) == {}
