"""Configurations of transformers 4 and 5 side by side; transformers itself says which are the same."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from orchestrator.inputs import check_parents
from tests.checkpoint_files import write_checkpoint
from workers.checkpoints import Checkpoint, open_checkpoint
from workers.errors import BadInputError

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA3 = {"layer_types": ["sliding_attention", "full_attention"]}
LOCAL = {"rope_theta": 10000.0, "rope_type": "default"}
GLOBAL = {"rope_theta": 1000000.0, "rope_type": "default"}

SPELLINGS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"rope_theta": 1e4},
        {"rope_theta": 10000, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"rope_theta": 1e6},
        {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "type": "default"}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3, "factor": 32.0}},
    ],
    "glm": [
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}},
    ],
    "gemma3_text": [
        GEMMA3 | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        GEMMA3 | {"rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LOCAL}},
        GEMMA3 | {"rope_theta": 1e6, "rope_local_base_freq": 2e4},
        GEMMA3
        | {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        GEMMA3
        | {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": LOCAL,
            }
        },
    ],
    "qwen2_vl_text": [
        {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [16, 24, 24]}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [8, 28, 28]}},
    ],
}  # fmt: skip
"""Model type -> what its configurations may say of rotary positions, each of them all that it is to say."""


def opened(folder: Path, *configs: dict[str, Any]) -> dict[str, Checkpoint]:
    """Checkpoints of one tensor, `one`, `two`..., with these configurations."""
    tensor = {"model.norm.weight": torch.ones(2)}
    return {
        name: open_checkpoint(
            str(write_checkpoint(folder / name, tensor, config={"num_hidden_layers": 2} | config))
        )
        for name, config in zip(("one", "two"), configs, strict=True)
    }


def transformers_reading(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary positions that transformers reads of a configuration, but for the old name of the type."""

    def without_old_name(parameters: dict[str, Any]) -> dict[str, Any]:
        return {
            key: without_old_name(value) if isinstance(value, dict) else value
            for key, value in parameters.items()
            if key != "type"
        }

    copied = {key: dict(v) if isinstance(v, dict) else v for key, v in config.items()}
    return without_old_name(
        transformers.AutoConfig.for_model(**copied, num_hidden_layers=2).rope_parameters
    )


def pairs() -> list[Any]:
    return [
        pytest.param({"model_type": kind} | one, {"model_type": kind} | two, id=f"{kind}-{i}-{j}")
        for kind, spelt in SPELLINGS.items()
        for (i, one), (j, two) in itertools.product(enumerate(spelt), repeat=2)
    ]


@pytest.mark.parametrize(("one", "two"), pairs())
def test_positions_are_the_same_exactly_if_transformers_reads_them_alike(
    tmp_path: Path, one: dict[str, Any], two: dict[str, Any]
) -> None:
    parents = opened(tmp_path, one, two)
    if transformers_reading(one) == transformers_reading(two):
        check_parents(parents)
    else:
        with pytest.raises(BadInputError, match=r"^two .*config.json has .* but one has"):
            check_parents(parents)


@pytest.mark.parametrize(
    ("one", "two", "told"),
    [
        (
            {"rope_theta": 1e4},
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            "has rope_theta 1000000.0, but one has 10000.0",
        ),
        (
            {"rope_theta": 1e4},
            {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "has rope_type 'yarn', but one has 'default'",
        ),
        (
            {"rope_local_base_freq": 1e4},
            {"rope_parameters": {"sliding_attention": {"rope_theta": 2e4}}},
            "has rope_theta of sliding_attention 20000.0, but one has 10000.0",
        ),
    ],
)
def test_other_positions_are_named(
    tmp_path: Path, one: dict[str, Any], two: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadInputError, match=told):
        check_parents(opened(tmp_path, one, two))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({}, {"rope_theta": 5e5}),
        ({}, {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
        ({"rope_parameters": {"rope_type": "default"}}, {"rope_theta": 5e5}),
        (  # as the first files of Gemma 3 were, and as they are written now
            {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
            SPELLINGS["gemma3_text"][-1],
        ),
        ({"rope_scaling": "odd", "rope_parameters": 5}, {"rope_theta": 5e5}),
    ],
)
def test_what_only_one_says_of_positions_is_no_contradiction(
    tmp_path: Path, one: dict[str, Any], two: dict[str, Any]
) -> None:
    parents = opened(tmp_path, one, two)
    check_parents(parents)
    check_parents(dict(reversed(parents.items())))
