"""Outline: a base model's shape without its weights, for checking adapters where nothing is to be served.

Builds the modules, reads no tensor but small ones (biases) and, one by one, those an adapter is held against. Never
downloads, never runs a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from adapters_store.digest import Digest

from ..methods.base import BaseShape, ModuleShape
from .attention import NAME, probe
from .loader import module_shapes, shape_of

_UNKNOWN = Digest("0" * 64)  # nothing is cached under it


class WeightsNeededError(Exception):
    """The base has to be loaded: its files do not hold this tensor under the module's own name."""


class StoredWeights:
    """A checkpoint's tensors, each read when it is asked for. `read` counts the weights that were."""

    def __init__(self, directory: Path) -> None:
        self.read = 0
        self._directory = directory

    def bias(self, module: str) -> Tensor:
        """[out] fp32. Raises: WeightsNeededError."""
        return self._tensor(f"{module}.bias")

    def weight(self, module: str) -> Tensor:
        """As stored, fp32. Raises: WeightsNeededError."""
        self.read += 1
        return self._tensor(f"{module}.weight")

    @cached_property
    def _files(self) -> Mapping[str, Path]:
        """Tensor name -> the file it is in."""
        found = {}
        for path in sorted(self._directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as stored:
                found.update(dict.fromkeys(stored.keys(), path))
        return found

    def _tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise WeightsNeededError(name)
        with safe_open(self._files[name], framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
        return tensor.float()


def outline(directory: Path) -> tuple[BaseShape, StoredWeights]:
    """The shape of the decoder in `directory`, and the weights that its `weight` reads from.

    Raises: WeightsNeededError, now or from the shape's `weight`; anything else where only loading can tell what is wrong.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise WeightsNeededError("quantised weights")
    with no_init_weights():  # memory that is never touched is never taken
        made = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation=NAME, trust_remote_code=False
        )
    model = cast("nn.Module", made).eval()
    stored = StoredWeights(directory)
    modules = {name: _with_bias(name, shape, stored) for name, shape in module_shapes(model).items()}

    def weight(name: str) -> Tensor:
        found = stored.weight(name)
        shape = modules[name]
        if tuple(found.shape) != tuple(cast("Tensor", model.get_submodule(name).weight).shape):
            raise WeightsNeededError(f"{name}.weight")
        return found.T.contiguous() if shape.kind == "conv1d" else found

    nn.Module.to(model, torch.device("meta"), torch.bfloat16)  # what a mixture of experts takes there
    attention = probe(model, config.get_text_config().num_hidden_layers)
    return shape_of(model, _UNKNOWN, modules, attention, weight), stored


def _with_bias(name: str, shape: ModuleShape, stored: StoredWeights) -> ModuleShape:
    return shape if shape.bias is None else replace(shape, bias=stored.bias(name))
