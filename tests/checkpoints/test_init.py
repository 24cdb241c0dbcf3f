"""One upload's files to checkpoints: the dialect is chosen by the config, and every file given is read or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters_store.digest import Digest
from server.checkpoints import read_checkpoints
from server.errors import AdapterError
from server.methods.base import BaseShape

BASE = BaseShape(Digest("0" * 64), "llama", 6, 1, 2, 2, 3, 9, 32, {})


def upload(folder: Path, config: object, weights: str | None = "adapter_model.safetensors") -> dict[str, Path]:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if weights:
        save_file({"prompt_embeddings": torch.ones(2, 6)}, folder / weights)
    return {path.name: path for path in folder.iterdir()}


PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}


def test_a_peft_upload_is_read(tmp_path):
    (tmp_path / "README.md").write_text("hello")
    (checkpoint,) = read_checkpoints(upload(tmp_path, PROMPT), BASE)
    assert checkpoint.method == "prompt_tuning"


@pytest.mark.parametrize(
    ("config", "weights", "extra", "message"),
    [
        (PROMPT, None, None, "adapter_model.safetensors: is missing from the upload"),
        (PROMPT, "adapter.safetensors", None, "adapter.safetensors: is not read in an upload of this format"),
        (PROMPT, "adapter_model.safetensors", "head_config.json", "head_config.json: is not read in an upload"),
        (PROMPT, "adapter_model.safetensors", "adapter_model.bin", "adapter_model.bin: pickled files are not accepted"),
        ({"r": 4}, "adapter_model.safetensors", None, "peft_type: is missing from adapter_config.json"),
        ([PROMPT], "adapter_model.safetensors", None, "adapter_config.json: must be a JSON object"),
    ],
)
def test_an_upload_with_the_wrong_files_is_refused_by_name(config, weights, extra, message, tmp_path):
    if extra:
        (tmp_path / extra).write_bytes(b"{}")
    with pytest.raises(AdapterError, match=message):
        read_checkpoints(upload(tmp_path, config, weights), BASE)
