"""Configurations of transformers 4 and 5 side by side; transformers itself says which are the same."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from orchestrator.inputs import check_parents
from orchestrator.weight_meaning import meaning_warnings
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


def unscaled(positions: dict[str, Any]) -> Any:
    """What positions are where texts are short: YaRN and its like are switched on and off with the same
    weights."""
    if any(isinstance(value, dict) for value in positions.values()):
        return {layers: unscaled(own) for layers, own in positions.items()}
    kept = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
    return {key: positions.get(key) for key in kept}


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
    readings = transformers_reading(one), transformers_reading(two)
    if readings[0] == readings[1]:
        check_parents(parents)
        assert meaning_warnings(parents) == []
    elif unscaled(readings[0]) == unscaled(readings[1]):
        check_parents(parents)
        assert meaning_warnings(parents)
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


OFF, ON = {"use_sliding_window": False}, {"use_sliding_window": True}


@pytest.mark.parametrize(
    ("one", "two", "fits"),
    [
        (OFF | {"sliding_window": 131072}, OFF | {"sliding_window": 32768}, True),
        (OFF | {"sliding_window": 131072}, OFF | {"sliding_window": None}, True),
        (OFF | {"sliding_window": 131072}, ON | {"sliding_window": 32768}, False),
        (ON | {"sliding_window": 131072}, ON | {"sliding_window": 32768}, False),
        ({"sliding_window": 4096}, {"sliding_window": 512}, False),
    ],
)
def test_a_sliding_window_counts_where_it_is_used(
    tmp_path: Path, one: dict[str, Any], two: dict[str, Any], fits: bool
) -> None:
    parents = opened(tmp_path, one, two)
    windows = {
        transformers.Qwen2Config(**config, num_hidden_layers=2).sliding_window
        for config in (one, two)
    }
    if one.keys() & OFF.keys():
        assert (len(windows) == 1) == fits
    if fits:
        check_parents(parents)
        return
    with pytest.raises(BadInputError, match="sliding_window"):
        check_parents(parents)


def test_another_scaling_of_positions_is_a_warning(tmp_path: Path) -> None:
    """Qwen's cards say how to switch YaRN on in config.json: the weights are the same."""
    yarn = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    parents = opened(tmp_path, {"rope_theta": 1e6}, yarn)
    check_parents(parents)
    (warning,) = meaning_warnings(parents)
    assert "has rope_type 'yarn', but one has 'default', which the child keeps" in warning


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"activation_function": "gelu_new"}, {"activation_function": "gelu_pytorch_tanh"}),
        ({"mamba_d_head": "auto"}, {"mamba_d_head": 64}),
        ({"moe_topk": [8, 8]}, {"moe_topk": 8}),
        ({"topk_method": "greedy", "n_group": 1}, {"topk_method": "greedy", "n_group": 8}),
        (
            {"rotary_pct": 0.25, "rotary_emb_base": 10000},
            {"rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 0.25}},
        ),
    ],
)
def test_what_is_said_otherwise_and_means_the_same(
    tmp_path: Path, one: dict[str, Any], two: dict[str, Any]
) -> None:
    parents = opened(tmp_path, one, two)
    check_parents(parents)
    assert meaning_warnings(parents) == []


@pytest.mark.parametrize(
    ("one", "two", "told"),
    [
        (
            {"activation_function": "gelu"},
            {"activation_function": "gelu_new"},
            "has activation_fun",
        ),
        ({"moe_topk": [8, 8]}, {"moe_topk": 4}, "has moe_topk 4, but one has 8"),
        ({"moe_topk": [8, 8]}, {"moe_topk": [8, 4]}, "has moe_topk"),
        ({"n_group": 1}, {"topk_method": "greedy", "n_group": 8}, "has n_group 8, but one has 1"),
        (
            {"rotary_pct": 0.25, "rotary_emb_base": 10000},
            {"rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 1.0}},
            "has partial_rotary_factor 1.0, but one has 0.25",
        ),
    ],
)
def test_what_means_something_else_is_refused(
    tmp_path: Path, one: dict[str, Any], two: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadInputError, match=told):
        check_parents(opened(tmp_path, one, two))


def test_another_scale_of_queries_is_a_warning(tmp_path: Path) -> None:
    """Gemma-2-9B's configuration was mended after it was published: the weights are the same."""
    parents = opened(tmp_path, {"query_pre_attn_scalar": 256}, {"query_pre_attn_scalar": 224})
    check_parents(parents)
    (warning,) = meaning_warnings(parents)
    assert "has query_pre_attn_scalar 224, but one has 256, which the child keeps" in warning


def test_another_epsilon_of_the_norms_is_a_warning(tmp_path: Path) -> None:
    parents = opened(tmp_path, {"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6})
    check_parents(parents)
    (warning,) = meaning_warnings(parents)
    assert warning == (
        f"two ({parents['two'].location}): config.json has rms_norm_eps 1e-06, but one has 1e-05, which "
        "the child keeps"
    )
    assert meaning_warnings({"one": parents["one"], "again": parents["one"]}) == []
