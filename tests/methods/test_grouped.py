"""Row arithmetic: the rows of a step, their groups, and pools that keep their invariant."""

from __future__ import annotations

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.methods.base import Tensors
from server.methods.grouped import RESERVED, Pool, PooledOp, each_group, per_row, rows_of, split_of


def test_rows_are_ordered_by_slot_and_then_by_token():
    rows = rows_of([0, 7, 4, 4, 0, 4])
    assert rows.index.tolist() == [2, 3, 5, 1]
    assert rows.slot.tolist() == [4, 4, 4, 7]
    assert rows.groups == ((4, 0, 3), (7, 3, 4))
    assert rows.span is None
    assert rows_of([0, 2, 2, 5]).span == slice(1, 4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), max_size=24))
def test_take_store_and_groups_agree_for_every_composition(slots):
    rows, x = rows_of(slots), torch.arange(len(slots) * 2.0).view(-1, 2)
    assert torch.equal(rows.take(x), x[rows.index])
    stored = rows.store(torch.zeros_like(x), rows.take(x))
    assert torch.equal(stored, x * (torch.tensor(slots, dtype=torch.float32) > 0).unsqueeze(-1))
    for slot, where in each_group(rows):
        assert {slots[int(value) // 2] for value in x[where][:, 0]} == {slot}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), max_size=24))
def test_a_split_covers_every_row_once_with_its_own_slot(slots):
    split, tokens = split_of(rows := rows_of(slots)), torch.arange(len(slots))
    seen = [(slot, token) for slot, where in split.long for token in tokens[where].tolist()]
    if split.short is not None:
        own = torch.arange(8)[split.slots].tolist()
        seen += list(zip(own, tokens[split.short].tolist(), strict=True))
    assert sorted(seen) == sorted((slot, token) for token, slot in enumerate(slots) if slot)
    assert split_of(rows) is split


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), max_size=24))
def test_each_row_gets_its_own_vector(slots):
    rows, pool = rows_of(slots), torch.randn(6, 3)
    for _ in range(2):
        assert torch.equal(per_row(pool, rows, "key").expand(len(rows.index), 3), pool[rows.slot])


class _Nothing(PooledOp):
    order = 99

    def grow(self, capacity: int) -> None: ...

    def put(self, slot: int, tensors: Tensors) -> None:
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), max_size=24), st.sets(st.integers(1, 5)))
def test_held_rows_are_those_of_a_step_without_the_others(slots, held):
    one, other, rows = _Nothing(), _Nothing(), rows_of(slots)
    for slot in held:
        one.put(slot, {})
        other.put(slot, {})

    got, expected = one.held(rows), rows_of([slot if slot in held else 0 for slot in slots])

    assert got.index.tolist() == expected.index.tolist()
    assert (got.slot.tolist(), got.groups) == (expected.slot.tolist(), expected.groups)
    assert got.span in ([expected.span] if rows.span else [expected.span, None])  # without a span, tokens stay on the device
    assert one.held(rows) is other.held(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_in_host_memory_grows_where_it_lies_and_takes_memory_as_it_is_written(dtype):
    pool = Pool((256, 1024), 0.0, torch.device("cpu"), dtype)
    pool.grow(2)
    where = pool.tensor.data_ptr()
    pool.tensor[1] = 7.0
    before = psutil.Process().memory_info().rss
    for capacity in range(3, RESERVED + 1):
        pool.grow(capacity)
    assert pool.tensor.data_ptr() == where
    assert len(pool.tensor) == RESERVED
    assert pool.nbytes == RESERVED * 256 * 1024 * dtype.itemsize
    assert psutil.Process().memory_info().rss - before < pool.nbytes / 4
    pool.grow(RESERVED + 1)
    assert len(pool.tensor) == 2 * RESERVED
    assert bool((pool.tensor[1] == 7).all())
    assert not pool.tensor[0].any()
    assert not pool.tensor[2:].any()


def test_a_pool_is_the_identity_wherever_nothing_was_put():
    pool = Pool((2,), 1.0, torch.device("cpu"), torch.float32)
    pool.grow(2)
    pool.tensor[1] = 7.0
    pool.grow(3)
    assert pool.tensor.tolist() == [[1, 1], [7, 7], [1, 1], [1, 1]]
    pool.clear(1)
    assert torch.equal(pool.tensor, torch.ones(4, 2))
    pool.grow(1)
    assert len(pool.tensor) == 4


@pytest.mark.parametrize("identity", [0.0, 1.0])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_pool_holds_what_is_put_and_its_identity_behind_it(held: torch.dtype, given: torch.dtype, identity: float) -> None:
    pool = Pool((6, 40), identity, torch.device("cpu"), held)
    own = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).to(given).T
    for slots in (3, 9):  # it moved in between
        pool.grow(slots)
        pool.put(slots - 1, torch.full((6, 40), 7.0, dtype=given))
        pool.put(slots - 1, own)
        assert torch.equal(pool.tensor[slots - 1, :2], own.to(held))
        assert (pool.tensor[slots - 1, 2:] == identity).all()
        assert (pool.tensor[: slots - 1] == identity).all()
        pool.clear(slots - 1)
        assert (pool.tensor == identity).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "shape"), [((40,), (39,)), ((40,), (41,)), ((6, 40), (7, 40)), ((6, 40), (2, 1)), ((6, 40), (2, 39))]
)
def test_a_pool_takes_no_other_shape(size: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pool = Pool(size, 0.0, torch.device("cpu"), torch.float32)
    pool.grow(2)
    with pytest.raises(ValueError, match="does not fit a slot of"):
        pool.put(1, torch.ones(shape, dtype=dtype))
    assert not pool.tensor.any()
