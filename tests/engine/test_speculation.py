"""Speculation: what is guessed, how guesses grow and pause, and that a scheduler books right and wrong ones alike."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.digest import Digest
from server.engine.budget import SETTLED_TOGETHER
from server.engine.pages import Pages
from server.engine.plan import Plan, Row, Sample, Sequence
from server.engine.prefixes import extend_keys
from server.engine.residency import Residency
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.speculation import LONGEST_PAUSE, Lookup, Speculation, may_speculate
from server.requests import Event, FinishReason, Request, Sampling, Token

EOS = 2


# -- the lookup


def test_what_followed_before_is_guessed() -> None:
    assert Lookup().guess([5, 6, 7, 8, 9, 5, 6], 3) == (7, 8, 9)


def test_nothing_is_guessed_where_nothing_stood_before() -> None:
    assert Lookup().guess([5, 6, 7, 8], 3) == ()
    assert Lookup().guess([5], 3) == ()
    assert Lookup().guess([], 3) == ()


def test_the_longest_match_wins_and_among_equals_the_latest() -> None:
    assert Lookup().guess([1, 2, 3, 40, 9, 2, 3, 50, 1, 2, 3], 1) == (40,)
    assert Lookup().guess([2, 3, 40, 2, 3, 50, 2, 3], 1) == (50,)


def test_a_loop_is_guessed_as_a_loop() -> None:
    assert Lookup().guess([7, 7, 7], 5) == (7,) * 5
    assert Lookup().guess([1, 2, 3, 1, 2, 3], 7) == (1, 2, 3, 1, 2, 3, 1)


def test_a_position_without_a_token_is_never_guessed() -> None:
    assert Lookup().guess([-1, -1, 5, 6, -1, 5, 6], 3) == ()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6))
def test_an_index_that_grows_guesses_as_a_new_one(ids: list[int], count: int) -> None:
    growing = Lookup()
    for length in range(len(ids) + 1):
        assert growing.guess(ids[:length], count) == Lookup().guess(ids[:length], count)


# -- trust


def looping(**sampling: object) -> Sequence:
    params = Sampling(**{"max_new_tokens": 99, **sampling})  # type: ignore[arg-type]
    request = Request("a", "t", (), (4, 5, 6), params)
    return Sequence(request, (), b"", 0, [4, 5, 6, 4, 5, 6, 4], 3, done=6)


def test_guesses_shrink_when_wrong_and_grow_when_right() -> None:
    speculation, sequence = Speculation(8), looping()
    assert len(speculation.guess(sequence, 99)) == 8
    speculation.learn(sequence, 8, 1)
    assert len(speculation.guess(sequence, 99)) == 2
    speculation.learn(sequence, 2, 2)
    assert len(speculation.guess(sequence, 99)) == 4
    assert len(speculation.guess(sequence, 3)) == 3


def test_guesses_that_keep_being_wrong_pause_longer_and_longer() -> None:
    speculation, sequence = Speculation(8), looping()
    pauses = []
    for _ in range(8):
        assert speculation.guess(sequence, 9)
        speculation.learn(sequence, 1, 0)
        pause = 0
        while not speculation.guess(sequence, 9):
            pause += 1
        pauses.append(pause)
    assert pauses[:3] == [2, 4, 8]
    assert max(pauses) == LONGEST_PAUSE


def test_nothing_is_kept_of_a_sequence_that_is_gone() -> None:
    speculation = Speculation(4)
    speculation.guess(looping(), 4)
    gc.collect()
    assert len(speculation._trust) == 0


@pytest.mark.parametrize(
    ("change", "may"),
    [
        (lambda s: None, True),
        (lambda s: setattr(s, "done", 4), False),  # it is being recomputed
        (lambda s: setattr(s, "prompt_end", 7), False),  # its prompt has not been answered
        (lambda s: setattr(s, "request", None), False),
    ],
)
def test_who_may_speculate(change: Callable[[Sequence], None], may: bool) -> None:
    sequence = looping()
    change(sequence)
    assert may_speculate(sequence) is may
    assert not may_speculate(looping(do_sample=True))


# -- a scheduler over a model that says the same whatever is guessed


class Bench:
    """`story[n]` is generated token n of every request; guesses are verified as the runner does it."""

    def __init__(self, story: list[int], *, blocks: int = 65, speculate: int = 4, **limits: int) -> None:
        defaults = {"max_batch_tokens": 32, "max_running": 8, "max_waiting": 16, "max_total_tokens": 100}
        self.scheduler = Scheduler(
            Pages(blocks, 4),
            Residency(1),
            SchedulerLimits(**{**defaults, **limits}, speculate=speculate),
            Digest("0" * 64),
            [EOS],
        )
        self.story = story
        self.events: list[Event] = []
        self.steps = 0
        self.plans: list[Plan] = []

    def submit(self, id: str, prompt: list[int], **sampling: object) -> None:
        params = Sampling(**{"max_new_tokens": len(self.story), **sampling})  # type: ignore[arg-type]
        self.scheduler.submit(Request(id, "t", (), tuple(prompt), params))

    def run(self) -> None:
        while not self.scheduler.idle:
            plan = self.scheduler.plan()
            self.plans.append(plan)
            self.steps += 1
            self.scheduler.advance(plan.rows, {row.sequence: self._sample(row) for row in plan.rows if row.samples})
            self.events += self.scheduler.take_events()
            self.scheduler.pages.check()
        self.scheduler.check_idle()

    def tokens(self, id: str) -> list[int]:
        return [token.id for event in self.events if event.request_id == id for token in event.tokens]

    def _sample(self, row: Row) -> Sample:
        at = row.sequence.generated
        said = [Token(id, -1.0) for id in self.story[at : at + 1 + len(row.draft)]]
        more = []
        for guess, token, behind in zip(row.draft, said, said[1:], strict=False):
            if token.id != guess:
                break
            more.append(behind)
        return Sample(said[0], more=tuple(more))


LOOP = [10, 11, 12, 13] * 6


def test_right_guesses_save_steps_and_change_no_token() -> None:
    plain, guessing = Bench(LOOP, speculate=0), Bench(LOOP)
    for bench in (plain, guessing):
        bench.submit("a", [1, 3, 4])
        bench.run()
        assert bench.tokens("a") == LOOP
        assert bench.events[-1].finish is FinishReason.LENGTH
    assert guessing.steps < plain.steps / 2
    assert max(len(event.tokens) for event in guessing.events) == 5


def test_the_end_of_a_sequence_inside_right_guesses_drops_what_follows_it() -> None:
    story = [10, 11, EOS, 12, 10, 11, EOS, 12, 10, 11, EOS, 12]
    bench = Bench(story)
    bench.submit("a", [1, 3, 10, 11, EOS, 12, 10, 11, EOS, 12, 10])
    bench.run()
    assert bench.tokens("a") == [10, 11, EOS]
    (end,) = [event for event in bench.events if event.finish is not None]
    assert end.finish is FinishReason.EOS


def test_no_more_tokens_than_asked_for() -> None:
    for length in range(1, 12):
        bench = Bench(LOOP)
        bench.submit("a", [10, 11, 12, 13] * 2, max_new_tokens=length)
        bench.run()
        assert bench.tokens("a") == LOOP[:length]
        assert [event.finish for event in bench.events if event.finish] == [FinishReason.LENGTH]


def test_wrong_guesses_are_never_published() -> None:
    """Every block in the prefix cache holds ids that were really generated."""
    story = [10, 11, 12, 13, 10, 11, 50, 51, 10, 11, 50, 60, 10, 11, 61, 62, 10, 11, 61, 70]
    bench = Bench(story)
    bench.submit("a", [1, 3, 4])
    bench.run()
    assert any(row.draft for plan in bench.plans for row in plan.rows)
    true = Sequence(None, (), bench.plans[0].rows[0].sequence.seed, 0, [1, 3, 4, *story], 3)
    extend_keys(true, len(true.ids) // 4, 4)
    assert set(bench.scheduler.pages._by_key) <= set(true.keys)


def test_guesses_take_free_blocks_only() -> None:
    """A cache so small that both run only because guesses give way; nobody is preempted for one."""
    tight = Bench(LOOP, blocks=15, max_total_tokens=52)
    for id in "ab":
        tight.submit(id, [10, 11, 12, 13])
    tight.run()
    assert tight.tokens("a") == tight.tokens("b") == LOOP
    assert sum(plan.preempted for plan in tight.plans) == 0


def test_guesses_leave_prompts_their_tokens() -> None:
    """With 4 tokens beside streams, a step's prompt comes first and guesses take what is left."""
    bench = Bench(LOOP * 3, max_prefill_tokens=4)
    bench.submit("a", [10, 11, 12, 13] * 2)
    while len(bench.tokens("a")) < SETTLED_TOGETHER:
        plan = bench.scheduler.plan()
        bench.scheduler.advance(plan.rows, {row.sequence: bench._sample(row) for row in plan.rows if row.samples})
        bench.events += bench.scheduler.take_events()
    bench.submit("b", [1] * 9)
    extras = []
    for _ in range(3):
        plan = bench.scheduler.plan()
        extras.append({row.sequence.request.id: row.count for row in plan.rows if row.sequence.request})
        bench.scheduler.advance(plan.rows, {row.sequence: bench._sample(row) for row in plan.rows if row.samples})
    assert extras[0] == extras[1] == {"a": 1, "b": 4}
    assert extras[2]["b"] == 1
    assert extras[2]["a"] > 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=12), min_size=1, max_size=4),
    st.lists(st.integers(3, 6), min_size=1, max_size=20),
    st.integers(0, 6),
    st.sampled_from([12, 20, 65]),
    st.sampled_from([0, 2, 5]),
)
def test_tokens_are_the_same_under_chunking_preemption_and_any_guess(
    prompts: list[list[int]], story: list[int], speculate: int, blocks: int, beside: int
) -> None:
    bench = Bench(story, blocks=blocks, speculate=speculate, max_prefill_tokens=beside, max_total_tokens=(blocks - 2) * 4)
    for i, prompt in enumerate(prompts):
        bench.submit(str(i), prompt)
    bench.run()
    assert all(bench.tokens(str(i)) == story for i in range(len(prompts)))
