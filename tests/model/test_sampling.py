"""Sampling: every rule against Hugging Face's, draws that depend on a row's own seed alone, broken rows that stay alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from server.model import sampling as module
from server.model.sampling import SampleRow, sample, score_prompt, torch_peaks
from server.requests import Sampling, Token

VOCAB = 61
PROMPT = [3, 9, 9, 40]
GENERATED = [5, 5, 5, 17]


def logits_of(rows: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def row(prompt: Sequence[int] = (), generated: Sequence[int] = (), **params: object) -> SampleRow:
    given = {"max_new_tokens": 9, **params}
    return SampleRow(Sampling(**given), len(generated), lambda: prompt, lambda: generated)  # type: ignore[arg-type]


def drawing(seed: int, generated: Sequence[int] = (), **params: object) -> SampleRow:
    return row(generated=generated, do_sample=True, seed=seed, **params)


def ids(tokens: Sequence[Token | None]) -> list[int]:
    return [token.id for token in tokens if token is not None]


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, SampleRow], set[int]]:
    """Every token a row can draw: the draw is walked through [0, 1) in small steps."""

    def allowed(logits: Tensor, row: SampleRow, steps: int = 20_000) -> set[int]:
        points = iter([(i + 0.5) / steps for i in range(steps)])
        monkeypatch.setattr("server.model.drawing.uniform", lambda seed, index: next(points))
        return set(ids(sample(logits.expand(steps, -1), [row] * steps)))

    return allowed


# ---- greedy ----


def test_greedy_is_argmax() -> None:
    logits = logits_of(5)
    assert ids(sample(logits, [row()] * 5)) == logits.argmax(-1).tolist()


def test_greedy_ignores_the_rules_of_drawing() -> None:
    logits = logits_of(1)
    odd = row(temperature=9.0, top_k=3, top_p=0.2, typical_p=0.2, seed=4)
    assert ids(sample(logits, [odd])) == logits.argmax(-1).tolist()


def test_half_precision_logits_are_widened() -> None:
    logits = logits_of(2).bfloat16()
    (token, _) = sample(logits, [row(), row()])
    assert token is not None
    assert token.logprob == pytest.approx(logits.double().log_softmax(-1)[0, token.id].item(), abs=1e-6)


# ---- rules, against Hugging Face ----

RULES = {
    "top_k": ({"top_k": 7}, [TopKLogitsWarper(7)]),
    "top_k over the vocabulary": ({"top_k": 500}, []),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "top_p that keeps one": ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
    "typical_p": ({"typical_p": 0.7}, [TypicalLogitsWarper(0.7)]),
    "typical_p that keeps one": ({"typical_p": 0.01}, [TypicalLogitsWarper(0.01)]),
    "temperature before top_p": ({"temperature": 2.5, "top_p": 0.8}, [TemperatureLogitsWarper(2.5), TopPLogitsWarper(0.8)]),
    "all": (
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "typical_p": 0.8},
        [TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9), TypicalLogitsWarper(0.8)],
    ),
    "repetition and top_k": (
        {"repetition_penalty": 1.8, "top_k": 5},
        [RepetitionPenaltyLogitsProcessor(1.8), TopKLogitsWarper(5)],
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_a_rule_allows_what_hugging_face_allows(name: str, seed: int, sweep: Callable[[Tensor, SampleRow], set[int]]) -> None:
    params, warpers = RULES[name]
    logits = logits_of(1, seed, scale=1.0)
    history = torch.tensor([[*PROMPT, *GENERATED]])
    expected = LogitsProcessorList(warpers)(history, logits.clone())
    allowed = set(torch.nonzero(torch.isfinite(expected[0])).flatten().tolist())
    assert sweep(logits, row(PROMPT, GENERATED, do_sample=True, **params)) == allowed
    assert allowed


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.6])
def test_penalties_move_the_scores_as_published(penalty: float) -> None:
    logits = logits_of(1, seed=8)
    history = torch.tensor([[*PROMPT, *GENERATED]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())[0]
    for token in set(GENERATED):  # of the output alone: frequency times its count, presence once
        expected[token] -= 0.7 * GENERATED.count(token) + 0.4
    wanted = row(PROMPT, GENERATED, repetition_penalty=penalty, frequency_penalty=0.7, presence_penalty=0.4)
    got = module._penalised(logits, [wanted])[0]
    torch.testing.assert_close(got, expected)


def test_penalties_leave_the_neighbours_and_the_given_logits_alone() -> None:
    logits = logits_of(3)
    before = logits.clone()
    scores = module._penalised(logits, [row(), row(PROMPT, GENERATED, repetition_penalty=2.0), row()])
    assert torch.equal(logits, before)
    assert torch.equal(scores[[0, 2]], before[[0, 2]])
    assert not torch.equal(scores[1], before[1])


def test_a_penalty_changes_a_greedy_choice() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.0, 1.9
    assert ids(sample(logits, [row(generated=[5])])) == [5]
    assert ids(sample(logits, [row(generated=[5], frequency_penalty=0.2)])) == [6]


def test_the_prompt_is_read_only_for_a_repetition_penalty() -> None:
    def refuse() -> Sequence[int]:
        raise AssertionError("the prompt was read")

    sample(logits_of(1), [SampleRow(Sampling(9, frequency_penalty=1.0), 4, refuse, lambda: GENERATED)])


# ---- draws ----


def test_a_seeded_row_draws_the_same_alone_in_company_and_elsewhere_in_the_batch() -> None:
    logits = logits_of(9)
    mates = [
        row(),
        drawing(1, top_k=4),
        drawing(2, top_p=0.5, temperature=0.6),
        drawing(3, typical_p=0.4),
        row(top_n=5),
        row(PROMPT, GENERATED, repetition_penalty=1.5),
        drawing(4, temperature=3.0),
        drawing(5),
    ]
    for seed in range(12):
        own = drawing(seed, generated=GENERATED[: seed % 4], temperature=1.5, top_p=0.95)
        alone = sample(logits[:1], [own])[0]
        for at in (0, 3, 8):
            order = [*range(1, at + 1), 0, *range(at + 1, 9)]
            rows = [*mates[:at], own, *mates[at:]]
            assert sample(logits[order], rows)[at] == alone


def test_the_draw_changes_with_the_seed_and_with_the_position() -> None:
    logits = logits_of(1, scale=0.1).expand(40, -1)
    assert len(set(ids(sample(logits, [drawing(seed) for seed in range(40)])))) > 10
    assert len(set(ids(sample(logits, [drawing(7, generated=[0] * n) for n in range(40)])))) > 10


def test_draws_are_distributed_as_the_softmax_says() -> None:
    """Chi-square over 20,000 draws with fixed seeds: 60 degrees of freedom, 99.9% of samples lie below 99.6."""
    count = 20_000
    logits = logits_of(1, seed=2, scale=1.0)
    drawn = ids(sample(logits.expand(count, -1), [drawing(seed, temperature=1.3) for seed in range(count)]))
    observed = torch.bincount(torch.tensor(drawn), minlength=VOCAB).double()
    expected = (logits[0] / 1.3).softmax(-1).double() * count
    assert ((observed - expected) ** 2 / expected).sum() < 99.6
    wrong = logits[0].softmax(-1).double() * count  # what ignoring the temperature would give
    assert ((observed - wrong) ** 2 / wrong).sum() > 99.6


def test_a_token_without_probability_is_never_drawn(sweep: Callable[[Tensor, SampleRow], set[int]]) -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [4, 44]] = 0.0
    assert sweep(logits, drawing(0)) == {4, 44}


@pytest.mark.parametrize("extreme", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_draw_stay_in_the_kept_tokens(extreme: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.model.drawing.uniform", lambda seed, index: extreme)
    logits = logits_of(50)
    kept = logits.topk(3).indices.tolist()
    for token, allowed in zip(ids(sample(logits, [drawing(0, top_k=3)] * 50)), kept, strict=True):
        assert token in allowed


# ---- what is reported ----


def test_logprobs_are_the_models_own_whatever_the_rules() -> None:
    logits = logits_of(3)
    rows = [row(PROMPT, GENERATED, repetition_penalty=2.0), drawing(3, temperature=0.3, top_k=2), row()]
    expected = logits.double().log_softmax(-1)
    for i, token in enumerate(sample(logits, rows)):
        assert token is not None
        assert token.logprob == pytest.approx(expected[i, token.id].item(), abs=1e-6)


def test_alternatives_are_the_best_ones_of_the_row_that_asked() -> None:
    logits = logits_of(3)
    none, three, five = sample(logits, [row(), row(top_n=3), row(top_n=5)])
    assert none is not None
    assert none.alternatives == ()
    for token, at, count in ((three, 1, 3), (five, 2, 5)):
        assert token is not None
        best = logits.double().log_softmax(-1)[at].topk(count)
        assert [id for id, _ in token.alternatives] == best.indices.tolist()
        assert [score for _, score in token.alternatives] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_score_prompt_is_the_logprob_of_each_next_token() -> None:
    logits, targets = logits_of(4), torch.tensor([1, 60, 0, 7])
    expected = logits.double().log_softmax(-1)[torch.arange(4), targets].tolist()
    assert score_prompt(logits, targets) == pytest.approx(expected, abs=1e-6)


def test_peaks_are_those_of_large_and_small_logits() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4, -1e4], [0.0, -torch.inf, -torch.inf]])
    best, sums = torch_peaks(logits)
    assert best.tolist() == [0, 0, 0]
    assert sums.tolist() == pytest.approx(logits.double().logsumexp(-1).tolist(), abs=1e-6)


# ---- broken rows ----


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("rules", [{}, {"top_k": 3}, {"top_p": 0.5}, {"typical_p": 0.5}, {"repetition_penalty": 1.2}])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_row_that_is_not_finite_gives_none_and_touches_nobody(
    poison: float, everywhere: bool, rules: dict[str, float], do_sample: bool
) -> None:
    logits = logits_of(3)
    rows = [drawing(1, temperature=1.4), row(PROMPT, GENERATED, do_sample=do_sample, **rules), row(top_n=2)]
    clean = sample(logits, rows)
    broken = logits.clone()
    broken[1, slice(None) if everywhere else 11] = poison
    assert sample(broken, rows) == [clean[0], None, clean[2]]
    assert clean[1] is not None


def test_a_row_with_nothing_left_to_choose_gives_none() -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    assert sample(logits, [row()]) == [None]
    assert sample(logits, [drawing(1)]) == [None]
