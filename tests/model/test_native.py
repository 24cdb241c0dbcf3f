"""The native kernels against their torch twins, on odd sizes, and bit for bit alone against in company."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.methods.activations import ACTIVATIONS
from server.model.native import NativeKernels, NativeUnavailable, load, make_caches, open_library, prepared, reference
from server.model.native.build import find_compiler, library_path, prebuild
from server.model.native.int8 import Int8Weight, pack_int8, unpack_int8
from server.model.native.layouts import pack, unpack

FP32, BF16 = torch.float32, torch.bfloat16
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeKernels]:
    try:
        find_compiler()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    cache = Path(__file__).parents[2] / ".pytest_cache" / "native-kernels"
    opened = open_library(cache, print)
    opened.set_threads(1)
    yield opened
    opened.set_threads(torch.get_num_threads())


def random(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ---- packed linear ----


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


# ---- int8 ----


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


# ---- bottlenecks ----


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


# ---- LoRA ----


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


# ---- attention ----


def laid_out(*caches: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [blocks, block_size, Hkv, D] in the memory order of the kernels."""
    blocks, size, kv_heads, dim = caches[0].shape
    made = make_caches(torch.zeros, (blocks, size, kv_heads, dim))
    for own, wanted in zip(made, caches, strict=True):
        own.copy_(wanted)
    return made


class Batch:
    """R rows with random pages: `lengths[i]` queries at the end of `contexts[i]` positions."""

    def __init__(self, lengths: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int, size: int = 16) -> None:
        needed = [-(-c // size) for c in contexts]
        pages = (torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(7)) + 1).int().split([*needed, 2])
        self.tables = torch.nn.utils.rnn.pad_sequence(list(pages[:-1]), batch_first=True).contiguous()
        self.starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        self.contexts = torch.tensor(contexts, dtype=torch.int32)
        self.q = random(sum(lengths), heads, dim)
        shape = (sum(needed) + 4, size, kv_heads, dim)
        self.keys, self.values = laid_out(random(*shape, seed=1), random(*shape, seed=2))
        self.size = size

    def run(self, attend: Callable[..., Tensor], **how: float) -> Tensor:
        rest = {"scale": 0.17, **how}
        return attend(self.q, self.keys, self.values, self.tables, self.starts, self.contexts, **rest)

    def query(self, row: int, query: int) -> tuple[Tensor, ...]:
        """One query alone: its arguments for a call of a single decode."""
        start, stop = self.starts[row : row + 2].tolist()
        context = self.contexts[row : row + 1] - (stop - start) + query + 1
        one = torch.tensor([0, 1], dtype=torch.int32)
        at = start + query
        return self.q[at : at + 1], self.keys, self.values, self.tables[row : row + 1], one, context

    def spoil(self, row: int, position: int) -> None:
        page = int(self.tables[row, position // self.size])
        self.keys[page, position % self.size] = self.values[page, position % self.size] = float("nan")


HOW = [{}, {"window": 7}, {"window": 100, "softcap": 2.0}, {"softcap": 1.5}]


@quick
@given(
    rows=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 180)), min_size=1, max_size=4),
    shape=st.sampled_from([(4, 2, 64), (9, 3, 20), (3, 3, 8), (6, 1, 33), (2, 2, 1), (14, 1, 96)]),
    size=st.sampled_from([1, 5, 16, 32, 128]),
    how=st.sampled_from(HOW),
)
def test_attention_equals_torch(
    kernels: NativeKernels, rows: list[tuple[int, int]], shape: tuple[int, int, int], size: int, how: dict[str, float]
) -> None:
    batch = Batch([n for n, _ in rows], [n + extra for n, extra in rows], *shape, size)
    close(batch.run(kernels.attention, **how), batch.run(reference.attention, **how))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dim", "size"), [(20, 16), (64, 16), (64, 5)])
def test_a_query_has_the_same_bits_alone_in_a_prefill_and_in_company(
    kernels: NativeKernels, how: dict[str, float], threads: int, dim: int, size: int
) -> None:
    batch = Batch([1, 70, 3, 1], [700, 150, 3, 65], 6, 2, dim, size)
    kernels.set_threads(threads)
    together = batch.run(kernels.attention, **how)
    for row, count in enumerate([1, 70, 3, 1]):
        for query in range(count):
            alone = kernels.attention(*batch.query(row, query), scale=0.17, **how)
            assert torch.equal(alone[0], together[int(batch.starts[row]) + query]), (row, query)
    kernels.set_threads(1)


def test_long_contexts_shared_by_threads_keep_their_bits(kernels: NativeKernels) -> None:
    batch = Batch([1, 2], [2000, 900], 2, 1, 16)
    one = batch.run(kernels.attention)
    kernels.set_threads(4)
    four = batch.run(kernels.attention)
    kernels.set_threads(1)
    assert torch.equal(one, four)
    close(one, batch.run(reference.attention))


@pytest.mark.parametrize("how", [{}, {"window": 9}])
def test_nan_reaches_only_queries_that_see_it(kernels: NativeKernels, how: dict[str, int]) -> None:
    batch = Batch([5, 40, 1], [5, 40, 130], 4, 2, 12)
    want = batch.run(kernels.attention, **how)
    batch.spoil(1, 20)
    got = batch.run(kernels.attention, **how)
    seeing = range(5 + 20, 5 + (29 if how else 40))
    assert got[list(seeing)].isnan().all()
    others = [t for t in range(46) if t not in seeing]
    assert torch.equal(got[others], want[others])


def test_attention_reads_nothing_past_the_context(kernels: NativeKernels) -> None:
    batch = Batch([1, 3], [18, 33], 4, 2, 12)
    want = batch.run(kernels.attention)
    for row, context in ((0, 18), (1, 33)):
        page = int(batch.tables[row, context // 16])
        batch.keys[page, context % 16 :] = batch.values[page, context % 16 :] = float("nan")
    assert torch.equal(batch.run(kernels.attention), want)


def test_attention_takes_the_strides_of_a_transposed_view(kernels: NativeKernels) -> None:
    batch = Batch([3], [40], 4, 2, 12)
    want = batch.run(kernels.attention)
    batch.q = batch.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not batch.q.is_contiguous()
    assert torch.equal(batch.run(kernels.attention), want)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("starts", [0, 2, 1], "ascend"),
        ("starts", [0, 1, 9], "ascend"),
        ("contexts", [18, 2], "shorter"),
        ("contexts", [18, 60], "longer"),
        ("tables", [[1, 99, 0], [1, 2, 3]], "block outside"),
        ("tables", [[1, -1, 0], [1, 2, 3]], "block outside"),
    ],
)
def test_attention_refuses_wrong_indices(kernels: NativeKernels, field: str, value: list[int], message: str) -> None:
    batch = Batch([1, 3], [18, 33], 4, 2, 12)
    setattr(batch, field, torch.tensor(value, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        batch.run(kernels.attention)


def test_attention_refuses_wrong_tensors(kernels: NativeKernels) -> None:
    batch = Batch([1, 3], [18, 33], 4, 2, 12)
    batch.q = batch.q.double()
    with pytest.raises(ValueError, match="q must be fp32"):
        batch.run(kernels.attention)
    batch.q = random(4, 3, 12)
    with pytest.raises(ValueError, match="not a multiple"):
        batch.run(kernels.attention)
    batch.q = random(4, 4, 16)
    with pytest.raises(ValueError, match="keys must be"):
        batch.run(kernels.attention)


def test_write_kv_equals_torch(kernels: NativeKernels) -> None:
    k, v = random(1, 7, 3, 12).transpose(1, 2), random(1, 7, 3, 12, seed=1).transpose(1, 2)
    write = torch.tensor([5, 0, 2, 11, 9, 1, 3])
    caches = make_caches(torch.zeros, (3, 4, 3, 12)), (torch.zeros(3, 4, 3, 12), torch.zeros(3, 4, 3, 12))
    kernels.write_kv(k, v, *caches[0], write)
    reference.write_kv(k, v, *caches[1], write)
    assert torch.equal(caches[0][0], caches[1][0])
    assert torch.equal(caches[0][1], caches[1][1])
    write[4] = 12
    with pytest.raises(ValueError, match="outside the cache"):
        kernels.write_kv(k, v, *caches[0], write)


# ---- norms, activations, rotary ----

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


# ---- a layer's attention in one call ----


@pytest.mark.parametrize("turned", [None, 12, 8])
@pytest.mark.parametrize("how", HOW)
def test_attend_is_rotary_then_write_then_attention(kernels: NativeKernels, turned: int | None, how: dict[str, float]) -> None:
    batch, write = Batch([1, 3], [18, 33], 4, 2, 12), torch.tensor([3, 20, 21, 22])
    k, v = random(1, 4, 2, 12, seed=5), random(1, 4, 2, 12, seed=6)
    q = batch.q[None].contiguous()
    turn = None if turned is None else (random(1, 4, turned, seed=2), random(1, 4, turned, seed=3))
    caches = batch.keys.clone(), batch.values.clone()
    got = kernels.attend(
        q.view(1, 4, 48).clone(), k.view(1, 4, 24).clone(), v.view(1, 4, 24), turn, *caches, write,
        batch.tables, batch.starts, batch.contexts, scale=0.17, **how,
    )  # fmt: skip
    if turn is not None:
        kernels.rotary(q.transpose(1, 2), k.transpose(1, 2), *turn)
    kernels.write_kv(k.transpose(1, 2), v.transpose(1, 2), batch.keys, batch.values, write)
    batch.q = q[0]
    assert torch.equal(got.view(4, 4, 12), batch.run(kernels.attention, **how))
    assert torch.equal(caches[0], batch.keys)
    assert torch.equal(caches[1], batch.values)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.zeros(1, 4, 50), "not a multiple"),
        ("q", torch.zeros(1, 4, 48).double(), "q must be"),
        ("v", torch.zeros(1, 4, 25), "v must be"),
        ("write", torch.tensor([3, 20, 21, 1 << 20]), "outside the cache"),
        ("write", torch.tensor([3, 20]), "write must be"),
        ("turn", (torch.zeros(1, 4, 16), torch.zeros(1, 4, 16)), "turns 16 features"),
        ("turn", (torch.zeros(1, 4, 8), torch.zeros(1, 3, 8)), "sin must be"),
        ("contexts", torch.tensor([18, 60], dtype=torch.int32), "longer"),
    ],
)
def test_attend_refuses_what_does_not_fit(kernels: NativeKernels, name: str, value: object, message: str) -> None:
    batch = Batch([1, 3], [18, 33], 4, 2, 12)
    given: dict[str, Any] = {
        "q": torch.zeros(1, 4, 48), "k": torch.zeros(1, 4, 24), "v": torch.zeros(1, 4, 24), "turn": None,
        "keys": batch.keys, "values": batch.values, "write": torch.tensor([3, 20, 21, 22]),
        "tables": batch.tables, "starts": batch.starts, "contexts": batch.contexts,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        kernels.attend(**{**given, name: value}, scale=0.17)


# ---- building and loading ----


def test_no_compiler_is_a_reason_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    told: list[str] = []
    assert load(tmp_path, told.append) is None
    assert told == ["native kernels unavailable: no C++ compiler found (looked for no-such-compiler)"]


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A compiler that has a version, writes down every other call in `calls` and runs `script`."""
    path = folder / "fake-c++"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho "$@" >> {folder}/calls\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return folder / "calls"


#: Leaves a file where the real compiler would.
WRITES = 'while [ "$1" != -o ]; do shift; done; echo made > "$2"'


def test_a_failing_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch, 'echo "x.cpp:1: error: no such target" >&2; exit 1')
    told: list[str] = []
    assert load(tmp_path / "cache", told.append) is None
    assert told[-1] == "native kernels unavailable: the compiler failed: x.cpp:1: error: no such target"
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_the_library_is_compiled_once_for_many_starters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, told = fake_compiler(tmp_path, monkeypatch, WRITES), list[str]()
    with ThreadPoolExecutor(4) as pool:
        paths = {pool.submit(library_path, tmp_path / "cache", told.append) for _ in range(4)}
    assert len({path.result() for path in paths}) == 1
    assert len([line for line in calls.read_text().splitlines() if "-shared" in line]) == 1
    assert len(told) == 1
    library_path(tmp_path / "cache", told.append)
    assert len(told) == 1


def test_an_unwritable_cache_falls_back_to_a_private_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch, WRITES)
    (tmp_path / "cache").write_text("a file where the directory should be")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    made = library_path(tmp_path / "cache", print)
    assert made.is_relative_to(temporary)
    (private,) = temporary.iterdir()
    private.chmod(0o777)
    told: list[str] = []
    assert load(tmp_path / "cache", told.append) is None
    assert "can be written" in told[0]


def test_another_compiler_version_or_processor_means_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch, WRITES)
    first = library_path(tmp_path, print)
    monkeypatch.setattr("server.model.native.build._cpuinfo", lambda: "model name : other\n")
    assert library_path(tmp_path, print) != first


def test_a_prebuilt_library_serves_where_there_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch, WRITES)
    monkeypatch.setattr("server.model.native.build.LEVELS", {"new": ("feature-of-2099",), "old": ("sse",)})
    monkeypatch.setattr("server.model.native.build.PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr("server.model.native.build._cpuinfo", lambda: "flags : fpu sse sse2\n")
    _, old = prebuild(["new", "old"], tmp_path / "prebuilt")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library_path(tmp_path / "cache", print) == old
    monkeypatch.setattr("server.model.native.build.source_digest", lambda: "of other sources")
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler"):
        library_path(tmp_path / "cache", print)


def test_a_library_that_computes_wrongly_is_refused(
    kernels: NativeKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.model.native.checks.reference.silu_mul", lambda gate, up: gate + up)
    monkeypatch.setattr("server.model.native.library_path", lambda cache, say: kernels.path)
    with pytest.raises(NativeUnavailable, match="self-check of elementwise failed"):
        open_library(tmp_path, print)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.so").write_text("not a library")
    monkeypatch.setattr("server.model.native.library_path", lambda cache, say: tmp_path / "bad.so")
    with pytest.raises(NativeUnavailable, match="built or loaded"):
        open_library(tmp_path, print)
