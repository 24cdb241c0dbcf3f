"""LoRA in vectors against torch: rows of many adapters in one call, each with the bits that it has alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.model.native import NativeKernels, reference
from tests.model.native.tensors import BF16, FP32, close, quick, random


def lora_case(n: int, slots: int, rank: int, width: int, out: int, dtype: torch.dtype = FP32) -> tuple[Tensor, ...]:
    """x, y, a, b, index, slot: n of n + 3 tokens, in random order, sorted by slot."""
    generator = torch.Generator().manual_seed(n)
    index = torch.randperm(n + 3, generator=generator)[:n]
    slot = torch.randint(slots, (n,), generator=generator).sort().values
    a, b = random(slots, rank, width, seed=1, dtype=dtype), random(slots, rank, out, seed=2, dtype=dtype)
    return random(n + 3, width), random(n + 3, out, seed=3), a, b, index, slot


@quick
@given(
    n=st.integers(0, 40), slots=st.integers(1, 9), rank=st.integers(1, 35), width=st.integers(1, 150),
    out=st.integers(1, 300), dtype=st.sampled_from([FP32, BF16]),
)  # fmt: skip
def test_lora_equals_torch(
    kernels: NativeKernels, n: int, slots: int, rank: int, width: int, out: int, dtype: torch.dtype
) -> None:
    x, y, a, b, index, slot = lora_case(n, slots, rank, width, out, dtype)
    want = y.clone()
    kernels.lora(x, y, a, b, index, slot)
    reference.lora(x, want, a, b, index, slot)
    close(y, want, 1e-3)
    others = [i for i in range(n + 3) if i not in index.tolist()]
    assert torch.equal(y[others], random(n + 3, out, seed=3)[others])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_of_lora_has_the_same_bits_in_any_company(kernels: NativeKernels, dtype: torch.dtype, threads: int) -> None:
    x, start, a, b, index, slot = lora_case(32, 5, 18, 151, 213, dtype)
    together = start.clone()
    kernels.set_threads(threads)
    kernels.lora(x, together, a, b, index, slot)
    kernels.set_threads(1)
    for i in range(32):
        alone = start.clone()
        kernels.lora(x, alone, a, b, index[i : i + 1], slot[i : i + 1])
        assert torch.equal(alone[index[i]], together[index[i]])


def test_a_nan_adapter_reaches_only_its_own_rows(kernels: NativeKernels) -> None:
    x, y, a, b, index, slot = lora_case(12, 4, 8, 40, 40)
    a[2] = b[2] = float("nan")
    kernels.lora(x, y, a, b, index, slot)
    assert y[index[slot == 2]].isnan().all()
    assert y[index[slot != 2]].isfinite().all()


@pytest.mark.parametrize(("name", "at", "value"), [("index", 4, 15), ("index", 4, -1), ("slot", 5, 4), ("slot", 5, -1)])
def test_lora_refuses_rows_and_slots_out_of_range(kernels: NativeKernels, name: str, at: int, value: int) -> None:
    case = list(lora_case(12, 4, 8, 40, 40))
    case[at] = case[at].clone()
    case[at][3] = value
    before = case[1].clone()
    with pytest.raises(ValueError, match=name):
        kernels.lora(*case)
    assert torch.equal(case[1], before)


def test_lora_refuses_pools_that_do_not_fit(kernels: NativeKernels) -> None:
    x, y, a, b, index, slot = lora_case(12, 4, 8, 40, 50)
    with pytest.raises(ValueError, match="b must be"):
        kernels.lora(x, y, a, b.bfloat16(), index, slot)
    with pytest.raises(ValueError, match="a must be"):
        kernels.lora(x, y, a[:, :7], b, index, slot)
    with pytest.raises(ValueError, match="index must be"):
        kernels.lora(x, y, a, b, index.int(), slot)
