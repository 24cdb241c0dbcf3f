"""The choice of a GPU's kernels, made on a machine without one: trials that fail, and trials that are made to pass."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from server.model import cuda
from server.model.attention import torch_attention
from server.model.cuda import choose, varlen_or

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_everything_is_torchs_and_the_name_says_why() -> None:
    chosen = choose(CUDA, torch.bfloat16, 256)
    assert chosen.attention is torch_attention
    assert (chosen.lora, chosen.graphable) == (None, False)
    assert chosen.name.startswith("cuda (attention: torch, ")
    assert "varlen_attn failed: " in chosen.name
    assert "LoRA: torch, " in chosen.name


def test_without_triton_torch_does_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("server.model.cuda.lora", "server.model.cuda.paged"):
        monkeypatch.setitem(sys.modules, name, None)
    chosen = choose(CPU, torch.float32, 16)
    assert chosen.attention is torch_attention
    assert (chosen.lora, chosen.graphable) == (None, False)
    assert chosen.name.count("server.model.cuda") == 2


def test_with_triton_both_are_tritons() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it comes with torch's CUDA builds")
    chosen = choose(CPU, torch.float32, 16)
    assert chosen.name == "cuda (attention: triton; LoRA: triton)"
    assert chosen.graphable
    assert chosen.lora is not None


def test_a_passed_trial_of_varlen_puts_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "failing", lambda trial: "")
    monkeypatch.setattr(cuda, "_general_attention", lambda *given: (torch_attention, "torch"))
    monkeypatch.setattr(cuda, "_lora", lambda *given: (None, "torch"))
    assert choose(CPU, torch.bfloat16, 256).name == "cuda (attention: varlen_attn, torch for softcap; LoRA: torch)"
    assert choose(CPU, torch.bfloat16, 16).name == "cuda (attention: torch; LoRA: torch)"


def test_each_layer_goes_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(name: str) -> Any:
        return lambda *given: name

    monkeypatch.setattr(cuda, "varlen_attention", called("varlen"))
    attention = varlen_or(called("general"))

    def asked(softcap: float, dtype: torch.dtype = torch.bfloat16, size: int = 256) -> Tensor:
        q, keys = torch.zeros(1, 2, 64, dtype=dtype), torch.zeros(1, size, 2, 64, dtype=dtype)
        return attention(q, keys, keys, None, 1.0, 0, softcap)  # type: ignore[arg-type]

    assert [asked(0.0), asked(30.0), asked(0.0, torch.float32), asked(0.0, size=16)] == ["varlen", *["general"] * 3]
