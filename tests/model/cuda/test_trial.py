"""Trials: a kernel passes only if it computes what pure torch does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from server.methods.base import Rows
from server.methods.grouped import lora_loop
from server.model.attention import PagedAttention, torch_attention
from server.model.cuda.trial import LoraKernel, failing, try_attention, try_lora
from server.model.step import Step

CPU = torch.device("cpu")


def loop(a: Tensor, b: Tensor, rows: Rows) -> Callable[[Tensor, Tensor], None]:
    return lambda x, y: lora_loop(x, y, a, b, rows)


def of_others(a: Tensor, b: Tensor, rows: Rows) -> Callable[[Tensor, Tensor], None]:
    return loop(a.roll(1, 0), b.roll(1, 0), rows)


def without_window(q: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, window: int, softcap: float) -> Tensor:
    return torch_attention(q, keys, values, step, scale, 0, softcap)


def nothing(*args: Any) -> Tensor:
    return torch.full_like(args[0], float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("block_size", [16, 256])
def test_torch_passes(dtype: torch.dtype, softcap: float, block_size: int) -> None:
    assert failing(partial(try_attention, torch_attention, CPU, dtype, block_size, softcap)) == ""
    assert failing(partial(try_lora, loop, CPU, dtype)) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [without_window, nothing])
def test_another_attention_does_not(kernel: PagedAttention, dtype: torch.dtype) -> None:
    assert failing(partial(try_attention, kernel, CPU, dtype, 16, 0.0)).startswith("ValueError: differs from pure torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_lora_does_not(dtype: torch.dtype) -> None:
    kernel: LoraKernel = of_others
    assert failing(partial(try_lora, kernel, CPU, dtype)).startswith("ValueError: differs from pure torch")


def test_whatever_is_raised_is_a_reason_of_one_line() -> None:
    def broken() -> None:
        raise AssertionError("no driver\nand more")

    assert failing(broken) == "AssertionError: no driver"
