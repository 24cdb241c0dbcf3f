"""What an upload would be, found out offline: the same report and the same refusal that a server gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from server.check import check_directory
from server.model.attention import UnsupportedModelError
from server.settings import Settings
from tests.e2e.uploads import Files, lora, packed, tensors
from tests.process import ServerProcess

Write = Callable[..., Path]
SOFT = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
NORM = "model.layers.0.input_layernorm"


def files_of(config: Mapping[str, object], **weights: torch.Tensor) -> Files:
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(weights)}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Files in a directory; those of parts in directories below."""

    def write(files: Files, **parts: Files) -> Path:
        directory = tmp_path / "adapter"
        for part, each in {"": files, **parts}.items():
            (directory / part).mkdir(parents=True, exist_ok=True)
            for name, data in each.items():
                (directory / part / name).write_bytes(data)
        return directory

    return write


def test_the_report_of_a_directory_is_the_one_a_server_answers_with(
    write: Write, tiny_base: Path, tiny_server: ServerProcess
) -> None:
    directory = write(lora(1) | {"tokenizer.json": b"{}"})
    verdict = check_directory(directory, Settings(model=str(tiny_base)))
    record = tiny_server.upload("check-report", lora(1)).json()
    assert verdict.refusal is None
    assert dict(verdict.details) == record["details"]
    assert verdict.digest == record["digest"]
    assert (verdict.base_weights, verdict.left_out) == ("not read", ("tokenizer.json",))
    assert json.loads(json.dumps(verdict.to_json()))["parts"][0]["sites"] == 2


def test_several_parts(write: Write, tiny_base: Path) -> None:
    soft = files_of(SOFT, prompt_embeddings=torch.ones(2, 32))
    verdict = check_directory(write({}, lora=lora(1), soft=soft), Settings(model=str(tiny_base)))
    assert verdict.details["methods"] == ["lora", "prompt_tuning"]
    assert verdict.details["virtual_tokens"] == 2
    assert set(verdict.files) == {
        f"{part}/{name}" for part in ("lora", "soft") for name in ("adapter_config.json", "adapter_model.safetensors")
    }


def test_a_refusal_names_the_field_and_the_limits_are_the_settings(write: Write, tiny_base: Path) -> None:
    verdict = check_directory(write({}, wide=lora(1)), Settings(model=str(tiny_base), max_rank=2))
    said = verdict.to_json()
    assert said["accepted"] is False
    assert str(said["field"]).startswith("wide/model.layers.0.self_attn.q_proj")
    assert "limit of 2" in str(said["reason"])


@pytest.mark.parametrize(
    ("files", "field"),
    [
        (packed(tensors(1), peft_type="NO_SUCH_METHOD"), "peft_type"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b""}, "adapter_model.bin"),
        ({}, "adapter_config.json"),
    ],
)
def test_what_is_wrong_with_an_upload_is_named(files: Files, field: str, write: Write, tiny_base: Path) -> None:
    refusal = check_directory(write(files), Settings(model=str(tiny_base))).refusal
    assert refusal is not None
    assert refusal.field == field


def ln_tuning(value: float) -> Files:
    config = {"peft_type": "LN_TUNING", "task_type": "CAUSAL_LM", "target_modules": ["input_layernorm"]}
    return files_of(config, **{f"base_model.model.{NORM}.ln_tuning_layers.weight": torch.full((32,), value)})


def test_a_family_that_is_held_against_the_base_has_only_those_weights_read(write: Write, tiny_base: Path) -> None:
    verdict = check_directory(write(ln_tuning(2.0)), Settings(model=str(tiny_base)))
    assert verdict.refusal is None
    assert verdict.base_weights == "1 tensors read"


def test_a_base_whose_files_cannot_tell_is_loaded(write: Write, tiny_base: Path, tmp_path: Path) -> None:
    """Where the checkpoint's names are not the modules', only transformers knows what is what."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    settings = Settings(model=str(base))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    verdict = check_directory(write(ln_tuning(2.0)), settings)
    assert verdict.base_weights == "loaded"
    assert verdict.refusal is None


def test_a_base_that_cannot_be_served_is_an_error_and_no_verdict(write: Write, tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError):
        check_directory(write(lora(1)), Settings(model=str(base)))
