"""Plan: the few facts that the scheduler and the runner both derive from it."""

from __future__ import annotations

import pytest

from server.engine.plan import Plan, Row, Sequence
from server.requests import Request, Sampling

SAMPLING = Sampling(max_new_tokens=4)


def sequence(ids: list[int], *, virtual: int = 0, prompt: int = 3, done: int = 0) -> Sequence:
    request = Request("r", "t", (), (1, 2, 3), SAMPLING)
    return Sequence(request, (), b"", virtual, ids, virtual + prompt, done=done)


def test_a_sequence_counts_what_it_generated_and_what_is_left_to_compute() -> None:
    seq = sequence([-1, -1, 97, 12, 55, 8, 4], virtual=2, done=5)
    assert (seq.generated, seq.remaining) == (2, 2)
    assert seq.sampling is SAMPLING


def test_what_a_preemption_took_back_was_computed_all_the_same() -> None:
    seq = sequence([-1, 97, 12, 55], virtual=1, done=3)
    assert seq.computed == 2
    seq.reached, seq.done = 3, 0
    assert seq.computed == 2


def test_a_prefix_being_built_has_no_sampling_and_never_samples() -> None:
    build = Sequence(None, (), b"", 3, [-1] * 3, 3)
    assert not Row(build, 0, 3).samples
    with pytest.raises(RuntimeError, match="a prefix being built has no sampling"):
        _ = build.sampling


@pytest.mark.parametrize(("start", "count", "samples"), [(0, 3, True), (0, 2, False), (2, 1, True), (1, 1, False)])
def test_a_row_samples_where_it_reaches_the_end(start: int, count: int, samples: bool) -> None:
    assert Row(sequence([5, 6, 7]), start, count).samples is samples


def test_sequences_are_equal_only_to_themselves() -> None:
    one, other = sequence([1, 2, 3]), sequence([1, 2, 3])
    assert one != other
    assert len({one, other}) == 2
    one.blocks.append(4)
    assert other.blocks == []


def test_a_plan_counts_the_tokens_of_its_rows() -> None:
    rows = [Row(sequence([1, 2, 3]), 0, 3), Row(sequence([1, 2, 3]), 2, 1)]
    assert Plan(rows).tokens == 4
    assert Plan().tokens == 0
