"""Routing of experts: counted as a plain run of the router chooses, and what is called dead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.mri.dead_experts import dead_by_layer, dead_expert_notes, dead_experts
from tests.unit.test_probe import SETS, load, write_kind
from workers.checkpoints import open_checkpoint
from workers.diagnostics.probe import probe_checkpoint


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen3_5_moe"])
def test_choices_and_weights_are_those_of_the_router(kind: str, tmp_path: Path) -> None:
    """By the definition: a softmax over all experts, the k largest, made to sum to 1 if the model says so."""
    checkpoint = open_checkpoint(str(write_kind(tmp_path, kind)))
    model, tokenizer = load(checkpoint)
    model.float()
    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    states: dict[int, list[torch.Tensor]] = {}
    routers = {}
    for number, layer in enumerate(model.base_model.layers):

        def keep(module: Any, arguments: Any, number: int = number) -> None:
            states.setdefault(number, []).append(arguments[0].reshape(-1, config.hidden_size))

        layer.mlp.register_forward_pre_hook(keep)
        routers[number] = layer.mlp.gate.weight.double()
    found = probe_checkpoint(checkpoint, SETS, dtype="float32")
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
            shares, chosen = (
                (inputs @ routers[row["layer"]].T).softmax(-1).topk(config.num_experts_per_tok)
            )
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
