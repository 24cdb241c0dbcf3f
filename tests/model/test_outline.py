"""A base's outline is what loading it would have found, without loading it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.model.attention import UnsupportedModelError
from server.model.loader import load_base
from server.model.outline import WeightsNeededError, outline
from tests.tiny import ARCHITECTURES, tiny_model


@pytest.fixture
def saved(tmp_path: Path):
    def save(architecture: str) -> Path:
        directory = tmp_path / architecture
        tiny_model(architecture).save_pretrained(directory)
        return directory

    return save


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_outline_is_the_shape_of_the_loaded_base(architecture: str, saved) -> None:
    directory = saved(architecture)
    found, stored = outline(directory)
    loaded = load_base(directory, torch.device("cpu"), torch.float32).shape
    same = {field.name for field in dataclasses.fields(found)} - {"digest", "modules", "weight"}
    assert {name: getattr(found, name) for name in same} == {name: getattr(loaded, name) for name in same}
    assert found.modules.keys() == loaded.modules.keys()
    for name, module in loaded.modules.items():
        own = found.modules[name]
        assert dataclasses.replace(own, bias=None) == dataclasses.replace(module, bias=None)
        assert (own.bias is None) is (module.bias is None)
        assert own.bias is None or torch.equal(own.bias, module.bias)
    assert stored.read == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_a_weight_is_read_alone_and_as_the_loaded_base_gives_it(architecture: str, saved) -> None:
    directory = saved(architecture)
    found, stored = outline(directory)
    loaded = load_base(directory, torch.device("cpu"), torch.float32).shape
    names = [name for name in loaded.modules if name != loaded.head]
    for name in names:
        assert torch.equal(found.weight(name), loaded.weight(name)), name
    assert stored.read == len(names)


def test_a_weight_that_is_stored_under_no_name_of_its_own_has_to_be_loaded(saved) -> None:
    """A tied head has no tensor in the file."""
    found, _ = outline(saved("gpt2"))
    with pytest.raises(WeightsNeededError, match=r"lm_head\.weight"):
        found.weight("lm_head")


@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_tensor_of_another_name_or_shape_has_to_be_loaded(tensor: str, saved) -> None:
    directory = saved("qwen2")
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.ones(7)
    weights.pop(tensor if tensor.endswith("bias") else "", None)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(WeightsNeededError):
        outline(directory)[0].weight("model.norm")


def test_quantised_weights_are_not_read_one_by_one(saved) -> None:
    directory = saved("llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(WeightsNeededError):
        outline(directory)


def test_a_model_whose_attention_is_not_understood_is_not_outlined(saved) -> None:
    directory = saved("llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    with pytest.raises((UnsupportedModelError, WeightsNeededError)):
        outline(directory)
