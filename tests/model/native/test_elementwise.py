"""Norms, gated activations, peaks and rotary against torch; a row keeps its bits and its NaN to itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from server.model.native import NativeKernels, reference
from tests.model.native.tensors import close, random

ROWS: dict[str, Callable[[NativeKernels, Tensor], Tensor]] = {
    "rms_norm": lambda k, x: k.rms_norm(x, random(x.shape[-1], seed=1), 1e-5),
    "layer_norm": lambda k, x: k.layer_norm(x, random(x.shape[-1], seed=1), random(x.shape[-1], seed=2), 1e-5),
    "layer_norm_bare": lambda k, x: k.layer_norm(x, None, None, 1e-5),
    "silu_mul": lambda k, x: k.silu_mul(x, x.flip(-1).contiguous()),
    "gelu_tanh_mul": lambda k, x: k.gelu_tanh_mul(x, x.flip(-1).contiguous()),
}


@pytest.mark.parametrize("op", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("width", [1, 3, 16, 37, 576])
def test_rowwise_kernels_equal_torch(kernels: NativeKernels, op: Callable[..., Tensor], width: int) -> None:
    x = random(2, 5, width) * 4
    close(op(kernels, x), op(reference, x), 2e-6)


@pytest.mark.parametrize("op", ROWS.values(), ids=ROWS.keys())
def test_rowwise_kernels_keep_a_rows_bits_and_a_rows_nan(kernels: NativeKernels, op: Callable[..., Tensor]) -> None:
    x = random(100, 577)
    x[7, 100] = float("nan")
    kernels.set_threads(3)
    together = op(kernels, x)
    kernels.set_threads(1)
    rest = [i for i in range(100) if i != 7]
    assert together[7].isnan().any()
    assert together[rest].isfinite().all()
    for i in (0, 50, 99):
        assert torch.equal(op(kernels, x[i : i + 1])[0], together[i])


@pytest.mark.parametrize("op", [ROWS["silu_mul"], ROWS["gelu_tanh_mul"]])
def test_activations_survive_large_values(kernels: NativeKernels, op: Callable[..., Tensor]) -> None:
    x = torch.tensor([[-1e30, -200.0, -88.5, -20.0, -0.0, 1e-30, 20.0, 88.5, 200.0, 1e15]])
    close(op(kernels, x), op(reference, x), 1e-5)


@pytest.mark.parametrize("width", [1, 3, 16, 37, 576, 49152])
def test_peaks_equal_torch(kernels: NativeKernels, width: int) -> None:
    x = random(4, width) * 30
    x[1] -= 1e4
    x[2, width // 2 :] = -torch.inf
    x[2, 0] = 3.0
    (best, sums), (want_best, want_sums) = kernels.peaks(x), reference.peaks(x)
    assert best.tolist() == want_best.tolist()
    torch.testing.assert_close(sums, want_sums, rtol=0, atol=2e-6)


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_a_peak_is_the_first_of_equals_wherever_it_stands(kernels: NativeKernels, width: int) -> None:
    for at in range(width):
        x = torch.zeros(1, width)
        x[0, at:] = 1.0
        assert kernels.peaks(x)[0].tolist() == [at]


def test_a_peak_is_an_id_even_where_nothing_is_finite(kernels: NativeKernels) -> None:
    x = torch.stack([torch.full((70,), value) for value in (torch.nan, -torch.inf, torch.inf)])
    best, sums = kernels.peaks(x)
    assert best.tolist() == [0, 0, 0]
    assert sums.isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 17, 36])
def test_log_sums_of_peaks_show_what_is_not_finite_and_keep_every_other_rows_bits(
    kernels: NativeKernels, value: float, at: int
) -> None:
    x = random(5, 37)
    clean, alone = kernels.peaks(x)[1], kernels.peaks(x[3:4])[1]
    x[1, at] = value
    got = kernels.peaks(x)[1]
    assert got[1].isnan()
    assert torch.equal(got[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])
    assert torch.equal(alone, clean[3:4])


def test_peaks_take_fp32_alone(kernels: NativeKernels) -> None:
    with pytest.raises(ValueError, match=r"x must be contiguous torch.float32 \[2, 7\] on the CPU, got torch.float64"):
        kernels.peaks(random(2, 7).double())


@pytest.mark.parametrize(("dim", "turned"), [(64, 64), (20, 20), (48, 12), (2, 2)])
def test_rotary_equals_torch(kernels: NativeKernels, dim: int, turned: int) -> None:
    q, k = random(1, 7, 5, dim).transpose(1, 2), random(1, 2, 7, dim, seed=1)
    cos, sin = random(1, 7, turned, seed=2), random(1, 7, turned, seed=3)
    want_q, want_k = q.clone(), k.clone()
    first_q = q[:, :, :1].clone()
    kernels.rotary(q, k, cos, sin)
    reference.rotary(want_q, want_k, cos, sin)
    close(q, want_q, 1e-6)
    close(k, want_k, 1e-6)
    kernels.rotary(first_q, k[:, :, :1], cos[:, :1].contiguous(), sin[:, :1].contiguous())
    assert torch.equal(first_q, q[:, :, :1])


def test_rotary_refuses_what_does_not_fit(kernels: NativeKernels) -> None:
    q, cos = random(1, 5, 7, 12), random(1, 7, 16)
    with pytest.raises(ValueError, match="does not fit"):
        kernels.rotary(q, q, cos, cos)
    with pytest.raises(ValueError, match="sin must be"):
        kernels.rotary(q, q, cos, cos[:, :3])
