"""Results: which of a step's tokens a sequence takes, and what its events say."""

from __future__ import annotations

from server.engine.plan import Row, Sequence
from server.engine.results import add_scores, append, scores_event, token_event
from server.requests import FinishReason, Request, Sampling, Token

EOS = 2


def sequence(new: int = 3, *, ignore_eos: bool = False) -> Sequence:
    request = Request("r", "t", (), (5, 6), Sampling(new, ignore_eos=ignore_eos), arrival=1.0)
    return Sequence(request, (), b"", 0, [5, 6], 2, done=2, cached=1, admitted_at=1.5)


def tokens(*ids: int) -> tuple[Token, ...]:
    return tuple(Token(id, -1.0) for id in ids)


def test_tokens_are_taken_up_to_the_end_and_the_last_is_still_to_be_computed() -> None:
    running = sequence()
    assert append(running, tokens(7, 8), [EOS]) == (tokens(7, 8), None)
    assert (running.ids, running.done) == ([5, 6, 7, 8], 3)
    assert append(running, tokens(9, 10), [EOS]) == (tokens(9), FinishReason.LENGTH)


def test_the_end_of_text_ends_unless_it_is_ignored() -> None:
    assert append(sequence(), tokens(EOS, 7), [EOS]) == (tokens(EOS), FinishReason.EOS)
    assert append(sequence(ignore_eos=True), tokens(EOS, 7), [EOS]) == (tokens(EOS, 7), None)


def test_only_the_first_event_says_how_long_it_was_queued() -> None:
    running = sequence()
    assert running.request is not None
    first, second = (token_event(running, running.request, tokens(n), None) for n in (7, 8))
    assert (first.queue_seconds, second.queue_seconds) == (0.5, None)
    assert first.cached_tokens == 1


def test_scores_begin_again_with_the_text() -> None:
    running = sequence()
    assert running.request is not None
    add_scores(running, ((1.0,),), Row(running, 0, 1))
    add_scores(running, ((2.0,),), Row(running, 1, 1))
    assert scores_event(running, running.request).scores == ((1.0,), (2.0,))
    add_scores(running, ((3.0,),), Row(running, 0, 1))
    assert scores_event(running, running.request).scores == ((3.0,),)
