"""Damaged and hostile checkpoints: each is read as the safetensors library reads it, or refused by name.

11,000 generated cases in this file (`CASES`), the same ones in every run: headers, indexes,
configurations, adapters, and whole checkpoints of several files. None may end in any other exception
than `BadInputError`, and that names the file. Everything is in memory, at 2.4 ms of one core a case.
"""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint_files import INDEX, entry, file_bytes, tensor_bytes
from workers.checkpoints import ArchitectureMap, Checkpoint, CheckpointReader, architecture
from workers.checkpoints.adapter import CONFIG_FILE, WEIGHTS_FILE, open_adapter_files
from workers.checkpoints.checkpoint import SINGLE_FILE, open_files
from workers.checkpoints.quantization import check_values_readable
from workers.checkpoints.safetensors_format import HEADER_LIMIT
from workers.errors import BadInputError
from workers.merging.sources import TORCH_DTYPES, Source
from workers.storage import ObjectInfo, ObjectNotFoundError
from workers.storage.folder import FolderStore

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

CASES = {
    "header_bytes": 2500,
    "header_values": 2000,
    "header_trees": 1000,
    "index": 1500,
    "config": 1500,
    "adapter": 1000,
    "whole": 1500,
}
assert sum(CASES.values()) >= 10_000


def cases(kind: str) -> settings:
    """As many cases as the table says, always the same ones."""
    return settings(
        max_examples=CASES[kind],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class MemoryStore(FolderStore):
    """Files that are in memory only. Nothing in it can be mapped, as in a bucket."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__("/memory/of/the/test")
        self.files = files

    def read(self, key: str) -> bytes:
        if key not in self.files:
            raise ObjectNotFoundError(key)
        return self.files[key]

    def read_into(
        self, key: str, start: int, buffer: memoryview, version: str | None = None
    ) -> None:
        data = self.files[key][start : start + len(buffer)]
        assert len(data) == len(buffer), "a read behind the end of a file"
        buffer[:] = data

    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for key in sorted(self.files):
            if key.startswith(prefix):
                yield ObjectInfo(key, len(self.files[key]), "1")

    def local_path(self, key: str) -> Path | None:
        return None


def by_library(files: dict[str, bytes], names: set[str]) -> dict[str, tuple[str, Any, bytes]]:
    """Every tensor of the files as the safetensors library has it."""
    return {
        name: (found["dtype"], list(found["shape"]), bytes(found["data"]))
        for file in names
        for name, found in safetensors.deserialize(files[file])
    }


def read_or_refuse(files: dict[str, bytes], *words: str) -> Checkpoint | None:
    """The checkpoint if it could be opened; what is in it must be what the library reads.

    A refusal must name the place, and one of `words` if there are any.
    """
    store = MemoryStore(files)
    refusal = ""
    try:
        opened = open_files(store)
        read = list(_logical_values(opened))
    except BadInputError as error:
        refusal = str(error)
    if refusal:
        assert store.uri in refusal
        assert not words or any(word in refusal for word in words), refusal
        assert len(refusal) < 10_000, "a message that nobody can read"
        return None
    reader = CheckpointReader(opened)
    found = {
        name: (e.dtype, list(e.shape), bytes(reader.read(name, 0, e.stop - e.start)))
        for name, e in opened.tensors.items()
    }
    assert found == by_library(files, {file.name for file in opened.weight_files})
    covered = {name: bytearray() for name in found}
    for stored, data in read:
        covered[stored] += data
    assert all(not data or bytes(data) == found[name][2] for name, data in covered.items())
    return opened


def _logical_values(opened: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """(stored name, bytes) of each logical tensor that is no code; codes are decoded, and left out."""
    found = ArchitectureMap.of(opened)
    check_values_readable(opened)
    source = Source(opened)
    for tensor in found.tensors:
        values = source.read(tensor, 0, tensor.elements)
        assert values.dtype == TORCH_DTYPES[tensor.values_dtype]
        assert len(values) == tensor.elements
        if not tensor.is_computed:
            yield tensor.stored, tensor_bytes(values)


# -- strategies ------------------------------------------------------------------------------------

DEPTHS = (900, 980, 995, 2000, 100_000)
ODD = st.one_of(
    st.sampled_from(
        [None, True, False, "", "a", "\ud800", "x" * 300, [], {}, [[]], [1, []], {"a": None}]
    ),
    st.sampled_from([-1, 0, 1, 5, 2**31, 2**63, 2**64, 10**30, 10**400, 1.0, -0.0, 1.5, 1e400]),
    st.floats(),
    st.text(max_size=3),
)
TREES = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
SIZES = st.one_of(
    st.integers(0, 4), st.sampled_from([-1, 8, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, 1.0, True])
)
SHAPES = st.one_of(
    st.lists(SIZES, max_size=4),
    st.lists(st.sampled_from([0, 1, 2**63 - 1, 10**18]), min_size=1, max_size=300),
    ODD,
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "swap", "cut", "double"]),
        st.integers(0, 10_000),
        st.one_of(st.sampled_from(list(b'0123456789-+.eE"[]{},: \\utnF')), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    text = bytearray(data)
    for kind, place, byte in changes:
        if not text:
            break
        place %= len(text)
        if kind == "set":
            text[place] = byte
        elif kind == "insert":
            text.insert(place, byte)
        elif kind == "delete":
            del text[place]
        elif kind == "swap":
            text[place], text[-1 - place] = text[-1 - place], text[place]
        elif kind == "cut":
            del text[place:]
        else:
            text[place:place] = text[place : place + byte]
    return bytes(text)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


# -- what is damaged -------------------------------------------------------------------------------

CONFIG = {"model_type": "qwen3_moe", "num_hidden_layers": 2}
LAYER = "model.layers.0"
HEADER_ONE = {
    "__metadata__": {"format": "pt"},
    "model.embed_tokens.weight": entry("BF16", [4, 2], 0, 16),
    f"{LAYER}.mlp.experts.gate_up_proj": entry("F32", [2, 2, 1], 16, 32),
    f"{LAYER}.input_layernorm.weight": entry("F32", [1], 32, 36),
}
HEADER_TWO = {
    "lm_head.weight": entry("F16", [2, 2], 0, 8),
    "model.norm.weight": entry("F32", [0], 8, 8),
    f"{LAYER}.mlp.gate.weight": entry("F8_E4M3", [2, 3], 8, 14),
    f"{LAYER}.mlp.gate.weight_scale_inv": entry("F32", [1, 2], 14, 22),
}
QUANTIZED = CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}
ONE = file_bytes(HEADER_ONE, bytes(range(36)))
TWO = file_bytes(HEADER_TWO, bytes(range(22)))
WEIGHT_MAP = {name: FIRST for name in HEADER_ONE if name != "__metadata__"} | dict.fromkeys(
    HEADER_TWO, SECOND
)


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def single(file: bytes, config: Any = CONFIG) -> dict[str, bytes]:
    return {"config.json": to_json(config), SINGLE_FILE: file}


def sharded() -> dict[str, bytes]:
    index = {"metadata": {"total_size": 58}, "weight_map": WEIGHT_MAP}
    return {"config.json": to_json(QUANTIZED), INDEX: to_json(index), FIRST: ONE, SECOND: TWO}


def test_what_is_not_damaged_is_read() -> None:
    assert read_or_refuse(single(ONE)) is not None
    opened = read_or_refuse(sharded())
    assert opened is not None
    assert set(opened.tensors) == set(WEIGHT_MAP)


# -- headers ---------------------------------------------------------------------------------------


@given(CHANGES, st.booleans())
@cases("header_bytes")
def test_a_header_with_changed_bytes(
    changes: list[tuple[str, int, int]], keep_length: bool
) -> None:
    data = changed(ONE[8:-36], changes) if keep_length else changed(ONE, changes)
    read_or_refuse(single(file_bytes(data, ONE[-36:]) if keep_length else data), SINGLE_FILE)


@given(
    st.dictionaries(
        st.sampled_from(
            ["a", "é", "__metadata__", "\ud800", "layers.0.mlp.experts.down_proj", "layers.1.mlp.x",
             f"layers.{'9' * 5000}.mlp.x", f"layers.0.mlp.experts.{'9' * 5000}.up_proj.weight",
             "layers.0.mlp.experts.gate_up_proj\n", "layers.²³.mlp.x", "layers.٣.mlp.x"]
        ),
        st.one_of(
            st.fixed_dictionaries(
                {
                    "dtype": st.one_of(st.sampled_from(["U8", "BF16", "F32", "F8_E4M3"]), ODD),
                    "shape": SHAPES,
                    "data_offsets": st.one_of(st.lists(SIZES, min_size=2, max_size=2), ODD),
                },
                optional={"more": ODD},
            ),
            st.tuples(
                st.sampled_from(["U8", "I8", "BF16"]), st.lists(st.integers(0, 2), max_size=3)
            ),
            ODD,
        ),
        max_size=3,
    ),
    st.integers(0, 8),
)  # fmt: skip
@cases("header_values")
def test_a_header_of_odd_values(header: dict[str, Any], size: int) -> None:
    """A pair stands for an entry that fits in its place, so that many of the files are whole."""
    position = 0
    for name, value in header.items():
        if isinstance(value, tuple):
            width = 2 if value[0] == "BF16" else 1
            stop = position + width * math.prod(value[1])
            header[name], position = entry(value[0], value[1], position, stop), stop
    read_or_refuse(single(file_bytes(header, bytes(position or size))), SINGLE_FILE, "tensor")


@given(TREES, st.sampled_from([b"", b" ", b"\0", b"x"]))
@cases("header_trees")
def test_a_header_that_is_any_json(tree: Any, tail: bytes) -> None:
    read_or_refuse(single(file_bytes(to_json(tree) + tail, bytes(4))), SINGLE_FILE)


def test_a_file_cut_or_filled_at_any_byte() -> None:
    for length in range(len(ONE)):
        assert read_or_refuse(single(ONE[:length]), SINGLE_FILE) is None
        zeros = ONE[:length] + bytes(len(ONE) - length)
        assert (read_or_refuse(single(zeros), SINGLE_FILE) is None) == (length < len(ONE) - 36)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets", "__metadata__", "t"])
def test_a_deep_value_in_a_header(depth: int, key: str) -> None:
    header: dict[str, Any] = {"t": entry("U8", [4], 0, 4)}
    (header if key in ("__metadata__", "t") else header["t"])[key] = "DEEP"
    text = to_json(header).replace(b'"DEEP"', nested(depth))
    assert read_or_refuse(single(file_bytes(text, bytes(4))), SINGLE_FILE) is None


# -- index and configuration -----------------------------------------------------------------------

PLACES = st.one_of(
    st.sampled_from([FIRST, SECOND, "config.json", INDEX, "none.safetensors", "../x", "a/b", "\0"]),
    ODD,
)


@given(
    st.one_of(
        CHANGES,
        st.fixed_dictionaries(
            {
                "weight_map": st.one_of(
                    st.dictionaries(st.sampled_from([*WEIGHT_MAP, "more"]), PLACES, max_size=3).map(
                        lambda changes: WEIGHT_MAP | changes
                    ),
                    TREES,
                )
            },
            optional={"metadata": TREES, "more": ODD},
        ),
        TREES,
    )
)
@cases("index")
def test_an_index_that_is_damaged(damage: Any) -> None:
    files = sharded()
    files[INDEX] = changed(files[INDEX], damage) if _is_changes(damage) else to_json(damage)
    # It may put a tensor, or say that one is, into any file: then that one is named.
    read_or_refuse(files, *files)


def _is_changes(damage: Any) -> bool:
    return isinstance(damage, list) and bool(damage) and isinstance(damage[0], tuple)


@pytest.mark.parametrize("size", [0, -1, 10**400, "58", None, []])
def test_a_wrong_total_size_changes_nothing(size: Any) -> None:
    files = sharded()
    files[INDEX] = to_json({"metadata": {"total_size": size}, "weight_map": WEIGHT_MAP})
    assert read_or_refuse(files) is not None


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_deep_configuration_or_index(depth: int, name: str) -> None:
    files = sharded()
    for key in ("weight_map", "text_config", "quantization_config", "num_hidden_layers"):
        files[name] = b'{"%s": %s}' % (key.encode(), nested(depth))
        read_or_refuse(files, name)
    files[INDEX] = b'{"weight_map": {"lm_head.weight": %s}}' % nested(depth)
    assert read_or_refuse(files, INDEX) is None


QUANTIZATION = st.one_of(
    ODD,
    st.fixed_dictionaries(
        {},
        optional={
            "quant_method": st.one_of(st.sampled_from(["fp8", "gptq"]), ODD),
            "weight_block_size": st.one_of(
                st.lists(st.one_of(SIZES, st.sampled_from([2, 2])), min_size=2, max_size=2), ODD
            ),
        },
    ),
)
CONFIG_KEYS = {
    "model_type": st.one_of(st.sampled_from(["llama4", "gpt_oss", "qwen3_moe"]), ODD),
    "num_hidden_layers": ODD,
    "tie_word_embeddings": ODD,
    "quantization_config": QUANTIZATION,
}


@given(
    st.one_of(
        CHANGES,
        st.fixed_dictionaries(
            {},
            optional=CONFIG_KEYS
            | {"text_config": st.one_of(ODD, st.fixed_dictionaries({}, optional=CONFIG_KEYS))},
        ),
        TREES,
    ),
    st.booleans(),
)
@cases("config")
def test_a_configuration_that_is_damaged(damage: Any, has_scales: bool) -> None:
    """Without block scales nearly anything may stand in it."""
    files = sharded() if has_scales else single(ONE)
    if _is_changes(damage):
        files["config.json"] = changed(files["config.json"], damage)
    else:
        quantized = has_scales and isinstance(damage, dict) and "model_type" in damage
        files["config.json"] = to_json(QUANTIZED | damage if quantized else damage)
    opened = read_or_refuse(files, "config.json", "tensor")
    if opened is not None:
        # What everybody asks of a map.
        found = ArchitectureMap.of(opened)
        assert isinstance(found.ties_head, bool)
        assert found.layers <= 1
        assert found.quantization is None or isinstance(found.quantization, str)


# -- adapters --------------------------------------------------------------------------------------

ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
FACTORS = file_bytes(
    {
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": entry("F32", [2, 3], 0, 24),
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": entry("F32", [4, 2], 24, 56),
    },
    bytes(56),
)
PATTERNS = st.one_of(
    ODD,
    st.dictionaries(
        st.one_of(
            st.sampled_from(["up_proj", ".*", "(", "a{99999999999}", "(" * 300 + ")" * 300, "[z-a]"]),
            st.text(max_size=3),
        ),
        st.one_of(st.sampled_from([2, 3, 2.5]), ODD),
        max_size=2,
    ),
)  # fmt: skip


@given(
    st.one_of(
        CHANGES,
        st.fixed_dictionaries(
            {},
            optional={
                "peft_type": ODD,
                "r": st.one_of(st.just(2), ODD),
                "lora_alpha": st.one_of(st.just(4.0), ODD),
                "use_rslora": ODD,
                "fan_in_fan_out": ODD,
                "init_lora_weights": ODD,
                "bias": ODD,
                "rank_pattern": PATTERNS,
                "alpha_pattern": PATTERNS,
                "use_dora": ODD,
            },
        ),
        TREES,
    ),
    st.one_of(st.none(), CHANGES),
)
@cases("adapter")
def test_an_adapter_that_is_damaged(damage: Any, weights: Any) -> None:
    config = to_json(ADAPTER)
    if _is_changes(damage):
        config = changed(config, damage)
    else:
        config = to_json(ADAPTER | damage if isinstance(damage, dict) else damage)
    files = {CONFIG_FILE: config, WEIGHTS_FILE: changed(FACTORS, weights) if weights else FACTORS}
    store = MemoryStore(files)
    refusal = ""
    try:
        opened = open_adapter_files(store)
    except BadInputError as error:
        refusal = str(error)
    if refusal:
        assert CONFIG_FILE in refusal or WEIGHTS_FILE in refusal, refusal
        return
    reader = CheckpointReader(opened.weights)
    found = {
        name: (e.dtype, list(e.shape), bytes(reader.read(name, 0, e.stop - e.start)))
        for name, e in opened.weights.tensors.items()
    }
    assert found == by_library(files, {WEIGHTS_FILE})
    assert all(math.isfinite(update.scaling) for update in opened.low_rank.values())


# -- whole checkpoints -----------------------------------------------------------------------------

ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(
            ["model.norm.weight", "norm.weight", "lm_head.weight", "lm_head.weight_scale_inv",
             "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.0.gate_proj.weight",
             "layers.0.block_sparse_moe.experts.0.w1.weight", "layers.1.x.input_scale", "é"]
        ),
        st.sampled_from(["F32", "BF16", "F8_E4M3", "F64", "BOOL", "C64"]),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([0, 0, 0, 0, 0, 0, 1, -1]),
    ),
    max_size=3,
)  # fmt: skip


@given(
    st.lists(ENTRIES, min_size=1, max_size=3),
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from([CONFIG, QUANTIZED]),
    st.randoms(use_true_random=False),
)
@cases("whole")
def test_a_checkpoint_of_several_files(
    shards: list[Any], damage: int, config: Any, dice: Any
) -> None:
    """Tensors in several files, in overlapping places, under equal names; an index that may lie."""
    files = {"config.json": to_json(config)}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        header: dict[str, Any] = {}
        position = 0
        for name, dtype, shape, shift in shard:
            if name not in header:
                size = math.prod(shape) * torch.empty(0, dtype=TORCH_DTYPES[dtype]).element_size()
                start = max(0, position + shift)
                header[name] = entry(dtype, shape, start, start + size)
                position = max(position, start + size)
        files[f"{number}.safetensors"] = file_bytes(header, dice.randbytes(position))
        weight_map |= dict.fromkeys(header, f"{number}.safetensors")
    if damage == 1 and weight_map:
        weight_map[dice.choice(sorted(weight_map))] = f"{dice.randrange(4)}.safetensors"
    elif damage == 2:
        name = dice.choice(sorted(files))
        files[name] = files[name][: dice.randrange(len(files[name]))]
    files[INDEX] = to_json(
        {"metadata": {"total_size": dice.choice([0, -1])}, "weight_map": weight_map}
    )
    read_or_refuse(files, *files, "tensor")


# -- memory ----------------------------------------------------------------------------------------

HUGE = 2**62
HOSTILE = {
    "a header that says it is long": HEADER_LIMIT.to_bytes(8, "little") + b"{}",
    "a header over the limit": (2**63).to_bytes(8, "little") + b"{}",
    "a huge tensor": file_bytes({"a": entry("U8", [HUGE], 0, HUGE)}, b"x"),
    "a huge empty tensor": file_bytes({"layers.0.mlp.experts.gate_up_proj": entry("U8", [HUGE, 1, 0], 0, 0)}),
    "a huge product": file_bytes({"a": entry("U8", [10**18] * 20_000, 0, 1)}, b"x"),
    "many sizes": file_bytes({"a": entry("U8", [1] * 200_000, 0, 2)}, b"xx"),
    "a huge hole": file_bytes({"a": entry("U8", [1], HUGE, HUGE + 1)}, b"x"),
    "many experts": file_bytes({"layers.0.mlp.experts.gate_up_proj": entry("U8", [500_000, 2, 1], 0, 10**6)},
                               bytes(10**6)),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_small_file_does_not_take_much_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "MOST_TENSORS", 1000)
    tracemalloc.start()
    read_or_refuse(single(HOSTILE[kind]), SINGLE_FILE, "tensor")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (16 << 20) + 20 * len(HOSTILE[kind])
