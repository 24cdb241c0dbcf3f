"""Step: what every reader may count on before the first batch has been filled."""

from __future__ import annotations

import torch
from torch import Tensor

from server.model.step import Step


def test_a_new_step_is_empty_and_of_the_dtypes_its_readers_expect() -> None:
    step = Step()
    tensors = {name: value for name, value in vars(step).items() if isinstance(value, Tensor)}
    assert all(tensor.numel() == 0 for tensor in tensors.values())
    narrow = {"tables", "starts", "contexts", "key_starts"}  # what the native attention reads as int32
    assert {name for name, tensor in tensors.items() if tensor.dtype is torch.int32} == narrow
    assert {name for name, tensor in tensors.items() if tensor.dtype is torch.int64} == tensors.keys() - narrow
    assert (step.spans, step.decodes, step.rows, step.taps) == ((), 0, {}, {})


def test_steps_share_nothing() -> None:
    one, other = Step(), Step()
    one.rows["lora:8"] = None  # type: ignore[assignment]
    one.taps["q_proj"] = torch.zeros(1)
    assert (other.rows, other.taps) == ({}, {})
