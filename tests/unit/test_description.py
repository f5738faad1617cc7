"""Checkpoints that ship as descriptions, against what is published of them and what transformers builds."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml

from orchestrator.config import SHIPPED, read_yaml
from workers.checkpoints import ArchitectureMap
from workers.checkpoints.description import Description, parse_description
from workers.errors import BadInputError

NAMES = sorted(path.stem for path in (SHIPPED / "checkpoint").iterdir())
MODEL = {
    "qwen35_397b": "Qwen3_5MoeForConditionalGeneration",
    "qwen35_27b": "Qwen3_5ForConditionalGeneration",
}
LAYERS = "model.language_model.layers"


def shipped(name: str) -> Description:
    return parse_description(name, read_yaml(SHIPPED / "checkpoint" / f"{name}.yaml"))


def part(name: str) -> str:
    return {"mtp": "mtp", "model.visual": "vision"}.get(
        name.split(".")[0] if name.startswith("mtp") else ".".join(name.split(".")[:2]), "text"
    )


def file_of(description: Description, tensor: str) -> str:
    (found,) = [
        file.name
        for file in description.weight_files
        if tensor in {entry.name for entry in file.header.entries}
    ]
    return found


@pytest.mark.parametrize(
    ("name", "counts", "billions", "total_bytes"),
    [
        # Tensors, and billions of parameters, of text, vision tower and MTP; the 27B's bytes are those of its
        # published index.
        ("qwen35_397b", (1038, 333, 1553), (396.35, 0.46, 6.60), None),
        ("qwen35_27b", (851, 333, 15), (26.90, 0.46, 0.42), 55_562_872_800),
    ],
)
def test_sizes_are_the_published_ones(
    name: str, counts: tuple[int, ...], billions: tuple[float, ...], total_bytes: int | None
) -> None:
    described = shipped(name)
    tensors, elements = Counter[str](), Counter[str]()
    for entry in described.tensors.values():
        tensors[part(entry.name)] += 1
        elements[part(entry.name)] += entry.elements
    assert tuple(tensors[key] for key in ("text", "vision", "mtp")) == counts
    assert tuple(round(elements[key] / 1e9, 2) for key in ("text", "vision", "mtp")) == billions
    stored = sum(entry.stop - entry.start for entry in described.tensors.values())
    assert stored == total_bytes or round(stored / 1e9, 1) == 806.8


def test_files_are_called_and_filled_as_published() -> None:
    large, small = shipped("qwen35_397b"), shipped("qwen35_27b")
    assert [file.name for file in large.weight_files] == [
        f"model.safetensors-{number:05}-of-00094.safetensors" for number in range(1, 95)
    ]
    assert [file.name for file in small.weight_files][
        -1
    ] == "model.safetensors-00011-of-00011.safetensors"
    # By the published indices.
    assert file_of(large, "lm_head.weight") == "model.safetensors-00091-of-00094.safetensors"
    assert file_of(large, "model.language_model.norm.weight").startswith("model.safetensors-00094")
    first = {entry.name for entry in small.weight_files[0].header.entries}
    assert first == {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    assert small.weight_files[0].header.entries[1].stop - small.weight_files[0].header.entries[
        0
    ].start == (5_085_593_600)
    a_log = f"{LAYERS}.0.linear_attn.A_log"
    assert file_of(small, a_log).startswith("model.safetensors-00011")
    assert small.tensors[a_log].dtype == "F32"


def test_experts_are_slices_of_the_published_size() -> None:
    found = ArchitectureMap(shipped("qwen35_397b"))
    assert (found.layers, found.experts) == (60, 512)
    of_one = [t for t in found.tensors if (t.layer, t.expert) == (59, 511)]
    sizes = {t.name.split(".")[-2]: 2 * t.elements for t in of_one}
    assert sizes == {"gate_proj": 8_388_608, "up_proj": 8_388_608, "down_proj": 8_388_608}
    assert found.unknown == []
    share = sum(t.elements for t in found.tensors if t.component == "expert")
    assert share / sum(t.elements for t in found.tensors) == pytest.approx(0.958, abs=5e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_are_those_that_transformers_builds(name: str) -> None:
    """Names and shapes of the whole model but for MTP, which transformers does not know."""
    import transformers

    described = shipped(name)
    model_class = getattr(transformers, MODEL[name])
    assert described.config["architectures"] == [MODEL[name]]
    config = model_class.config_class.from_dict(described.config)
    with torch.device("meta"):
        model = model_class(config)
    built = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    known = {n: e.shape for n, e in described.tensors.items() if not n.startswith("mtp.")}
    assert known == built


def test_headers_are_those_of_a_file_that_could_be_written() -> None:
    for file in shipped("qwen35_27b").weight_files:
        entries = file.header.entries
        assert entries[0].start == len(file.header.raw)
        assert all(one.stop == other.start for one, other in pairwise(entries))
        assert entries[-1].stop == file.size


GOOD: dict[str, Any] = yaml.safe_load("""
hub: org/name
config: {model_type: x}
files: {largest: 40, name: "m-{number}-of-{count}.safetensors"}
dtype: BF16
sets: {n: "0:3 without 1:2"}
tensors:
  a.{n}.: {w: [2, 3], v: [F32, 5]}
  b: [1]
""")


def test_a_small_description_is_expanded() -> None:
    found = parse_description("small", GOOD)
    assert {name: (e.dtype, e.shape) for name, e in found.tensors.items()} == {
        "a.0.w": ("BF16", (2, 3)), "a.0.v": ("F32", (5,)), "a.2.w": ("BF16", (2, 3)),
        "a.2.v": ("F32", (5,)), "b": ("BF16", (1,)),
    }  # fmt: skip
    assert [file.name for file in found.weight_files] == [
        "m-1-of-2.safetensors",
        "m-2-of-2.safetensors",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"a": [2, "BF16"]}}, "tensors: a: [2, 'BF16'] is not"),
        ({"tensors": {"a.": [2]}}, "tensors: a.: must be a table"),
        ({"tensors": {5: [2]}}, "tensors: 5 is not a name"),
        ({"dtype": ["BF16"]}, "tensors: a.0.w: [2, 3] is not"),
        ({"files": {"largest": 40, "name": "{number.of}"}}, "files: name: '{number.of}'"),
        ({"tensors": {"a.{m}": [2]}}, "there is no set 'm'"),
        ({"tensors": {"a": ["F17", 2]}}, "tensors: a"),
        ({"tensors": {"a.": {"b": [2]}, "a.b": [2]}}, "stands for two"),
        ({"sets": {"n": "3"}}, "sets: n: '3'"),
        ({"files": {"largest": 0, "name": "m"}}, "files:"),
        ({"files": {"largest": 9, "name": "m-{x}"}}, "files: name: 'm-{x}'"),
        ({"config": []}, "config: must be a table"),
        ({"more": 1}, "has the keys"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=r"^bad: ") as raised:
        parse_description("bad", GOOD | change)
    assert message in str(raised.value)
