"""AdapterHub's prefix tuning: what is read of its copies, and every refusal by the field or tensor it names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.checkpoints.adapterhub import read_adapterhub
from server.errors import AdapterError
from server.methods.base import Checkpoint
from tests.checkpoints.golden import base_of, files

MODEL = "model.prefix_tuning.prefix_tunings.golden.self_prefix"
LAYER = "model.layers.1.self_attn.prefix_tuning.pool.prefix_tunings.golden.self_prefix"


def read(case: str, changes: dict[str, Tensor | None] | None = None, **fields: Any) -> tuple[Checkpoint, ...]:
    """The case with tensors added, changed or (None) taken away, and config fields set."""
    config, tensors, _ = files(case)
    config["config"].update(fields)
    changed = {key: value for key, value in {**tensors, **(changes or {})}.items() if value is not None}
    return read_adapterhub(config, changed, base_of(case.partition("/")[0]))


def refused(case: str, changes: dict[str, Tensor | None] | None = None, **fields: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read(case, changes, **fields)
    return caught.value


def test_one_copy_is_enough() -> None:
    _, tensors, _ = files("llama/prefix")
    whole = read("llama/prefix")[0].loose
    for kept in ("model.layers.0.", "model.layers.1.", "model.prefix_tuning."):
        (found,) = read("llama/prefix", {key: None for key in tensors if not key.startswith(kept)})
        assert found.loose.keys() == whole.keys()
        assert all(torch.equal(found.loose[name], whole[name]) for name in whole)


def test_copies_that_differ_are_named() -> None:
    _, tensors, _ = files("llama/prefix")
    key = f"{LAYER}.wte.weight"
    error = refused("llama/prefix", {key: tensors[key] + 1})
    assert error.field.endswith("wte.weight")
    assert "differs from its copy under" in str(error)


def test_a_prefix_elsewhere_than_in_self_attention_is_named() -> None:
    key = "model.prefix_tuning.prefix_tunings.golden.cross_prefix.wte.weight"
    assert refused("llama/prefix", {key: torch.zeros(5, 32)}).field == key


@pytest.mark.parametrize(
    ("case", "fields", "field"),
    [
        ("llama/prefix", {"prefix_length": 6}, f"{LAYER}.wte.weight"),
        ("llama/prefix", {"bottleneck_size": 9}, f"{LAYER}.control_trans.0.weight"),
        ("llama/prefix", {"flat": True}, f"{LAYER}.control_trans"),
        ("llama/prefix", {"prefix_length": 0}, "config.prefix_length"),
        ("llama/prefix", {"non_linearity": "prelu"}, "config.non_linearity"),
        ("llama/prefix", {"use_gating": True}, "config.use_gating"),
        ("llama/prefix", {"leave_out": [1]}, "config.leave_out"),
        ("llama/prefix", {"causal": True}, "config.causal"),
        ("llama/prefix_flat", {"prefix_length": 4}, f"{LAYER}.control_trans"),
        ("llama/prefix_flat", {"flat": False}, f"{LAYER}.control_trans"),
    ],
)
def test_a_field_that_does_not_fit_the_tensors_is_named(case: str, fields: dict[str, Any], field: str) -> None:
    named = refused(case, **fields).field
    assert named.replace("model.layers.0.", "model.layers.1.") == field


def test_fields_that_only_concern_training_or_encoders_change_nothing() -> None:
    fields: dict[str, Any] = {
        "encoder_prefix": False,
        "cross_prefix": False,
        "dropout": 0.4,
        "shared_gating": False,
        "init_weights_seed": 3,
    }
    assert read("llama/prefix", **fields)[0].config == read("llama/prefix")[0].config


def test_models_that_the_library_hooks_have_no_prefix_tuning() -> None:
    config, tensors, _ = files("llama/prefix")
    base = replace(base_of("llama"), model_type="qwen2")
    with pytest.raises(AdapterError, match=r"^config\.architecture: .* which qwen2 is not"):
        read_adapterhub({**config, "model_type": "qwen2"}, tensors, base)


def test_a_sliding_window_is_refused() -> None:
    config, tensors, _ = files("mistral/prefix")
    with pytest.raises(AdapterError, match=r"^config\.architecture: .* sliding window of 16 positions"):
        read_adapterhub(config, tensors, replace(base_of("mistral"), window=16))


def test_a_prefix_the_config_does_not_have_and_one_the_file_does_not_have_are_named() -> None:
    lora, tensors, _ = files("llama/lora")
    _, prefix, _ = files("llama/prefix")
    with pytest.raises(AdapterError, match="is a prefix, but the config has none"):
        read_adapterhub(lora, {**tensors, **prefix}, base_of("llama"))
    config, tensors, _ = files("llama/union_with_prefix")
    rest = {key: tensor for key, tensor in tensors.items() if "prefix_tunings" not in key}
    with pytest.raises(AdapterError, match=r"^config\.configs\.0\.architecture: the upload holds no prefix_tunings"):
        read_adapterhub(config, rest, base_of("llama"))


def test_two_prefixes_in_a_union_are_refused() -> None:
    config, tensors, _ = files("llama/prefix")
    union = {"architecture": "union", "configs": [config["config"], config["config"]]}
    with pytest.raises(AdapterError, match=r"^config\.configs: holds more than one prefix"):
        read_adapterhub({**config, "config": union}, tensors, base_of("llama"))
