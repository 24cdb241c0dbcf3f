"""Random tensors, what counts as close to a kernel's torch twin, how many examples hypothesis takes, and layers' programs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from server.model.native import NativeKernels, opcodes

FP32, BF16 = torch.float32, torch.bfloat16
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def run_program(kernels: NativeKernels, instructions: Sequence[Sequence[int]], tokens: int, prompt: int) -> None:
    """Linears and what adapters do, as one layer's program over `tokens` rows; those from `prompt` on are a prompt's."""
    program = torch.zeros(len(instructions), opcodes.INSTRUCTION_WORDS, dtype=torch.int64)
    for row, words in zip(program, instructions, strict=True):
        row[: len(words)] = torch.tensor(words)
    frame = torch.zeros(opcodes.FRAME_WORDS, dtype=torch.int64)
    frame[10], frame[11] = tokens, prompt
    kernels.layer(program, frame)
