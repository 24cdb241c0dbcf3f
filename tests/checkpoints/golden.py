"""The golden files of AdapterHub's library (tests/golden): its bases, and its adapters as uploads."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adapters_store.digest import Digest
from server.methods.base import BaseShape
from server.model.loader import make_base

GOLDEN = Path(__file__).parents[1] / "golden" / "adapterhub"
MODELS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "models.json").read_text())
CPU = torch.device("cpu")


def cases(kind: str) -> list[str]:
    """ "model/case" for every folder of "cases", "heads" or "refused"."""
    return sorted(str(folder.relative_to(GOLDEN / kind)) for folder in GOLDEN.glob(f"{kind}/*/*"))


def upload(kind: str, case: str) -> dict[str, Path]:
    """The saved folder: file name -> file."""
    return {path.name: path for path in (GOLDEN / kind / case).iterdir()}


@cache
def expectations() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@cache
def build(name: str) -> PreTrainedModel:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]), attn_implementation="eager")
    loaded = model.load_state_dict(load_file(GOLDEN / "bases" / f"{name}.safetensors"), strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= ({"lm_head.weight"} if name == "gpt2" else set())
    return model.eval().requires_grad_(False)


@cache
def base_of(name: str) -> BaseShape:
    return make_base(copy.deepcopy(build(name)), Digest("0" * 64), CPU, torch.float32).shape


def files(case: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """(adapter_config.json, tensors, adapter_interface.json)."""
    folder = GOLDEN / "cases" / case
    interface = folder / "adapter_interface.json"
    return (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter.safetensors"),
        json.loads(interface.read_text()) if interface.exists() else None,
    )
