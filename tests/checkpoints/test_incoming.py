"""What arrives is refused at the byte that shows it, in whatever pieces it comes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from server.checkpoints.files import MAX_JSON_BYTES
from server.checkpoints.incoming import inspector
from server.errors import AdapterError

GOOD = save({"a": torch.ones(3, 5), "b": torch.ones(7)}, metadata={"format": "pt"})
WEIGHTS = "adapter_model.safetensors"


def accepted(name: str, data: bytes, pieces: int) -> int:
    """How many bytes were taken before the refusal, which is raised with that number."""
    inspect, taken = inspector(name), 0
    for at in range(0, len(data), pieces):
        try:
            inspect(data[at : at + pieces])
        except AdapterError as error:
            error.add_note(str(taken))
            raise
        taken += len(data[at : at + pieces])
    return taken


def with_header(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def declaring(shape: list[int], size: int) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()


@pytest.mark.parametrize("pieces", [1, 7, 8, 9, 1 << 20])
@pytest.mark.parametrize("name", [WEIGHTS, f"lora/{WEIGHTS}", "adapter.safetensors"])
def test_what_is_well_passes_in_pieces_of_any_size(name: str, pieces: int) -> None:
    assert accepted(name, GOOD, pieces) == len(GOOD)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PK\x03\x04" + bytes(5000), "declares a header of"),
        ((1 << 62).to_bytes(8, "little") + bytes(5000), "declares a header of"),
        (with_header(b"{}", bytes(5000)), "holds 0 tensors"),
        (with_header(b"[]", bytes(5000)), "must be a JSON object"),
        (with_header(b"[" * 2000, bytes(5000)), "nested deeper"),
        (with_header(declaring([2, 2], 15), bytes(5000)), "occupies"),
        (with_header(declaring([10**9, 10**9], 4 * 10**18), bytes(5000)), None),
        (with_header(declaring([2, 2], 16), bytes(5000)), "more bytes than the"),
    ],
)
@pytest.mark.parametrize("pieces", [1, 64])
def test_a_wrong_header_ends_it_with_the_piece_that_completes_it(data: bytes, reason: str | None, pieces: int) -> None:
    """A header may also declare more than will ever come: nothing is set aside for it."""
    if reason is None:
        assert accepted(WEIGHTS, data, pieces) == len(data)
        return
    with pytest.raises(AdapterError, match=reason) as refused:
        accepted(WEIGHTS, data, pieces)
    assert int(refused.value.__notes__[0]) < 2200


def test_no_more_than_a_header_is_kept() -> None:
    inspect = inspector(WEIGHTS)
    inspect(MAX_JSON_BYTES.to_bytes(8, "little"))
    for _ in range(15):
        inspect(b" " * (1 << 16))
    with pytest.raises(AdapterError, match="Expecting value"):
        inspect(b" " * (1 << 20))


@pytest.mark.parametrize("name", ["adapter_config.json", "lora/head_config.json", "README.md"])
def test_small_files_are_cut_off_at_the_limit(name: str) -> None:
    assert accepted(name, bytes(MAX_JSON_BYTES), 1 << 16) == MAX_JSON_BYTES
    with pytest.raises(AdapterError, match=f"over the limit of {MAX_JSON_BYTES}") as refused:
        accepted(name, bytes(MAX_JSON_BYTES + 1), 1 << 16)
    assert refused.value.field == name


@pytest.mark.parametrize("name", ["adapter_model.bin", "lora/adapter_model.PT", "tokenizer.json", "lora/x.safetensors"])
def test_a_name_is_refused_before_its_first_byte(name: str) -> None:
    with pytest.raises(AdapterError, match=r"pickled files|is not a file of an adapter") as refused:
        inspector(name)
    assert refused.value.field == name
