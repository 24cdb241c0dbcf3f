"""The parts of an upload: files told apart by sub-directory, and errors that say where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters_store.digest import Digest
from server.checkpoints import read_checkpoints, read_upload
from server.checkpoints.parts import parts_of, within
from server.errors import AdapterError
from server.methods.base import BaseShape

BASE = BaseShape(Digest("0" * 64), "llama", 6, 1, 2, 2, 3, 9, 32, {})
SOFT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
BITFIT = {"peft_type": "BITFIT"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def upload(folder: Path, parts: dict[str, object]) -> dict[str, Path]:
    """Part -> its config; weights that fit either of the two."""
    paths = {}
    for part, config in parts.items():
        at = folder / part
        at.mkdir(exist_ok=True)
        (at / CONFIG).write_text(json.dumps(config))
        bias = {"base_model.model.a.bias": torch.ones(6)}
        save_file(bias if config is BITFIT else {"prompt_embeddings": torch.ones(2, 6)}, at / WEIGHTS)
        paths |= {f"{part}/{name}".removeprefix("/"): at / name for name in (CONFIG, WEIGHTS)}
    return paths


def test_each_part_is_read_in_its_own_right(tmp_path):
    paths = upload(tmp_path, {"soft": SOFT, "bias": BITFIT})
    assert [(part, found.method) for part, found in read_upload(paths, BASE)] == [
        ("bias", "bitfit"),
        ("soft", "prompt_tuning"),
    ]
    assert [found.method for found in read_checkpoints(paths, BASE)] == ["bitfit", "prompt_tuning"]


def test_parts_may_stand_beside_an_adapter_of_their_own(tmp_path):
    """As PEFT saves several adapters: the one called default at the top, the others below."""
    paths = upload(tmp_path, {"": SOFT, "bias": BITFIT})
    assert [part for part, _ in read_upload(paths, BASE)] == ["", "bias"]


def test_files_are_grouped_and_a_model_card_makes_no_part():
    names = [f"a/{CONFIG}", "README.md", f"b/{CONFIG}", f"a/{WEIGHTS}", "c/LICENSE"]
    assert parts_of({name: name for name in names}) == {
        "a": {CONFIG: f"a/{CONFIG}", WEIGHTS: f"a/{WEIGHTS}"},
        "b": {CONFIG: f"b/{CONFIG}"},
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"^adapter_config.json: is missing from the upload"),
        (["README.md"], r"^adapter_config.json: is missing from the upload"),
        ([WEIGHTS], r"^adapter_config.json: is missing from the upload"),
        ([CONFIG, f"lora/{WEIGHTS}"], r"^lora/adapter_config.json: is missing from the upload"),
        ([f"lora/{CONFIG}", WEIGHTS], r"^adapter_config.json: is missing from the upload"),
        ([f"lora/{CONFIG}", "lora/x.json"], r"^lora/x.json: is not a file of an adapter"),
        ([f"lora/{CONFIG}", "lora/adapter_model.bin"], r"^lora/adapter_model.bin: pickled files are not accepted"),
    ],
)
def test_what_is_wrong_with_the_files_names_the_part(names, message):
    with pytest.raises(AdapterError, match=message):
        parts_of(dict.fromkeys(names))


def test_what_is_wrong_inside_a_part_names_it_too(tmp_path):
    paths = upload(tmp_path, {"soft": SOFT, "bad": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": "x"}})
    with pytest.raises(AdapterError, match=r"^bad/num_virtual_tokens: ") as refused:
        read_checkpoints(paths, BASE)
    assert refused.value.field == "bad/num_virtual_tokens"


def test_an_error_outside_a_part_is_left_as_it_is():
    error = AdapterError("r", "is odd")
    with pytest.raises(AdapterError) as refused, within(""):
        raise error
    assert refused.value is error
