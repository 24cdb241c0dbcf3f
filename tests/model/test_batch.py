"""Batch: the index arithmetic against a plain loop, and when gathered rows may be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.plan import Row
from server.engine.plan import Sequence as Seq
from server.methods.base import NO_PROMPT, Rows
from server.model.batch import BatchBuilder, BlockTables, order_rows
from server.model.step import Step

SIZE = 4


def row(start: int, count: int, slots: Mapping[str, int] | None = None, *, length: int | None = None, first: int = 1) -> Row:
    """A row over blocks `first`, `first` + 1, ... whose id at position p is 100 + p."""
    length = length or start + count
    blocks = list(range(first, first + -(-length // SIZE)))
    seq = Seq(None, (), b"", 0, [100 + p for p in range(length)], length, done=start, blocks=blocks, slots=slots or {})
    return Row(seq, start, count)


def filled(rows: Sequence[Row], keep: Sequence[int] = (0,)) -> Step:
    step = Step()
    BatchBuilder(step, SIZE, torch.device("cpu")).fill(rows, keep)
    return step


def test_decode_rows_come_first_each_half_sorted_by_pool_and_slot() -> None:
    rows = {
        "long a": row(0, 3, {"a": 1}),
        "b2": row(5, 1, {"b": 2}),
        "base": row(9, 1),
        "a7": row(2, 1, {"a": 7}),
        "long base": row(0, 2),
        "a2 b1": row(4, 1, {"b": 1, "a": 2}),
        "a2": row(6, 1, {"a": 2}),
    }
    names = {found.sequence: name for name, found in rows.items()}
    ordered = [names[found.sequence] for found in order_rows(list(rows.values()))]
    assert ordered == ["base", "a2", "a2 b1", "a7", "b2", "long base", "long a"]


def test_the_step_of_the_documentation() -> None:
    """The figure in server/model/step.py: a decode after 41, a prefill of 4, a decode after 12."""
    rows = order_rows([row(41, 1, first=1), row(0, 4, first=20), row(12, 1, first=30)])
    step = filled(rows, keep=[0, 1, 5])
    assert step.ids.tolist() == [141, 112, 100, 101, 102, 103]
    assert step.positions.tolist() == [41, 12, 0, 1, 2, 3]
    assert step.starts.tolist() == [0, 1, 2, 6]
    assert step.contexts.tolist() == [42, 13, 4]
    assert step.key_starts.tolist() == [0, 42, 55, 59]
    assert step.keep.tolist() == [0, 1, 5]
    assert step.spans == ((0, 1, 42), (1, 2, 13), (2, 6, 4))
    assert step.decodes == 2
    assert step.write.tolist() == [11 * 4 + 1, 33 * 4, 20 * 4, 20 * 4 + 1, 20 * 4 + 2, 20 * 4 + 3]
    assert step.tables.tolist()[1] == [30, 31, 32, 33, 0, 0, 0, 0, 0, 0, 0]


_slots = st.dictionaries(st.sampled_from(["lora:8", "lora:16", "ia3"]), st.integers(1, 4), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), _slots), min_size=1, max_size=7))
def test_index_arithmetic_equals_a_loop_over_tokens(given_rows: list[tuple[int, int, dict[str, int]]]) -> None:
    rows = order_rows([row(start, n, slots, first=1 + 20 * i) for i, (start, n, slots) in enumerate(given_rows)])
    step = filled(rows)
    at = 0
    pools: dict[str, list[tuple[int, int]]] = {}
    for i, found in enumerate(rows):
        assert step.spans[i] == (at, at + found.count, found.start + found.count)
        blocks = found.sequence.blocks
        assert step.tables[i, : len(blocks)].tolist() == blocks
        assert not step.tables[i, len(blocks) :].any()
        for position in range(found.start, found.start + found.count):
            assert step.ids[at] == 100 + position
            assert step.positions[at] == position
            assert step.write[at] == blocks[position // SIZE] * SIZE + position % SIZE
            for pool, slot in found.sequence.slots.items():
                pools.setdefault(pool, []).append((slot, at))
            at += 1
    assert len(step.ids) == at
    assert step.decodes == sum(1 for found in rows if found.count == 1)
    assert step.rows.keys() == pools.keys()
    for pool, tokens in pools.items():
        check_rows(step.rows[pool], sorted(tokens))


def check_rows(rows: Rows, expected: list[tuple[int, int]]) -> None:
    """`expected`: (slot, token), sorted."""
    tokens = [token for _, token in expected]
    assert rows.slot.tolist() == [slot for slot, _ in expected]
    assert rows.index.tolist() == tokens
    run = tokens == list(range(tokens[0], tokens[0] + len(tokens)))
    assert rows.span == (slice(tokens[0], tokens[0] + len(tokens)) if run else None)
    covered = [slot for slot, start, stop in rows.groups for _ in range(start, stop)]
    assert covered == rows.slot.tolist()
    assert len({slot for slot, _, _ in rows.groups}) == len(rows.groups)


def test_a_shifted_row_has_lower_positions_at_the_same_places() -> None:
    """A prefix of 5 that takes no positions: the text's first token is position 0, in the fifth place of the cache."""
    shifted, plain = row(5, 3, first=1), row(5, 3, first=9)
    shifted.sequence.shift = 5
    step = filled([shifted, plain])
    assert step.positions.tolist() == [0, 1, 2, 5, 6, 7]
    assert step.contexts.tolist() == [8, 8]
    assert (step.write[3:] - step.write[:3]).tolist() == [8 * SIZE] * 3


def test_virtual_positions_have_a_harmless_id() -> None:
    virtual = row(0, 3)
    virtual.sequence.ids[:] = [-1, -1, 7]
    assert filled([virtual]).ids.tolist() == [0, 0, 7]


class Composition:
    def __init__(self) -> None:
        self.step = Step()
        self.builder = BatchBuilder(self.step, SIZE, torch.device("cpu"))

    def rows(self, *rows: Row) -> dict[str, Rows]:
        self.builder.fill(rows, [0])
        return self.step.rows


def test_an_unchanged_composition_keeps_its_rows_and_what_ops_kept_in_them() -> None:
    batch = Composition()
    before = batch.rows(row(3, 1, {"a": 1}), row(8, 1, {"a": 2}))["a"]
    before.scratch["gathered"] = "kept"
    after = batch.rows(row(4, 1, {"a": 1}), row(9, 1, {"a": 2}))["a"]
    assert after is before
    assert after.scratch == {"gathered": "kept"}


@pytest.mark.parametrize(
    "other",
    [
        [row(4, 1, {"a": 1}), row(9, 1, {"a": 3})],
        [row(4, 1, {"a": 2}), row(9, 1, {"a": 1})],
        [row(4, 1, {"a": 1}), row(9, 2, {"a": 2})],
        [row(4, 1, {"a": 1}), row(9, 1, {"a": 2}), row(1, 1)],
        [row(4, 1, {"a": 1}), row(9, 1, {"b": 2})],
    ],
)
def test_another_composition_gets_new_rows(other: list[Row]) -> None:
    batch = Composition()
    before = batch.rows(row(3, 1, {"a": 1}), row(8, 1, {"a": 2}))["a"]
    assert batch.rows(*other)["a"] is not before


def test_rows_know_where_prompts_begin_and_a_last_token_of_one_is_no_generated_token() -> None:
    batch, slots = Composition(), {"a": 1}
    generated, given = row(3, 1, slots), row(3, 1, slots)
    generated.sequence.prompt_end = 3
    assert batch.rows(generated)["a"].prompt == 1  # behind the step's last token
    assert batch.rows(given)["a"].prompt == 0
    assert batch.rows(*order_rows([given, row(0, 5, {"a": 2}), generated]))["a"].prompt == 1
    assert batch.rows(generated)["a"].prompt == 1
    assert batch.step.kept_rows["a"].prompt == NO_PROMPT


def test_a_composition_that_comes_back_has_its_rows_and_memo_again() -> None:
    """A guess or a prompt beside the same decode, and then the decode alone again."""
    batch = Composition()
    alone, beside = [row(3, 1, {"a": 1})], [row(3, 1, {"a": 1}), row(0, 2)]
    before, memo = batch.rows(*alone), batch.step.memo
    memo["program"] = "kept"
    assert batch.rows(*beside) is not before
    assert batch.step.memo == {}
    assert batch.rows(*alone) is before
    assert batch.step.memo is memo
    batch.rows(*beside)
    batch.builder.forget_composition()
    assert batch.rows(*alone) is not before
    assert batch.step.memo == {}


def test_of_compositions_with_adapters_two_are_remembered_and_eight_in_all() -> None:
    batch = Composition()
    adapted = [batch.rows(row(3, 1, {"a": slot})) for slot in (1, 2, 3)]
    assert batch.rows(row(3, 1, {"a": 2})) is adapted[1]
    assert batch.rows(row(3, 1, {"a": 3})) is adapted[2]
    assert batch.rows(row(3, 1, {"a": 1})) is not adapted[0]
    bare = [batch.rows(row(0, count)) for count in range(1, 10)]
    assert batch.rows(row(0, 2)) is bare[1]
    assert batch.rows(row(0, 1)) is not bare[0]
    assert len(batch.builder._known) == 8


def test_a_forgotten_composition_gets_new_rows() -> None:
    batch = Composition()
    before = batch.rows(row(3, 1, {"a": 1}))["a"]
    batch.builder.forget_composition()
    after = batch.rows(row(4, 1, {"a": 1}))["a"]
    assert after is not before
    assert after.index.tolist() == before.index.tolist()


def test_only_compositions_that_name_a_slot_which_changed_hands_are_forgotten() -> None:
    batch = Composition()
    own, other = batch.rows(row(3, 1, {"a": 1})), batch.rows(row(3, 1, {"a": 2, "b": 1}))
    batch.builder.forget_slots({"a": 3, "c": 1})
    assert batch.rows(row(3, 1, {"a": 2, "b": 1})) is other
    assert batch.rows(row(3, 1, {"a": 1})) is own
    batch.builder.forget_slots({"b": 1})
    assert batch.rows(row(3, 1, {"a": 1})) is own
    assert batch.rows(row(3, 1, {"a": 2, "b": 1})) is not other


def test_a_slot_of_the_very_last_composition_that_changes_hands_is_noticed() -> None:
    batch, again = Composition(), row(3, 1, {"a": 1})
    before = batch.rows(again)
    batch.builder.forget_slots({"a": 1})
    assert batch.rows(again) is not before


def test_a_composition_that_could_not_be_built_is_not_taken_for_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Composition()
    batch.rows(row(3, 1, {"a": 1}))
    with monkeypatch.context() as patched:
        patched.setattr(batch.builder, "_rows", lambda runs, prompt: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            batch.rows(row(3, 1, {"a": 2}))
    assert batch.rows(row(3, 1, {"a": 2}))["a"].slot.tolist() == [2]


def test_taps_of_the_last_step_are_gone_and_rows_read_the_steps_own() -> None:
    batch = Composition()
    rows = batch.rows(row(3, 1, {"a": 1}))["a"]
    batch.step.taps["q_proj"] = torch.ones(1, 2)
    assert rows.taps["q_proj"] is batch.step.taps["q_proj"]
    batch.rows(row(4, 1, {"a": 1}))
    assert rows.taps == {}


def test_the_output_head_sees_a_pools_kept_tokens_only() -> None:
    """Three rows of one pool: a decode, a chunk that keeps nothing, a chunk that keeps its last two of three."""
    decode, silent, long = row(5, 1, {"a": 2}), row(0, 2, {"a": 1}), row(0, 3, {"a": 3, "b": 1})
    step, rows = Step(), order_rows([decode, silent, long])
    BatchBuilder(step, SIZE, torch.device("cpu")).fill(rows, [0, 4, 5])
    assert step.rows["a"].index.tolist() == [1, 2, 0, 3, 4, 5]
    assert step.kept_rows["a"].index.tolist() == [0, 1, 2]
    assert step.kept_rows["a"].slot.tolist() == [2, 3, 3]
    assert step.kept_rows["b"].span == slice(1, 3)


def test_kept_rows_follow_what_is_kept() -> None:
    step, builder = Step(), BatchBuilder(Step(), SIZE, torch.device("cpu"))
    builder.step = step
    rows = [row(0, 3, {"a": 1})]
    builder.fill(rows, [])
    assert step.kept_rows == {}
    builder.fill(rows, [2])
    assert step.kept_rows["a"].index.tolist() == [0]


# -- block tables


def test_a_table_follows_lists_that_grow_in_place_and_lists_that_are_replaced() -> None:
    tables, first, second = BlockTables(), [5, 6], [7]
    assert tables.fill([first, second]).tolist() == [[5, 6], [7, 0]]
    second.append(8)
    assert tables.fill([first, second]).tolist() == [[5, 6], [7, 8]]
    assert tables.fill([second, [9]])[:, :2].tolist() == [[7, 8], [9, 0]]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["grow", "swap", "leave", "join", "restart"]), st.integers(0, 9)), max_size=40))
def test_a_table_equals_its_lists_after_any_history(moves: list[tuple[str, int]]) -> None:
    tables, lists, fresh = BlockTables(), [[1, 2]], iter(range(3, 1000))
    for move, at in moves:
        i = at % len(lists)
        if move == "grow":
            lists[i] += [next(fresh) for _ in range(at % 3 + 1)]
        elif move == "swap":
            lists[0], lists[i] = lists[i], lists[0]
        elif move == "leave" and len(lists) > 1:
            del lists[i]
        elif move == "join":
            lists.insert(i, [next(fresh)])
        elif move == "restart":
            lists[i] = [next(fresh)]
        table = tables.fill(lists)
        assert table.flags.c_contiguous
        for blocks, row in zip(lists, table.tolist(), strict=True):
            assert row[: len(blocks)] == blocks
            assert not any(row[len(blocks) :])


def test_guesses_follow_a_rows_own_ids() -> None:
    own = row(5, 1)
    guessing = Row(own.sequence, 5, 3, (7, 8))
    own.sequence.blocks.append(9)
    step = filled([row(2, 1, first=20), guessing], keep=[0, 1, 2, 3])
    assert step.ids.tolist() == [102, 105, 7, 8]
    assert step.positions.tolist() == [2, 5, 6, 7]
    assert step.spans == ((0, 1, 3), (1, 4, 8))
    assert step.decodes == 1
