"""AMX tiles: fp32's accuracy out of bf16 pieces, and a row's bits the same in any company, on any threads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.model.native import NativeKernels, reference
from server.model.native.layouts import pack_tiles, unpack_tiles
from server.model.native.prepared import Split
from tests.model.native.tensors import quick, random, run_program


@pytest.fixture(scope="session")
def kernels(kernels: NativeKernels) -> NativeKernels:
    if not kernels.has_tiles:
        pytest.skip("this processor has no AMX tiles, or the kernel keeps them back")
    return kernels


def matrix(n: int, k: int) -> Tensor:
    return random(n, k, seed=1).bfloat16()


class Tiled:
    """A weight in tiles beside the same in panels."""

    def __init__(self, kernels: NativeKernels, weight: Tensor, bias: Tensor | None = None) -> None:
        self.plain, self.tiled = kernels.packed_linear(weight, bias), kernels.packed_linear(weight, bias, tiles=True)
        self.split = Split()
        self.tiled.tile(self.split)

    def __call__(self, x: Tensor, first: int = 0) -> Tensor:
        """With rows of a prompt from `first` on."""
        self.split.first, self.split.rows = first, len(x)
        return self.tiled(x)


@quick
@given(m=st.integers(1, 150), n=st.integers(1, 100), k=st.integers(1, 130), bias=st.booleans())
def test_tiles_equal_torch(kernels: NativeKernels, m: int, n: int, k: int, bias: bool) -> None:
    x, weight, shift = random(m, k), matrix(n, k), random(n, seed=2) if bias else None
    want = reference.linear(x, weight, shift)
    torch.testing.assert_close(Tiled(kernels, weight, shift)(x), want, rtol=1e-4, atol=1e-4)


@quick
@given(m=st.integers(1, 40), n=st.integers(1, 100), k=st.integers(1, 130), first=st.integers(0, 40))
def test_rows_before_a_prompt_have_the_bits_that_they_have_without_tiles(
    kernels: NativeKernels, m: int, n: int, k: int, first: int
) -> None:
    x, first = random(m, k), min(first, m)
    linear = Tiled(kernels, matrix(n, k), random(n, seed=2))
    got = linear(x, first)
    assert torch.equal(got[:first], linear.plain(x)[:first])
    assert torch.equal(got[first:], linear(x)[first:])


def test_what_is_not_the_step_is_left_to_vectors(kernels: NativeKernels) -> None:
    linear, x = Tiled(kernels, matrix(75, 97)), random(9, 97)
    linear.split.first, linear.split.rows = 0, 8
    assert torch.equal(linear.tiled(x), linear.plain(x))


def test_tiles_are_no_less_exact_than_fp32_arithmetic(kernels: NativeKernels) -> None:
    x, weight = random(200, 576), matrix(96, 576)
    exact, linear = x.double() @ weight.double().T, Tiled(kernels, weight)
    assert (linear(x) - exact).abs().max() <= (linear.plain(x) - exact).abs().max()


def test_the_pieces_of_a_number_are_all_of_it(kernels: NativeKernels) -> None:
    """Over the identity every bit of a number comes back, from the largest to those near the smallest."""
    x = random(40, 33) * torch.logspace(-30, 38, 40).unsqueeze(1)
    x[0, 0], x[1, 1] = torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max
    assert torch.equal(Tiled(kernels, torch.eye(33).bfloat16())(x), x)


def test_a_row_has_the_same_bits_in_any_company_and_on_any_threads(kernels: NativeKernels) -> None:
    x, linear = random(500, 97), Tiled(kernels, matrix(75, 97), random(75, seed=2))
    alone = linear(x[5:6])[0]
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        for rows in (6, 15, 16, 17, 63, 64, 65, 128, 200, 500):
            assert torch.equal(linear(x[:rows])[5], alone)
            assert torch.equal(linear(x[5 : rows + 5])[0], alone)
            assert torch.equal(linear(x[:rows], first=3)[5], alone)
    kernels.set_threads(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [20, 90])
def test_what_is_not_finite_stays_in_its_row(kernels: NativeKernels, value: float, rows: int) -> None:
    x, linear = random(rows, 33), Tiled(kernels, matrix(40, 33))
    clean = linear(x)
    x[7, 3] = value
    got = linear(x)
    assert not got[7].isfinite().any()
    others = [row for row in range(rows) if row != 7]
    assert torch.equal(got[others], clean[others])


def test_a_row_reads_nothing_that_an_earlier_call_left_behind(kernels: NativeKernels) -> None:
    linear = Tiled(kernels, matrix(40, 33))
    clean = linear(random(3, 33))
    linear(torch.full((64, 33), float("nan")))
    assert torch.equal(linear(random(3, 33)), clean)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 31), (70, 37), (64, 96)])
def test_unpack_gives_the_weight_back(n: int, k: int) -> None:
    assert torch.equal(unpack_tiles(pack_tiles(matrix(n, k)), n, k), matrix(n, k))


def test_only_bf16_goes_into_tiles(kernels: NativeKernels) -> None:
    with pytest.raises(ValueError, match=r"weight must be bf16 with 2 dimensions, got torch.float32 \[5, 7\]"):
        pack_tiles(random(5, 7))
    linear = kernels.packed_linear(random(5, 7), tiles=True)
    kernels.tile(linear)
    assert linear.panels.dtype is torch.float32
    assert torch.equal(linear(random(3, 7)), kernels.packed_linear(random(5, 7))(random(3, 7)))


def test_a_tiled_weight_is_the_weight(kernels: NativeKernels) -> None:
    weight = matrix(70, 37)
    linear = kernels.packed_linear(weight, tiles=True)
    assert torch.equal(linear.unpack(), weight)


def test_tiles_are_used_only_once_somebody_says_so(kernels: NativeKernels) -> None:
    weight, x = matrix(70, 37), random(9, 37)
    linear, plain = kernels.packed_linear(weight, tiles=True), kernels.packed_linear(weight)
    kernels.split.first, kernels.split.rows = 0, 9
    assert torch.equal(linear(x), plain(x))
    kernels.tile(linear)
    assert not torch.equal(linear(x), plain(x))
    kernels.split.rows = -1


# -- LoRA of prompts -------------------------------------------------------------------------------------------------


class Pools:
    """A [slots, rank, in] and B [slots, rank, out] in bf16, and rows that go through them: (first row, rows, slot)."""

    def __init__(self, rank: int, width: int, out: int, runs: Sequence[tuple[int, int, int]], slots: int = 5) -> None:
        self.a, self.b = random(slots, rank, width, seed=3).bfloat16(), random(slots, rank, out, seed=4).bfloat16()
        ordered = sorted(runs, key=lambda run: run[2])  # by slot, as batches are
        self.index = torch.cat([torch.arange(first, first + count) for first, count, _ in ordered])
        self.slot = torch.cat([torch.full((count,), slot) for _, count, slot in ordered])

    def added(self, kernels: NativeKernels, x: Tensor, y: Tensor, prompt: int = 0) -> Tensor:
        """y and the adapters' products, with rows of a prompt from `prompt` on."""
        got = y.clone()
        kernels.lora(x, got, self.a, self.b, self.index, self.slot, prompt)
        return got

    def behind(self, kernels: NativeKernels, linear: Tiled, x: Tensor, prompt: int = 0) -> Tensor:
        """The same behind a linear, both as instructions of one program."""
        y = torch.full((len(x), self.b.shape[-1]), torch.nan)
        run_behind(kernels, linear, x, y, [self], prompt)
        return y


def run_behind(kernels: NativeKernels, linear: Tiled, x: Tensor, y: Tensor, pools: Sequence[Pools], prompt: int = 0) -> None:
    """A linear and what pools add to it, as the instructions of one program."""
    runs = [kernels.lora_over(each.a, each.b, each.index, each.slot, prompt) for each in pools]
    acts = [run.words(x.data_ptr(), y.data_ptr()) for run in runs]
    run_program(kernels, [linear.tiled.words(x.data_ptr(), y.data_ptr()), *acts], len(x), prompt)


@quick
@given(
    rank=st.integers(1, 70),
    width=st.integers(1, 130),
    out=st.integers(1, 140),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    gap=st.integers(0, 3),
    prompt=st.integers(0, 50),
)
def test_lora_in_tiles_equals_torch(
    kernels: NativeKernels, rank: int, width: int, out: int, counts: list[int], gap: int, prompt: int
) -> None:
    runs, at = [], gap
    for slot, count in enumerate(counts):
        runs.append((at, count, slot))
        at += count + gap
    x, y, pools = random(at, width), random(at, out, seed=1), Pools(rank, width, out, runs)
    want = y.clone()
    reference.lora(x, want, pools.a.float(), pools.b.float(), pools.index, pools.slot)
    torch.testing.assert_close(pools.added(kernels, x, y, min(prompt, at)), want, rtol=1e-4, atol=1e-3)


@quick
@given(
    rank=st.sampled_from([1, 8, 16, 24, 40]),
    width=st.integers(1, 100),
    out=st.sampled_from([16, 33, 64, 75, 96, 130]),
    counts=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    gap=st.integers(0, 3),
    prompt=st.integers(0, 50),
    threads=st.integers(1, 3),
)
def test_behind_a_linear_lora_has_the_bits_that_it_has_alone(
    kernels: NativeKernels, rank: int, width: int, out: int, counts: list[int], gap: int, prompt: int, threads: int
) -> None:
    runs, at = [], gap
    for slot, count in enumerate(reversed(counts)):
        runs.append((at, count, len(counts) - slot))
        at += count + gap
    x, prompt, pools = random(at, width), min(prompt, at), Pools(rank, width, out, runs)
    linear = Tiled(kernels, matrix(out, width))
    kernels.set_threads(threads)
    together = pools.behind(kernels, linear, x, prompt)
    assert torch.equal(together, pools.added(kernels, x, linear(x, prompt), prompt))
    kernels.set_threads(1)
    for first, count, slot in runs:
        last = first + count - 1
        if last >= prompt:  # alone, in a step of its own
            alone = Pools(rank, width, out, [(0, 1, slot)]).behind(kernels, linear, x[last : last + 1])
            assert torch.equal(together[last], alone[0])


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("rows", [40, 90])
def test_a_broken_adapter_reaches_no_other_row_of_its_tiles(kernels: NativeKernels, side: str, rows: int) -> None:
    """Slots change in the middle of tiles, and some rows of them go through none."""
    pools, linear, x = (
        Pools(16, 33, 40, [(2, 9, 1), (11, 10, 2), (22, 15, 3)]),
        Tiled(kernels, matrix(40, 33)),
        random(rows, 33),
    )
    clean = pools.behind(kernels, linear, x)
    getattr(pools, side)[2] = torch.nan
    got = pools.behind(kernels, linear, x)
    assert got[11:21].isnan().all()
    others = [row for row in range(rows) if not 11 <= row < 21]
    assert torch.equal(got[others], clean[others])
    assert torch.equal(pools.added(kernels, x, linear(x))[others], clean[others])


def test_lora_in_tiles_is_no_less_exact_than_fp32_arithmetic(kernels: NativeKernels) -> None:
    pools, x, y = Pools(16, 576, 96, [(0, 200, 1)]), random(200, 576), torch.zeros(200, 96)
    exact = x.double() @ pools.a[1].double().T @ pools.b[1].double()
    vectors = pools.added(kernels, x, y, prompt=200)
    assert (pools.added(kernels, x, y) - exact).abs().max() <= 1.5 * (vectors - exact).abs().max()


def test_two_adapters_of_one_row_both_act(kernels: NativeKernels) -> None:
    """Two pools behind one linear that share rows: the second is added to what the first left."""
    linear, x = Tiled(kernels, matrix(40, 33)), random(50, 33)
    pools = [Pools(16, 33, 40, [(0, 50, 1)]), Pools(8, 33, 40, [(10, 30, 2)])]
    want = pools[1].added(kernels, x, pools[0].added(kernels, x, linear(x)))
    y = torch.empty(50, 40)
    run_behind(kernels, linear, x, y, pools)
    assert torch.equal(y, want)
