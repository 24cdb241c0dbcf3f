"""Budget: what a step has room for, with and without streams."""

from __future__ import annotations

from server.engine.budget import SETTLED, SETTLED_TOGETHER, StepBudget
from server.engine.plan import Row, Sequence


def sequence(prompt: int, generated: int = 0, done: int = 0) -> Sequence:
    return Sequence(None, (), b"", 0, [1] * (prompt + generated), prompt, done=done)


def stream(generated: int = SETTLED) -> Row:
    found = sequence(4, generated, 3 + generated)
    return Row(found, found.done, 1)


def test_without_streams_a_prompt_may_take_the_whole_step() -> None:
    budget = StepBudget(16, beside=4)
    assert budget.room(sequence(40)) == 16
    assert budget.room(sequence(9)) == 9


def test_beside_a_stream_prompts_share_what_they_are_allowed() -> None:
    budget = StepBudget(16, beside=4)
    budget.add(stream())
    first, second = sequence(3), sequence(40)
    assert budget.room(first) == 3
    budget.add(Row(first, 0, 3))
    assert budget.room(second) == 1
    budget.add(Row(second, 0, 1))
    assert budget.room(sequence(5)) == 0
    assert budget.room(sequence(4, 5, 8)) == 1  # a stream's own position is no extra


def test_a_stream_that_has_only_just_begun_may_be_held_up() -> None:
    budget = StepBudget(16, beside=4)
    budget.add(stream(generated=SETTLED - 1))
    assert budget.room(sequence(40)) == 15
    budget.add(stream(generated=SETTLED))
    assert budget.room(sequence(40)) == 4


def test_prompts_that_were_there_before_a_stream_began_may_hold_it_up_for_longer() -> None:
    budget, early, late = StepBudget(16, beside=4, latest=10.0), stream(SETTLED_TOGETHER - 1), stream(SETTLED)
    early.sequence.began_at, late.sequence.began_at = 11.0, 9.0
    budget.add(early)
    assert budget.extra == 15
    budget.add(late)
    assert budget.extra == 4
    budget.drop(late.sequence)
    budget.add(stream(SETTLED_TOGETHER))
    assert budget.extra == 4


def test_zero_beside_is_the_whole_step() -> None:
    budget = StepBudget(16, beside=0)
    budget.add(stream())
    assert budget.room(sequence(40)) == budget.extra == 15


def test_a_dropped_row_gives_back_what_it_took() -> None:
    budget = StepBudget(16, beside=4)
    own, prompt = stream(), sequence(40)
    budget.add(own)
    budget.add(Row(prompt, 0, 4))
    assert budget.extra == 0
    budget.drop(prompt)
    budget.drop(prompt)
    assert budget.extra == 4
    budget.drop(own.sequence)
    assert budget.extra == 16
    assert budget.rows == {}


def test_guesses_count_as_extra_and_a_row_is_replaced_by_one_with_guesses() -> None:
    budget = StepBudget(16, beside=4)
    own = stream()
    budget.add(own)
    budget.add(Row(own.sequence, own.start, 4, (7, 8, 9)))
    assert budget.extra == 1
    assert budget.rows == {own.sequence: Row(own.sequence, own.start, 4, (7, 8, 9))}
