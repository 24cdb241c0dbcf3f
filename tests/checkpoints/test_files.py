"""Files of an upload: names, JSON and safetensors headers within limits, every break with its own message."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from server.checkpoints import files
from server.errors import AdapterError


def write(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header and any claim about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.PTH", "training_args.bin", "x.pkl", "model.ckpt"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(name):
    """tests/test_cli.py runs it."""
    with pytest.raises(AdapterError) as refused:
        files.check_names({"adapter_config.json", name})
    assert refused.value.field == name
    assert str(refused.value).endswith("convert them where you trust them: adapterd adapters convert DIR")


@pytest.mark.parametrize("name", ["../adapter_config.json", "tokenizer.json", "a" * 5000, "x\nadapter.safetensors"])
def test_any_other_file_is_refused_by_name(name):
    with pytest.raises(AdapterError, match="is not a file of an adapter") as refused:
        files.check_names({"adapter_config.json", name})
    assert len(str(refused.value)) < 400
    assert str(refused.value).isprintable()


def test_a_readme_is_ignored_and_the_config_is_needed():
    files.check_names({"adapter_config.json", "README.md", "adapter_model.safetensors"})
    with pytest.raises(AdapterError, match=r"adapter_config.json: is missing"):
        files.check_names({"README.md"})


# --- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b'{"r": 1, "r": 2}', "has the key r twice"),
        (b'{"a": {"b": 1, "b": 1}}', "has the key b twice"),
        (b'{"r": NaN}', "holds NaN"),
        (b'{"r": -Infinity}', "holds -Infinity"),
        (b'{"r": "\xff"}', "is not UTF-8"),
        (b'{"r": "\\ud800"}', "holds a lone surrogate"),
        (b'{"\\udfff": 1}', "holds a lone surrogate"),
        (b'{"r": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b'{"r": ' + b"[" * 17 + b"]" * 17 + b"}", "nested deeper than 16 levels"),
        (b'{"r": ' * 100_000, "nested deeper than 16 levels"),
        (b"[" * 500_000, "nested deeper than 16 levels"),
    ],
)
def test_json_that_breaks_a_rule_is_refused(text, message, tmp_path):
    (tmp_path / "c.json").write_bytes(text)
    with pytest.raises(AdapterError, match=message) as refused:
        files.load_json(tmp_path / "c.json", "adapter_config.json")
    assert refused.value.field == "adapter_config.json"


def test_json_over_its_size_limit_is_not_even_read(tmp_path):
    (tmp_path / "c.json").write_bytes(b" " * (files.MAX_JSON_BYTES + 1))
    with pytest.raises(AdapterError, match="1048577 bytes, over the limit of 1048576"):
        files.load_json(tmp_path / "c.json", "adapter_config.json")


def test_json_up_to_the_depth_limit_is_read():
    assert files.parse_json(b'{"a": ' + b"[" * 14 + b"]" * 14 + b', "b": {"c": 1}}', "x")["b"] == {"c": 1}


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200))
def test_no_bytes_are_more_than_an_error(data):
    with contextlib.suppress(AdapterError):
        assert isinstance(files.parse_json(data, "x"), dict)


# --- safetensors --------------------------------------------------------------------------------------------------

GOOD = {"a": entry(0, 16), "b": entry(16, 24, [2, 1])}


def test_a_valid_file_is_read_whole(tmp_path):
    stored = {"a": torch.randn(3, 2), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.ones(1, dtype=torch.float16)}
    save_file(stored, tmp_path / "t", metadata={"format": "pt"})
    loaded = files.load_tensors(tmp_path / "t", "t")
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("header", "body", "length", "message"),
    [
        (GOOD, 24, 1 << 60, "declares a header of 1152921504606846976 bytes, over the limit of 1048576"),
        (GOOD, 24, 5000, r"declares a header of 5000 bytes, but the file has \d+: it is cut short"),
        (GOOD, 24, 9, "Unterminated string|Expecting|delimiter"),
        (GOOD, 23, None, "holds 23 bytes of tensors, but its header declares 24"),
        (GOOD, 25, None, "holds 25 bytes of tensors, but its header declares 24"),
        ({}, 0, None, "holds 0 tensors; accepted: 1 to 20000"),
        ([], 0, None, "must be a JSON object"),
        (b'{"a": {}, "a": {}}', 0, None, "has the key a twice"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, None, "b: begins at byte 4, but the tensors before it end at 8"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, None, "b: begins at byte 12, but the tensors before it end at 8"),
        ({"a": entry(4, 8)}, 8, None, "a: begins at byte 4, but the tensors before it end at 0"),
        ({"a": entry(0, 8, [3])}, 8, None, r"a: occupies \[0, 8\], but F32 \[3\] does not"),
        ({"a": entry(8, 0, [2])}, 8, None, r"a: occupies \[8, 0\]"),
        ({"a": entry(0, 0, [0, 4])}, 0, None, r"a: has shape \[0, 4\]"),
        ({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, 4, None, r"a: has shape \[\]"),
        ({"a": entry(0, 4, [1] * 9)}, 4, None, "a: has shape .*accepted: 1 to 8 sizes"),
        ({"a": entry(0, 4, [-1])}, 4, None, r"a: has shape \[-1\]"),
        ({"a": entry(0, 4, [True])}, 4, None, r"a: has shape \[True\]"),
        ({"a": entry(0, 4, [1.0])}, 4, None, r"a: has shape \[1.0\]"),
        ({"a": entry(0, 4, [1 << 70])}, 4, None, "does not"),
        ({"a": entry(0, 8, [1], "F64")}, 8, None, "a: has dtype F64; accepted: F32, F16, BF16"),
        ({"a": entry(0, 1, [1], "F8_E4M3")}, 1, None, "a: has dtype F8_E4M3"),
        ({"a": {**entry(0, 4), "dtype": ["F32"]}}, 4, None, "a: has dtype"),
        ({"a": {**entry(0, 4), "data_offsets": [0]}}, 4, None, r"a: has data_offsets \[0\]"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, None, "a: must declare dtype, shape and data_offsets"),
        ({"a": {**entry(0, 4), "more": 1}}, 4, None, "a: must declare dtype, shape and data_offsets"),
        ({"a": 3}, 4, None, "a: must declare dtype, shape and data_offsets"),
        ({"__metadata__": {"x": 1}, "a": entry(0, 4)}, 4, None, "__metadata__ must map strings to strings"),
        ({"__metadata__": "x", "a": entry(0, 4)}, 4, None, "__metadata__ must map strings to strings"),
        ({"a" * 513: entry(0, 4)}, 4, None, "is not a usable tensor name"),
        ({"a\n": entry(0, 4)}, 4, None, "is not a usable tensor name"),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused(header, body, length, message, tmp_path):
    path = write(tmp_path / "t", header, bytes(body), length)
    with pytest.raises(AdapterError, match=message) as refused:
        files.load_tensors(path, "adapter_model.safetensors")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_a_file_without_a_whole_length_field_is_refused(cut, tmp_path):
    (tmp_path / "t").write_bytes(b"\x01" * cut)
    with pytest.raises(AdapterError, match=f"has {cut} bytes, a safetensors file has at least 8"):
        files.load_tensors(tmp_path / "t", "t")


def test_a_pickle_under_a_safetensors_name_is_refused(tmp_path):
    (tmp_path / "t").write_bytes(pickle.dumps({"a": list(range(100))}))
    with pytest.raises(AdapterError, match="declares a header of"):
        files.load_tensors(tmp_path / "t", "t")


def test_more_tensors_than_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_TENSORS", 2)
    path = write(tmp_path / "t", {str(i): entry(4 * i, 4 * i + 4) for i in range(3)}, bytes(12))
    with pytest.raises(AdapterError, match="holds 3 tensors; accepted: 1 to 2"):
        files.load_tensors(path, "t")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite_is_refused_naming_its_tensor(value, dtype, tmp_path):
    tensor = torch.zeros(4, 3)
    tensor[3, 2] = value
    save_file({"good": torch.ones(2), "bad": tensor.to(dtype)}, tmp_path / "t")
    with pytest.raises(AdapterError, match="bad: holds NaN or infinity"):
        files.load_tensors(tmp_path / "t", "t")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_but_never_breaks(data):
    good = bytearray(save({"a": torch.ones(3), "b": torch.ones(2, 2)}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    good = good[: data.draw(st.integers(0, len(good)))]
    with contextlib.suppress(AdapterError):
        header = files.read_header(io.BytesIO(bytes(good)), len(good), "t")
        assert sum(item.end - item.begin for item in header.values()) < len(good)
