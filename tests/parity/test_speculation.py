"""Speculation is exact: with guesses or without, every adapter gives the same tokens, whatever else the server does.

Guesses come from prompt lookup, or from a seer who knows the answer and errs now and then, so that many are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from server.engine.plan import Sequence
from server.model.kernels import Kernels
from server.requests import FinishReason, Token
from tests.lab import Lab
from tests.parity.zoo import Zoo, make_zoo
from tests.tiny import VOCAB

NEW = 40
NAMES = ("rank_9_all_linear", "ia3", "prefix", "prompt", "bottleneck")
PROMPT = [5, 9, 33, 60, 12, 71, 8, 33, 60, 12]
EVERYBODY = ("base", *NAMES)
EXTREMES: tuple[dict[str, object], ...] = (
    {},
    {"repetition_penalty": 1.1, "top_n": 3},
    {"frequency_penalty": 0.3, "presence_penalty": -0.2},
)

Answers = Mapping[str, list[Token]]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo("llama", NAMES, tmp_path_factory.mktemp("llama"))


def ask(zoo: Zoo, lab: Lab, **sampling: object) -> Answers:
    """What the base and every adapter answer, all at once; `sampling` is everybody's."""
    for i, name in enumerate(EVERYBODY):
        digests = () if name == "base" else (zoo.specimens[name].digest,)
        asked: dict[str, Any] = {"max_new_tokens": NEW, **sampling}
        lab.submit(name, [*PROMPT, 20 + i], *digests, **asked)
    lab.run()
    return {name: tokens_of(lab, name) for name in EVERYBODY}


def tokens_of(lab: Lab, id: str) -> list[Token]:
    return [token for event in lab.events if event.request_id == id for token in event.tokens]


def see(lab: Lab, truth: Answers) -> None:
    """Guesses are the truth from here on, but for every seventh token."""

    def guess(sequence: Sequence, room: int) -> tuple[int, ...]:
        if sequence.request is None:
            return ()
        at, said = sequence.generated, truth[sequence.request.id]
        ahead = list(enumerate(said[at : at + min(room, 5)], at))
        return tuple(token.id if place % 7 else (token.id + 1) % VOCAB for place, token in ahead)

    lab.scheduler._speculation.guess = guess  # type: ignore[method-assign]


def check(got: list[Token], expected: list[Token]) -> None:
    assert [token.id for token in got] == [token.id for token in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [id for id, _ in one.alternatives] == [id for id, _ in other.alternatives]


@pytest.mark.parametrize("sampling", EXTREMES, ids=["greedy", "repetition and alternatives", "frequency and presence"])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 7}, {"max_prefill_tokens": 2}, {"blocks": 40, "max_total_tokens": 80}],
    ids=["plain", "small steps", "small chunks", "few blocks"],
)
def test_tokens_are_the_same_with_and_without_guesses(
    zoo: Zoo, kernels: Kernels, options: dict[str, Any], sampling: dict[str, object]
) -> None:
    plain = zoo.lab(kernels=kernels)
    truth = ask(zoo, plain, **sampling)
    lab = zoo.lab(kernels=kernels, speculate=5, **options)
    see(lab, truth)
    for name, tokens in ask(zoo, lab, **sampling).items():
        check(tokens, truth[name])
        assert lab.finished(name)
    assert lab.observer.guessed > lab.observer.right > 10
    assert ("blocks" not in options) or lab.observer.preemptions > 0
    if not options:
        assert len(lab.observer.rows_per_step) < len(plain.observer.rows_per_step) * 0.6
        assert plain.observer.guessed == 0


def test_prompt_lookup_finds_right_guesses_and_changes_nothing(zoo: Zoo, kernels: Kernels) -> None:
    truth = ask(zoo, zoo.lab(kernels=kernels))
    lab = zoo.lab(kernels=kernels, speculate=5)
    for name, tokens in ask(zoo, lab).items():
        check(tokens, truth[name])
    assert lab.observer.guessed >= lab.observer.right > 0


def test_the_end_of_sequence_inside_right_guesses_ends_the_request(zoo: Zoo, kernels: Kernels) -> None:
    """Each of the first tokens that the base says is taken for the end of a sequence in turn."""
    truth = ask(zoo, zoo.lab(kernels=kernels))
    said = [token.id for token in truth["base"]]
    for end in sorted(set(said[:12])):
        lab = zoo.lab(kernels=kernels, speculate=5)
        lab.scheduler._eos = frozenset([end])
        see(lab, truth)
        lab.submit("base", [*PROMPT, 20], max_new_tokens=NEW, ignore_eos=False)
        lab.run()
        assert [token.id for token in tokens_of(lab, "base")] == said[: said.index(end) + 1]
        assert lab.ending("base").finish is FinishReason.EOS


def test_rows_that_draw_never_guess(zoo: Zoo, kernels: Kernels) -> None:
    found = []
    for speculate in (0, 5):
        lab = zoo.lab(kernels=kernels, speculate=speculate)
        lab.submit("a", PROMPT * 2, max_new_tokens=NEW, do_sample=True, temperature=0.3, seed=3)
        lab.run()
        found.append([token.id for token in tokens_of(lab, "a")])
    assert found[0] == found[1]
    assert lab.observer.guessed == 0


def test_prompt_scores_are_those_without_guesses(zoo: Zoo, kernels: Kernels) -> None:
    found = []
    for speculate in (0, 5):
        lab = zoo.lab(kernels=kernels, speculate=speculate, max_batch_tokens=7)
        lab.submit("a", PROMPT * 2, max_new_tokens=NEW, prompt_logprobs=True)
        lab.run()
        found.append([token for event in lab.events for token in event.prompt])
    assert len(found[0]) == 2 * len(PROMPT)
    assert [token.id for token in found[0]] == [token.id for token in found[1]]
    assert [token.logprob for token in found[0][1:]] == pytest.approx([token.logprob for token in found[1][1:]], abs=1e-4)


def test_what_a_wrong_guess_left_in_the_cache_is_never_found(zoo: Zoo, kernels: Kernels) -> None:
    """A second request over the whole of the first one's text, from the prefix cache, goes on as one computed anew.

    Where prompts are computed apart, what was generated is no part of a later prompt, guessed rightly or not.
    """
    truth = ask(zoo, zoo.lab(kernels=kernels))
    lab = zoo.lab(kernels=kernels, speculate=5)
    see(lab, truth)
    text = [*PROMPT, 20, *(token.id for token in ask(zoo, lab)["base"])]
    assert lab.observer.guessed > lab.observer.right
    fresh = zoo.lab(kernels=kernels)
    for each in (lab, fresh):
        each.scheduler._speculation.most = 0
        each.scheduler._speculation.guess = lambda sequence, room: ()  # type: ignore[method-assign]
        each.submit("again", text, max_new_tokens=8)
        each.run()
    known = PROMPT if kernels.splits_prompts else text
    assert len(known) - 8 < lab.ending("again").cached_tokens <= len(known)
    check(tokens_of(lab, "again"), tokens_of(fresh, "again"))
