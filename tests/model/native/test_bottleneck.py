"""Bottlenecks against torch, through every activation that an adapter may name; one slot's NaN reaches its rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.methods.activations import ACTIVATIONS
from server.model.native import NativeKernels, prepared, reference
from tests.model.native.tensors import close, quick, random


def bottleneck_case(n: int, slots: int, rank: int, width: int) -> tuple[Any, ...]:
    """x, y, weights, index, slot: n of n + 3 tokens, in random order, sorted by slot."""
    generator = torch.Generator().manual_seed(n)
    index = torch.randperm(n + 3, generator=generator)[:n]
    slot = torch.randint(slots, (n,), generator=generator).sort().values
    weights = (random(slots, rank, width, seed=1) * 0.2, random(slots, rank, seed=2), random(slots, rank, width, seed=3))
    return random(n + 3, width), random(n + 3, width, seed=4), (*weights, random(slots, width, seed=5)), index, slot


@quick
@given(
    n=st.integers(0, 40), slots=st.integers(1, 9), rank=st.integers(1, 35), width=st.integers(1, 300),
    activation=st.sampled_from(prepared.ACTIVATIONS),
)  # fmt: skip
def test_bottleneck_equals_torch(kernels: NativeKernels, n: int, slots: int, rank: int, width: int, activation: str) -> None:
    x, got, weights, index, slot = bottleneck_case(n, slots, rank, width)
    want = got.clone()
    kernels.bottleneck(x, got, activation, weights, index, slot)
    reference.bottleneck(x, want, ACTIVATIONS[activation], weights, index, slot)
    close(got, want, 1e-3)


def test_native_activations_are_those_that_adapters_may_name() -> None:
    assert set(prepared.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", prepared.ACTIVATIONS)
def test_a_native_activation_is_torchs_from_end_to_end(kernels: NativeKernels, activation: str) -> None:
    x, eye, none = torch.linspace(-30, 30, 4096).view(-1, 64), torch.eye(64)[None], torch.zeros(1, 64)
    got, everyone = torch.zeros_like(x), torch.arange(len(x))
    kernels.bottleneck(x, got, activation, (eye, none, eye, none), everyone, torch.zeros_like(everyone))
    want = ACTIVATIONS[activation](x.double()).float()
    assert ((got - want).abs() <= 3e-7 * (1 + x.abs())).all()


@pytest.mark.parametrize("activation", prepared.ACTIVATIONS)
def test_a_row_of_a_bottleneck_has_the_same_bits_in_any_company(kernels: NativeKernels, activation: str) -> None:
    x, y, weights, index, slot = bottleneck_case(37, 5, 13, 77)
    together = y.clone()
    kernels.bottleneck(x, together, activation, weights, index, slot)
    kernels.set_threads(3)
    threads = y.clone()
    kernels.bottleneck(x, threads, activation, weights, index, slot)
    kernels.set_threads(1)
    assert torch.equal(together, threads)
    for i in (0, 7, 36):
        alone = y.clone()
        kernels.bottleneck(x, alone, activation, weights, index[i : i + 1], slot[i : i + 1])
        assert torch.equal(alone[index[i]], together[index[i]])


def test_a_bottleneck_may_read_what_it_adds_to(kernels: NativeKernels) -> None:
    x, _, weights, index, slot = bottleneck_case(9, 3, 8, 40)
    apart, own = x.clone(), x.clone()
    kernels.bottleneck(x, apart, "silu", weights, index, slot)
    kernels.bottleneck_over("silu", weights, index, slot, own=True)(torch.empty(0), own)
    assert torch.equal(own, apart)


@pytest.mark.parametrize("activation", prepared.ACTIVATIONS)
def test_nan_in_one_slot_of_a_bottleneck_reaches_its_rows_alone(kernels: NativeKernels, activation: str) -> None:
    x, y, weights, index, slot = bottleneck_case(9, 3, 8, 40)
    clean, dirty = y.clone(), y.clone()
    kernels.bottleneck(x, clean, activation, weights, index, slot)
    weights[1][1] = float("nan")
    kernels.bottleneck(x, dirty, activation, weights, index, slot)
    assert dirty[index[slot == 1]].isnan().all()
    others = [i for i in range(len(y)) if i not in index[slot == 1].tolist()]
    assert torch.equal(dirty[others], clean[others])


def test_a_bottleneck_refuses_what_does_not_fit(kernels: NativeKernels) -> None:
    x, y, weights, index, slot = bottleneck_case(4, 3, 8, 40)
    with pytest.raises(ValueError, match="up must be"):
        kernels.bottleneck(x, y, "relu", (*weights[:2], weights[2].mT, weights[3]), index, slot)
    with pytest.raises(ValueError, match="slot names a slot"):
        kernels.bottleneck(x, y, "relu", weights, index, slot + 3)
    with pytest.raises(ValueError, match="index names a row"):
        kernels.bottleneck(x, y, "relu", weights, index + 7, slot)
    with pytest.raises(ValueError, match="x must be"):
        kernels.bottleneck(x[:, :7], y, "relu", weights, index, slot)
