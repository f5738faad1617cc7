"""Scans and probes split over real Ray workers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.campaigns import run_darwin
from tests.checkpoint_files import write_checkpoint
from tests.families import write_model


def write_parent(folder: Path, seed: int) -> Path:
    """Two shards: fused experts, more of them than a group takes, and fp32 among bf16."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    shards = [
        {
            f"model.layers.{layer}.mlp.experts.gate_up_proj": random(160, 64, 48).bfloat16(),
            f"model.layers.{layer}.self_attn.q_proj.weight": random(300, 500),
        }
        for layer in range(2)
    ]
    return write_checkpoint(
        folder, *shards, config={"model_type": "qwen3_5_moe", "num_hidden_layers": 2}
    )


def test_two_workers_find_what_one_machine_finds(tmp_path: Path) -> None:
    base, father, mother = (write_parent(tmp_path / str(seed), seed) for seed in range(3))
    scan = ("scan", str(father), str(mother), "--base", str(base))
    here = run_darwin(*scan, "--out", str(tmp_path / "here"))
    there = run_darwin(*scan, "--out", str(tmp_path / "there"), "--workers", "2")
    assert Path(there["scan"]).read_bytes() == Path(here["scan"]).read_bytes()
    assert Path(there["page"]).read_bytes() == Path(here["page"]).read_bytes()
    assert sum(row["tensors"] for row in here["components"]) == 2 * (2 * 160 + 1)


def test_experts_divided_among_workers(tmp_path: Path) -> None:
    """Half of each layer's experts on each of two workers: what the whole models give."""
    parents = [str(write_model(tmp_path / str(seed), "qwen3_5_moe", seed)) for seed in (1, 2)]
    prompts = tmp_path / "letters.jsonl"
    prompts.write_text(
        '{"id": "1", "conditioned": "what is this?", "generic": "who are you then"}\n'
    )
    scan = ("scan", *parents, "--probe", "--set", str(prompts))
    here = run_darwin(*scan, "--whole", "--out", str(tmp_path / "here"))
    there = run_darwin(*scan, "--shards", "2", "--workers", "2", "--out", str(tmp_path / "there"))
    found, expected = (json.loads(Path(one["scan"]).read_text()) for one in (there, here))
    assert found["probe"] == expected["probe"]
    rows = found["probe"]["parents"]["father"]["letters"]
    assert [set(row["routing"]["overlap"]) for row in rows if "routing" in row] == [{"mother"}] * 4
