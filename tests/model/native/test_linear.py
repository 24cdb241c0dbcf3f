"""Packed linears against torch, on odd sizes; a row's bits are the same in any company, for weights in fp32 and bf16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.model.native import NativeKernels, reference
from server.model.native.layouts import pack, unpack
from tests.model.native.tensors import BF16, FP32, close, quick, random


@quick
@given(
    m=st.integers(1, 40), n=st.integers(1, 100), k=st.integers(1, 130), dtype=st.sampled_from([FP32, BF16]), bias=st.booleans()
)
def test_linear_equals_torch(kernels: NativeKernels, m: int, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
    x, weight = random(m, k), random(n, k, seed=1, dtype=dtype)
    shift = random(n, seed=2) if bias else None
    close(kernels.packed_linear(weight, shift)(x), reference.linear(x, weight, shift))


def test_linear_with_several_row_blocks_and_threads(kernels: NativeKernels) -> None:
    x, weight = random(700, 600), random(130, 600, seed=1)
    linear = kernels.packed_linear(weight)
    one = linear(x)
    close(one, x @ weight.T, 1e-3)
    kernels.set_threads(3)
    three = linear(x)
    kernels.set_threads(1)
    assert torch.equal(one, three)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_row_of_linear_has_the_same_bits_in_any_company(kernels: NativeKernels, dtype: torch.dtype) -> None:
    x, linear = random(600, 97), kernels.packed_linear(random(75, 97, seed=1, dtype=dtype), random(75, seed=2))
    alone = linear(x[5:6])[0]
    for rows in (6, 12, 13, 32, 41, 600):
        assert torch.equal(linear(x[:rows])[5], alone), rows


def test_bf16_weights_give_the_bits_of_the_same_weights_in_fp32(kernels: NativeKernels) -> None:
    x, weight = random(17, 61), random(45, 61, seed=1, dtype=BF16)
    assert torch.equal(kernels.packed_linear(weight)(x), kernels.packed_linear(weight.float())(x))


def test_linear_keeps_leading_dimensions_and_takes_no_rows(kernels: NativeKernels) -> None:
    linear = kernels.packed_linear(random(5, 7))
    assert linear(random(1, 3, 7)).shape == (1, 3, 5)
    assert linear(random(0, 7)).shape == (0, 5)


def test_nan_in_one_row_of_linear_stays_there(kernels: NativeKernels) -> None:
    x, linear = random(20, 33), kernels.packed_linear(random(40, 33, seed=1))
    want = linear(x)
    x[3] = float("nan")
    got = linear(x)
    assert got[3].isnan().all()
    assert torch.equal(got[[i for i in range(20) if i != 3]], want[[i for i in range(20) if i != 3]])


@quick
@given(n=st.integers(1, 100), k=st.integers(1, 40), dtype=st.sampled_from([FP32, BF16]))
def test_unpack_gives_the_weight_back(n: int, k: int, dtype: torch.dtype) -> None:
    weight = random(n, k, dtype=dtype)
    weight[0, 0] = float("nan")
    got = unpack(pack(weight), n)
    assert got.dtype is dtype
    as_int = {FP32: torch.int32, BF16: torch.int16}[dtype]
    assert torch.equal(got.contiguous().view(as_int), weight.view(as_int))


@pytest.mark.parametrize(
    "x", [random(2, 8), random(2, 7).double(), random(7, 2).T, random(7)[:, None]], ids=["width", "dtype", "layout", "shape"]
)
def test_linear_refuses_a_wrong_input(kernels: NativeKernels, x: Tensor) -> None:
    with pytest.raises(ValueError, match="x must be contiguous"):
        kernels.packed_linear(random(5, 7))(x)


def test_linear_refuses_a_wrong_weight_or_bias(kernels: NativeKernels) -> None:
    with pytest.raises(ValueError, match="fp32 or bf16"):
        kernels.packed_linear(random(5, 7).half())
    with pytest.raises(ValueError, match="bias must be"):
        kernels.packed_linear(random(5, 7), random(4))
