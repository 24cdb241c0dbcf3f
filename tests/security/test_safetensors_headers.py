"""Safetensors files and JSON that lie about themselves: refused from their header, before anything is allocated for them."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from tests.e2e.uploads import lora
from tests.house import Caller
from tests.security.conftest import refusal
from tests.security.contents import CONFIG, WEIGHTS

SOUND = lora(1)
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def file_of(header: object, body: bytes = b"", *, declared: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if declared is None else declared).to_bytes(8, "little") + raw + body


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def upload(caller: Caller, weights: bytes) -> str:
    """The refusal, which must have cost little memory."""
    tracemalloc.start()
    try:
        words = refusal(caller.upload("liar", {CONFIG: SOUND[CONFIG], WEIGHTS: weights}))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20, f"{peak} bytes"
    refusal(caller.get("/adapters/liar"), 404)
    return words


@pytest.mark.parametrize("declared", [2**63 - 1, 2**64 - 1, 100 << 20, (1 << 20) + 1])
def test_header_bombs_are_refused_by_their_declared_length(acme: Caller, declared: int) -> None:
    assert "over the limit of 1048576" in upload(acme, file_of({}, declared=declared))


def test_header_bombs_that_are_really_there_are_not_parsed(acme: Caller) -> None:
    assert "over the limit of 1048576" in upload(acme, file_of(b"{" + b" " * (2 << 20) + b"}"))


def test_header_bombs_of_tensors_without_number_are_refused(acme: Caller) -> None:
    many = {str(index): entry([], 0, 0) for index in range(15_000)}
    assert "shape []" in refusal(acme.upload("liar", {CONFIG: SOUND[CONFIG], WEIGHTS: file_of(many)}))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (entry([2, 4], 0, 32), entry([2, 4], 16, 48)),  # overlapping
        (entry([2, 4], 0, 32), entry([2, 4], 0, 32)),  # the same bytes twice
        (entry([2, 4], 0, 32), entry([2, 2], 48, 64)),  # a hole
        (entry([2, 4], 32, 64), entry([2, 4], 0, 24)),  # the wrong way round
    ],
)
def test_offsets_that_overlap_or_leave_holes_are_refused(acme: Caller, first: Any, second: Any) -> None:
    upload(acme, file_of({A: first, B: second}, bytes(64)))


@pytest.mark.parametrize(("begin", "end"), [(-32, 0), (0, -1), (32, 0), (0.0, 32.0), ("0", "32"), (None, 32), (True, 32)])
def test_offsets_that_are_negative_or_no_numbers_are_refused(acme: Caller, begin: Any, end: Any) -> None:
    assert "data_offsets" in upload(acme, file_of({A: entry([2, 4], begin, end)}, bytes(32))) or begin == 32


@pytest.mark.parametrize(
    ("shape", "end"),
    [([2**32, 2**32], 0), ([2**31, 2**31], 2**64), ([2**63], 2**65), ([10**30], 4 * 10**30), ([1] * 9, 4), ([0, 4], 0)],
)
def test_shapes_that_overflow_are_refused(acme: Caller, shape: list[int], end: int) -> None:
    """2^32 x 2^32 elements are 0 in 64 bits."""
    upload(acme, file_of({A: entry(shape, 0, end)}, bytes(32)))


@pytest.mark.parametrize(
    "dtype", ["F64", "I8", "U64", "BOOL", "F8_E4M3", "f32", "F32 ", "", None, 7, ["F32"], {"F32": 1}, "C64"]
)
def test_dtype_tricks_are_refused(acme: Caller, dtype: Any) -> None:
    assert "dtype" in upload(acme, file_of({A: entry([2, 4], 0, 32, dtype)}, bytes(32)))


def test_trailing_bytes_are_refused(acme: Caller) -> None:
    """A polyglot: a file that is something else to somebody else."""
    assert "has more bytes than the" in upload(acme, SOUND[WEIGHTS] + b"PK\x05\x06" + bytes(18))


@pytest.mark.parametrize("name", [A + "\n", "../" + A, "\u202e" + A, "a" * 600, "", "__class__.__init__"])
def test_tensor_names_that_are_no_modules_are_refused(acme: Caller, name: str) -> None:
    upload(acme, file_of({name: entry([2, 4], 0, 32)}, bytes(32)))


@pytest.mark.parametrize("value", [b'{"r": 4, "r": 8, "peft_type": "LORA"}', b'{"peft_type": "LORA", "peft_type": "IA3"}'])
def test_duplicate_json_keys_are_refused_in_a_config(acme: Caller, value: bytes) -> None:
    assert "twice" in refusal(acme.upload("liar", {CONFIG: value, WEIGHTS: SOUND[WEIGHTS]}))


def test_duplicate_json_keys_are_refused_in_a_header(acme: Caller) -> None:
    """Which of the two counts is up to the parser: one may check the first and another load the second."""
    one, two = json.dumps(entry([2, 4], 0, 32)), json.dumps(entry([1, 1], 0, 4))
    assert "twice" in upload(acme, file_of(f'{{"{A}": {one}, "{A}": {two}}}'.encode(), bytes(32)))


@pytest.mark.parametrize("depth", [17, 900, 100_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_json_is_refused_in_configs_and_headers(acme: Caller, depth: int, opening: str) -> None:
    deep = (opening * depth + "1" + ("]" if opening == "[" else "}") * depth).encode()
    config = b'{"peft_type": "LORA", "loftq_config": ' + deep + b"}"
    assert "nested deeper" in refusal(acme.upload("liar", {CONFIG: config, WEIGHTS: SOUND[WEIGHTS]}))
    assert "nested deeper" in upload(acme, file_of(b'{"__metadata__": ' + deep + b"}"))


@pytest.mark.parametrize(
    "value", [b'{"r": NaN}', b'{"r": Infinity}', b'{"r": 1e999, "peft_type": "LORA"}', b'{"r": ' + b"9" * 5000 + b"}"]
)
def test_numbers_that_are_none_are_refused(acme: Caller, value: bytes) -> None:
    refusal(acme.upload("liar", {CONFIG: value, WEIGHTS: SOUND[WEIGHTS]}))


def test_a_config_of_two_megabytes_is_refused_unread(acme: Caller) -> None:
    config = b'{"peft_type": "LORA"' + b" " * (2 << 20) + b"}"
    assert "over the limit" in refusal(acme.upload("liar", {CONFIG: config, WEIGHTS: SOUND[WEIGHTS]}))
