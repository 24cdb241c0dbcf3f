"""The Triton LoRA kernels, in Triton's interpreter, against the plain loop over adapters."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from server.methods.base import Rows
from server.methods.grouped import lora_loop, rows_of

pytest.importorskip("triton", reason="Triton is not installed; it comes with torch's CUDA builds")

from server.model.cuda.lora import tiles_of, triton_lora

PATTERNS = {
    "distinct": [1, 2, 3, 4],
    "identical": [2] * 5,
    "skewed": [0, 0, 4, 4, 4, 0, 7],
    "apart": [2, 1, 2, 1],
    "one of two": [0, 3],
    "a prefill beside decodes": [1, *[5] * 90, 6],
}


def operands(tokens: int, rank: int, width: int, out: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, width), (tokens, out), (8, rank, width), (8, rank, out))
    return [torch.randn(*size, generator=generator).to(dtype) for size in sizes]


def fixed_rows(slots: Sequence[int]) -> Rows:
    """Every token a row of the pool, the slots known to the device alone; 0: none."""
    n = len(slots)
    return Rows(torch.arange(n), torch.tensor(slots), ((0, 0, n),), slice(0, n), {}, fixed=True)


@pytest.mark.parametrize("slots", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("rank", [8, 16, 128])
def test_it_is_the_plain_loop(slots: list[int], rank: int) -> None:
    x, y, a, b = operands(len(slots), rank, 40, 24)
    expected = y.clone()
    lora_loop(x, expected, a, b, rows_of(slots))
    triton_lora(a, b, rows_of(slots))(x, y)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_widths_that_fill_more_than_one_block() -> None:
    x, y, a, b = operands(3, 8, 300, 200)
    expected = y.clone()
    lora_loop(x, expected, a, b, rows_of([1, 0, 7]))
    triton_lora(a, b, rows_of([1, 0, 7]))(x, y)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


def test_inputs_may_be_views() -> None:
    x, y, a, b = operands(4, 8, 40, 24)
    expected, wide = y.clone(), torch.stack([y, y], dim=2)
    lora_loop(x, expected, a, b, rows_of([1, 2, 2, 3]))
    triton_lora(a, b, rows_of([1, 2, 2, 3]))(torch.stack([x, x], dim=2)[..., 0], wide[..., 0])
    torch.testing.assert_close(wide[..., 0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(wide[..., 1], y)


def test_weights_stored_in_bf16_meet_fp32_activations_as_they_are() -> None:
    x, y, a, b = operands(4, 16, 40, 24)
    a, b = a.bfloat16(), b.bfloat16()
    expected = y.clone()
    lora_loop(x, expected, a.float(), b.float(), rows_of([1, 2, 2, 3]))
    triton_lora(a, b, rows_of([1, 2, 2, 3]))(x, y)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_bf16_activations_are_summed_in_fp32() -> None:
    x, y, a, b = operands(4, 16, 40, 24, torch.bfloat16)
    expected = y.float()
    lora_loop(x.float(), expected, a.float(), b.float(), rows_of([1, 2, 2, 3]))
    triton_lora(a, b, rows_of([1, 2, 2, 3]))(x, y)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=0.2)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in the interpreter
def test_rows_of_the_base_keep_their_bits_whatever_others_hold() -> None:
    x, y, a, b = operands(5, 8, 40, 24)
    a[3], b[3], x[2] = float("nan"), float("inf"), float("nan")
    before, alone = y.clone(), y.clone()
    triton_lora(a, b, rows_of([0, 0, 3, 1, 0]))(x, y)
    assert torch.equal(y[[0, 1, 4]], before[[0, 1, 4]])
    triton_lora(a, b, rows_of([0, 0, 0, 1, 0]))(x, alone)
    assert torch.equal(y[3], alone[3])


def test_slots_that_only_the_device_knows() -> None:
    x, y, a, b = operands(6, 8, 40, 24)
    rows = fixed_rows([0] * 6)
    run = triton_lora(a, b, rows)
    for slots in ([1, 0, 3, 3, 7, 2], [0, 0, 0, 0, 0, 5], [2, 99, -1, 8, 1, 0]):
        rows.slot.copy_(torch.tensor(slots))
        got, expected = y.clone(), y.clone()
        lora_loop(x, expected, a, b, rows_of([slot if 0 <= slot < 8 else 0 for slot in slots]))
        run(x, got)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_tiles_never_join_two_slots_and_are_found_once() -> None:
    rows = rows_of([4] * 70 + [7] * 3)
    tiles = tiles_of(rows)
    assert (tiles.first.tolist(), tiles.last.tolist(), tiles.slot.tolist()) == ([0, 64, 70], [64, 70, 73], [4, 4, 7])
    assert tiles_of(rows) is tiles
