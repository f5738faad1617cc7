"""The safetensors header: what is well formed is read as the library reads it, the rest is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.checkpoint_files import entry, file_bytes
from workers.checkpoints.safetensors_format import (
    BITS_PER_ELEMENT,
    HEADER_LIMIT,
    LENGTH_BYTES,
    Header,
    header_length,
    parse_header,
)
from workers.errors import BadInputError

FILE = "store/model.safetensors"
EXAMPLE = file_bytes(
    {
        "__metadata__": {"format": "pt"},
        "one": entry("BF16", [2, 3], 0, 12),
        "none": entry("F32", [0, 5], 12, 12),
        "scalar": entry("F32", [], 12, 16),
    },
    bytes(range(16)),
)


def parse(data: bytes) -> Header:
    """As a reader goes about it: the prefix, then as many bytes as that says."""
    length = header_length(data[:LENGTH_BYTES], FILE, len(data))
    return parse_header(data[: LENGTH_BYTES + length], FILE, len(data))


def read_here(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        entry.name: (entry.dtype, list(entry.shape), data[entry.start : entry.stop])
        for entry in parse(data).entries
    }


def read_by_library(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        name: (found["dtype"], found["shape"], bytes(found["data"]))
        for name, found in safetensors.deserialize(data)
    }


def one_tensor(data_bytes: int = 4, **changes: Any) -> bytes:
    """A file of one tensor named `t`, with parts of its header entry replaced."""
    return file_bytes({"t": entry("F32", [1], 0, 4) | changes}, bytes(data_bytes))


def refuse(data: bytes, *words: str) -> None:
    with pytest.raises(BadInputError) as caught:
        parse(data)
    for word in (FILE, *words):
        assert word in str(caught.value)


def test_reads_what_the_library_reads() -> None:
    assert read_here(EXAMPLE) == read_by_library(EXAMPLE)
    assert [found.name for found in parse(EXAMPLE).entries] == ["one", "none", "scalar"]
    assert [found.elements for found in parse(EXAMPLE).entries] == [6, 0, 1]
    assert parse(EXAMPLE).raw == EXAMPLE[:-16]


def test_entries_come_in_the_order_of_their_bytes_whatever_the_order_of_the_names() -> None:
    header = {"b": entry("U8", [2], 2, 4), "a": entry("U8", [2], 4, 6), "c": entry("U8", [2], 0, 2)}
    assert [found.name for found in parse(file_bytes(header, bytes(6))).entries] == ["c", "b", "a"]


@pytest.mark.parametrize("dtype", BITS_PER_ELEMENT)
def test_every_dtype_is_as_wide_as_for_the_library(dtype: str) -> None:
    size = BITS_PER_ELEMENT[dtype] // 8
    data = file_bytes({"t": entry(dtype, [3], 0, 3 * size)}, bytes(3 * size))
    assert read_here(data) == read_by_library(data)


@pytest.mark.parametrize(
    "data", [file_bytes({}), file_bytes(b"  {}   "), file_bytes({"__metadata__": {}})]
)
def test_a_file_without_tensors_has_no_entries(data: bytes) -> None:
    assert parse(data).entries == ()


def test_a_file_cut_short_anywhere_is_refused() -> None:
    for length in range(len(EXAMPLE)):
        refuse(EXAMPLE[:length])


def test_a_file_cut_within_its_tensors_names_the_tensor() -> None:
    refuse(EXAMPLE[:-1], "'scalar'", "truncated")
    refuse(EXAMPLE[:-5], "'one'", "truncated")


def test_a_header_over_the_limit_is_refused_before_it_is_read() -> None:
    size = 1 << 62
    prefix = (HEADER_LIMIT + 1).to_bytes(LENGTH_BYTES, "little")
    with pytest.raises(BadInputError, match=f"{FILE}.*{HEADER_LIMIT + 1} bytes is over the limit"):
        header_length(prefix, FILE, size)
    allowed = HEADER_LIMIT.to_bytes(LENGTH_BYTES, "little")
    assert header_length(allowed, FILE, size) == HEADER_LIMIT


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\x80",
        b"{",
        b"[]",
        b"null",
        b'"{}"',
        b"{}{}",
        b"{}\0",
        b"{\xff}",
        b'{"a\x00": 1}',
        b"\xef\xbb\xbf{}",  # a byte order mark
        "{}".encode("utf-16-le"),
        b'{"t": ' + b"[" * 100_000,
        b'{"t": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], "more": NaN}}',
        b'{"__metadata__": {"a": 1}}',
        b'{"__metadata__": ["a"]}',
        b'{"__metadata__": "a"}',
        b'{"__metadata__": {"a": "\\ud800"}}',
    ],
)
def test_a_header_that_is_not_the_json_it_should_be_is_refused(text: bytes) -> None:
    data = file_bytes(text)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(data)
    refuse(data)


NOT_SIZES = (
    "[-1]", "[-0]", "[1.0]", "[1e0]", '["1"]', "[true]", "[null]", "[[1]]", "[18446744073709551616]",
    "[1" + "0" * 5000 + "]", "1", '"1"', "null", '{"0": 1}',
)  # fmt: skip


@pytest.mark.parametrize("wrong", NOT_SIZES, ids=lambda wrong: wrong[:12])
def test_sizes_are_whole_numbers(wrong: str) -> None:
    for key in ("shape", "data_offsets"):
        header = json.dumps({"t": entry("U8", [0], 0, 0) | {key: "HERE"}})
        refuse(file_bytes(header.replace('"HERE"', wrong).encode()), "'t'")


@pytest.mark.parametrize(
    "shape", [[10**18] * 300, [2**63, 2], [2**63, 2, 0], [2**63], [0] * 65, [1] * 100_000]
)
def test_a_shape_that_no_memory_holds_is_refused_in_few_words(shape: list[int]) -> None:
    """The product of 300 sizes has more digits than Python prints."""
    with pytest.raises(
        BadInputError, match=r"'t' of dtype F32 and shape .* needs more than any memory holds"
    ) as caught:
        parse(one_tensor(shape=shape))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "offsets",
    [[], [0], [0, 4, 4], [4, 0], [0, 5], [0, 3], [0, 8], [-4, 0], [1, 5], [4, 8], [0, 2**63]],
)
def test_offsets_must_be_those_of_the_bytes(offsets: list[int]) -> None:
    refuse(one_tensor(data_offsets=offsets), "'t'")


@pytest.mark.parametrize("shape", [[], [1], [3], [1, 3], [2, 2], [0], [4, 0], [2**40, 4]])
def test_the_span_must_be_that_of_dtype_and_shape(shape: list[int]) -> None:
    refuse(one_tensor(8, shape=shape, data_offsets=[0, 8]), "'t'", "F32", str(shape), "span 8")


def test_a_shape_beyond_all_memory_is_refused() -> None:
    refuse(one_tensor(8, shape=[2**62, 4], data_offsets=[0, 8]), "'t'", "F32", "memory")


@pytest.mark.parametrize("dtype", ["F12", "f32", "", "F4", None, 32, ["F32"], {"F32": 1}])
def test_an_unknown_dtype_is_refused(dtype: Any) -> None:
    refuse(one_tensor(dtype=dtype), "'t'", "dtype")


@pytest.mark.parametrize("value", [None, 1, "F32", [], ["F32", [1], [0, 4]], {}, {"dtype": "F32"}])
def test_an_entry_that_is_none_is_refused(value: Any) -> None:
    refuse(file_bytes({"t": value}, bytes(4)), "'t'")


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_an_entry_that_lacks_something_is_refused(key: str) -> None:
    incomplete = {k: v for k, v in entry("F32", [1], 0, 4).items() if k != key}
    refuse(file_bytes({"t": incomplete}, bytes(4)), "'t'", key)


def test_a_name_used_twice_is_refused() -> None:
    same = json.dumps(entry("F32", [1], 0, 4))
    refuse(file_bytes(f'{{"t": {same}, "t": {same}}}'.encode(), bytes(4)), "'t' twice")


def test_a_name_that_is_no_text_is_refused() -> None:
    refuse(file_bytes({"\ud800": entry("F32", [1], 0, 4)}, bytes(4)), r"'\ud800'")


def test_tensors_that_overlap_are_refused() -> None:
    header = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 3, 7)}
    refuse(file_bytes(header, bytes(7)), "'b' overlaps")
    same = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}
    refuse(file_bytes(same, bytes(4)), "overlaps")
    inside = {"a": entry("U8", [4], 0, 4), "empty": entry("U8", [0], 2, 2)}
    refuse(file_bytes(inside, bytes(4)), "'empty' overlaps")


def test_bytes_that_belong_to_no_tensor_are_refused() -> None:
    header = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 5, 9)}
    refuse(file_bytes(header, bytes(9)), "'b' leaves a hole")
    refuse(file_bytes({"a": entry("U8", [4], 1, 5)}, bytes(5)), "'a' leaves a hole")
    refuse(EXAMPLE + b"x", "1 bytes after the last tensor")
    refuse(file_bytes({}, b"x"), "1 bytes after the last tensor")


def test_a_tensor_behind_the_end_is_refused() -> None:
    header = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 4, 8)}
    refuse(file_bytes(header, bytes(7)), "'b' ends at byte", "truncated")


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool)


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)),
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_whatever_the_library_writes_is_read(
    tensors: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    data = safetensors.torch.save(
        {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}
    )
    assert read_here(data) == read_by_library(data)


def agree_or_refuse(data: bytes) -> bool:
    """Whether it was read. What is read must be what the library reads."""
    try:
        found = read_here(data)
    except BadInputError:
        return False
    assert found == read_by_library(data)
    return True


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "swap"]),
        st.integers(0, len(EXAMPLE) - 1),
        st.one_of(st.sampled_from(list(b'0123456789-+.eE"[]{},: \\utnF')), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=4,
)


@given(CHANGES, st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_a_damaged_file_is_refused_or_read_as_by_the_library(
    changes: list[tuple[str, int, int]], keep_length_right: bool
) -> None:
    text = bytearray(EXAMPLE[LENGTH_BYTES:] if keep_length_right else EXAMPLE)
    for kind, place, byte in changes:
        place = min(place, len(text) - 1)
        if kind == "set":
            text[place] = byte
        elif kind == "insert":
            text.insert(place, byte)
        elif kind == "delete":
            del text[place]
        else:
            text[place], text[-1 - place] = text[-1 - place], text[place]
    data = bytes(text)
    if keep_length_right:
        assume(len(text) >= 16)
        data = file_bytes(data[:-16], data[-16:])
    agree_or_refuse(data)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
    st.just([1, []]),
)
SIZES = st.one_of(st.integers(0, 4), st.sampled_from([-1, 8, 2**31, 2**63, 2**64, 1.0, -0.0]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["U8", "BF16", "F32", "X"]), ODD),
        "shape": st.one_of(st.lists(SIZES, max_size=3), ODD),
        "data_offsets": st.one_of(st.lists(SIZES, min_size=2, max_size=2), st.lists(SIZES), ODD),
    },
    optional={"more": ODD},
)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "é", "__metadata__"]), st.one_of(ENTRIES, ODD), max_size=3
    ),
    st.integers(0, 8),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_a_header_of_odd_values_is_refused_or_read_as_by_the_library(
    header: dict[str, Any], size: int
) -> None:
    agree_or_refuse(file_bytes(header, bytes(size)))


def test_the_comparison_with_the_library_is_not_vacuous() -> None:
    """Small changes of the header that leave it well formed are read, not refused."""
    dice = random.Random(1)
    read = 0
    for _ in range(400):
        text = bytearray(EXAMPLE[LENGTH_BYTES:-16])
        text[dice.randrange(len(text))] = dice.choice(b"abcdefgh0123456789 ")
        read += agree_or_refuse(file_bytes(bytes(text), EXAMPLE[-16:]))
    assert 20 < read < 380
