"""Linears over int8 weights: they multiply with the rounded matrix, and give values and scales back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from server.model.native import NativeKernels, reference
from server.model.native.int8 import Int8Weight, pack_int8, unpack_int8
from tests.model.native.tensors import close, quick, random


@quick
@given(m=st.integers(1, 40), n=st.integers(1, 100), k=st.integers(1, 130), bias=st.booleans())
def test_an_int8_linear_equals_the_rounded_matrix(kernels: NativeKernels, m: int, n: int, k: int, bias: bool) -> None:
    x, weight = random(m, k), Int8Weight.of(random(n, k, seed=1))
    shift = random(n, seed=2) if bias else None
    close(kernels.packed_linear(weight, shift)(x), reference.linear(x, weight.widened(), shift))


def test_a_row_of_an_int8_linear_has_the_same_bits_in_any_company_and_on_any_threads(kernels: NativeKernels) -> None:
    x, linear = random(600, 597), kernels.packed_linear(Int8Weight.of(random(75, 597, seed=1)), random(75, seed=2))
    alone = linear(x[5:6])[0]
    for rows in (6, 12, 13, 32, 41, 600):
        assert torch.equal(linear(x[:rows])[5], alone), rows
    one = linear(x)
    kernels.set_threads(3)
    three = linear(x)
    kernels.set_threads(1)
    assert torch.equal(one, three)


def test_nan_in_one_row_of_an_int8_linear_stays_there(kernels: NativeKernels) -> None:
    x, linear = random(20, 33), kernels.packed_linear(Int8Weight.of(random(40, 33, seed=1)))
    want = linear(x)
    x[3] = float("nan")
    got = linear(x)
    assert got[3].isnan().all()
    assert torch.equal(got[[i for i in range(20) if i != 3]], want[[i for i in range(20) if i != 3]])


@quick
@given(n=st.integers(1, 100), k=st.integers(1, 40))
def test_unpacking_int8_gives_values_and_scales_back(n: int, k: int) -> None:
    weight = Int8Weight.of(random(n, k))
    got = unpack_int8(pack_int8(weight), n)
    assert torch.equal(got.values, weight.values)
    assert torch.equal(got.scales, weight.scales)


def test_an_int8_linear_unpacks_to_the_matrix_it_multiplies_with_in_a_quarter_of_the_bytes(kernels: NativeKernels) -> None:
    weight = Int8Weight.of(random(64, 40))
    linear = kernels.packed_linear(weight)
    assert torch.equal(linear.unpack(), weight.widened())
    assert linear.nbytes == weight.nbytes == 64 * 40 + 64 * 4
