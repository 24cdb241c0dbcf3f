"""Uploads that the fuzzers begin with: one of each family for the two-layer llama, and the base that they are read against."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load

from adapters_store.digest import Digest
from server.methods.base import BaseShape, Limits
from server.model.loader import make_base
from tests.e2e.uploads import Files, lora, packed, tensors
from tests.security.contents import CONFIG, WEIGHTS, bias, prefix, prompt
from tests.tiny import tiny_model

LIMITS: Final = Limits(max_rank=64, max_virtual_tokens=64)
SHAPE: Final[BaseShape] = make_base(tiny_model("llama"), Digest("0" * 64), torch.device("cpu"), torch.float32).shape
_MODULE: Final = "base_model.model.model.layers.{}.{}"


def _vectors(kind: str, suffix: str, shape: tuple[int, ...], module: str, **config: object) -> Files:
    names = [f"{_MODULE.format(layer, module)}{suffix}" for layer in range(2)]
    return packed({name: torch.ones(shape) for name in names}, peft_type=kind, target_modules=[module], **config)


SEEDS: Final[list[Files]] = [
    lora(1),
    packed(tensors(1), use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"layers.1.self_attn.q_proj": 3}),
    bias(1),
    prefix(1),
    prompt(1),
    _vectors("IA3", ".ia3_l", (32, 1), "self_attn.k_proj", feedforward_modules=[]),
    _vectors("LN_TUNING", ".ln_tuning_layers.weight", (32,), "input_layernorm"),
    _vectors("HEAD", ".score.weight", (3, 32), "score"),
    packed(tensors(1), task_type="SEQ_CLS", modules_to_save=["score"]),
    packed(tensors(1), peft_type="ADALORA", target_r=2, init_r=4),
    packed(tensors(1), peft_type="VERA", projection_prng_key=0, save_projection=True),
    packed(tensors(1), peft_type="TRAINABLE_TOKENS", token_indices=[1, 2]),
    packed(tensors(1), peft_type="DISCRETE_PROMPT", template="a {input} b", verbalizer={"x": [" a"], "y": [" b"]}),
]
CONFIGS: Final = [files[CONFIG] for files in SEEDS]
TENSORS: Final = sorted(
    {name for files in SEEDS for name in load(files[WEIGHTS])} | {"prompt_embeddings", "base_model.model.score.weight"}
)

_directory = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def paths_of(files: Mapping[str, bytes]) -> dict[str, Path]:
    """The files on disk, in place of those of the call before."""
    paths = {name: Path(_directory.name) / name for name in files}
    for name, path in paths.items():
        path.write_bytes(files[name])
    return paths
