"""Linears of one input with what adapters do behind them, computed together: the bits of the same calls one after another."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.model.native import NativeKernels, opcodes
from server.model.native.int8 import Int8Weight
from server.model.native.prepared import LoraRun, PackedLinear
from tests.model.native.tensors import BF16, FP32, quick, random, run_program


class Adapted:
    """A linear and the adapters behind it: LoRA pools, vectors that are added and vectors that rows are multiplied by."""

    def __init__(self, kernels: NativeKernels, seed: int, rows: int, k: int, n: int, form: str, acts: Sequence[str]) -> None:
        weight = random(n, k, seed=seed, dtype=FP32 if form == "fp32" else BF16)
        bias = random(n, seed=seed + 1) if seed % 2 else None
        self.linear: PackedLinear = kernels.packed_linear(Int8Weight.of(weight) if form == "int8" else weight, bias)
        self.acts = [(act, self._adapters(kernels, act, seed + i, rows, k, n)) for i, act in enumerate(acts)]
        self.n = n

    def _adapters(self, kernels: NativeKernels, act: str, seed: int, rows: int, k: int, n: int) -> LoraRun | tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(rows, generator=generator)[: max(rows - seed % 3, 1)]
        index = index.sort().values if seed % 4 else index
        slot = torch.randint(3, (len(index),), generator=generator).sort().values
        if not act.startswith("lora"):
            return random(3, n, seed=seed), index, slot
        rank, dtype = 1 + seed % 21, BF16 if act == "lora-bf16" else FP32
        a, b = random(3, rank, k, seed=seed, dtype=dtype), random(3, rank, n, seed=seed + 1, dtype=dtype)
        return kernels.lora_over(a, b, index, slot)

    def alone(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        for act, given_ in self.acts:
            if isinstance(given_, LoraRun):
                given_(x, y)
                continue
            vectors, index, slot = given_
            y[index] = y[index] + vectors[slot] if act == "add" else y[index] * vectors[slot]
        return y

    def words(self, x: Tensor, y: Tensor) -> list[tuple[int, ...]]:
        words = [self.linear.words(x.data_ptr(), y.data_ptr())]
        for act, given_ in self.acts:
            if isinstance(given_, LoraRun):
                words.append(given_.words(x.data_ptr(), y.data_ptr()))
                continue
            vectors, index, slot = given_
            kind = opcodes.ADD_ROWS if act == "add" else opcodes.MUL_ROWS
            where = (vectors.data_ptr(), index.data_ptr(), slot.data_ptr(), len(index), len(vectors), self.n)
            words.append((kind, y.data_ptr(), *where))
        return words


def together(kernels: NativeKernels, x: Tensor, adapted: Sequence[Adapted]) -> list[Tensor]:
    outputs = [torch.full((len(x), each.n), torch.nan) for each in adapted]
    words = [words for each, y in zip(adapted, outputs, strict=True) for words in each.words(x, y)]
    run_program(kernels, words, tokens=len(x), prompt=len(x))
    return outputs


acts = st.lists(st.sampled_from(["lora-fp32", "lora-bf16", "add", "multiply"]), max_size=3)


@quick
@given(
    rows=st.integers(1, 40),
    k=st.integers(1, 90),
    linears=st.lists(st.tuples(st.integers(1, 100), st.sampled_from(["fp32", "bf16", "int8"]), acts), min_size=1, max_size=4),
    threads=st.integers(1, 4),
)
def test_a_stage_has_the_bits_of_its_parts(
    kernels: NativeKernels, rows: int, k: int, linears: list[tuple[int, str, list[str]]], threads: int
) -> None:
    x = random(rows, k)
    adapted = [Adapted(kernels, 10 * i, rows, k, n, form, acts) for i, (n, form, acts) in enumerate(linears)]
    want = [each.alone(x) for each in adapted]
    kernels.set_threads(threads)
    got = together(kernels, x, adapted)
    kernels.set_threads(1)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [1, 3])
def test_so_has_one_of_several_blocks_of_rows(kernels: NativeKernels, threads: int) -> None:
    rows, k = 150, 6000  # rows of 24 KB: blocks of 48
    adapted = [Adapted(kernels, seed, rows, k, n, "bf16", ["lora-bf16", "add", "lora-fp32"]) for seed, n in ((4, 70), (21, 33))]
    x = random(rows, k)
    want = [each.alone(x) for each in adapted]
    kernels.set_threads(threads)
    got = together(kernels, x, adapted)
    kernels.set_threads(1)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_stages_follow_each_other_where_one_reads_what_another_wrote(kernels: NativeKernels) -> None:
    x = random(5, 64)
    first, second = (Adapted(kernels, seed, 5, 64, 64, "bf16", ["lora-bf16"]) for seed in (2, 4))
    middle, last = torch.empty(5, 64), torch.empty(5, 64)
    words = [*first.words(x, middle), *second.words(middle, last), *first.words(x, middle)]
    run_program(kernels, words, tokens=len(x), prompt=len(x))
    assert torch.equal(last, second.alone(first.alone(x)))
    assert torch.equal(middle, first.alone(x))
