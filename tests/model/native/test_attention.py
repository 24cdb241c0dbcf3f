"""Attention over pages, the write that fills them, and both in one call: torch's numbers, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.model.native import NativeKernels, make_caches, reference
from tests.model.native.tensors import close, quick, random


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
