"""Drawing: the short way gives what sorting the vocabulary gives, and a row's way depends on itself alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from server.model import drawing
from server.model.drawing import HEAD, Draw, draw, uniform
from server.requests import Sampling

VOCAB = 4 * HEAD


def scores_of(rows: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def rule(seed: int = 0, **params: object) -> Draw:
    return Draw(Sampling(9, do_sample=True, seed=seed, **params), 0)  # type: ignore[arg-type]


SHORT: dict[str, dict[str, float]] = {
    "top_k": {"top_k": 50},
    "top_k of one": {"top_k": 1},
    "top_p": {"top_p": 0.9},
    "both": {"top_k": 100, "top_p": 0.7},
    "top_k and typical_p": {"top_k": 60, "typical_p": 0.6},
    "cold": {"top_p": 0.95, "temperature": 0.7},
}


@pytest.mark.parametrize("name", SHORT)
def test_the_short_way_draws_what_the_long_way_draws(name: str) -> None:
    scores = scores_of(300)
    rows = [rule(seed, **SHORT[name]) for seed in range(300)]
    assert all(row.is_short for row in rows)
    warm = scores / scores.new_tensor([row.sampling.temperature for row in rows])[:, None]
    short, enough = drawing._draw_head(warm, rows)
    assert all(enough)
    assert short.tolist() == drawing._draw_sorted(warm, rows).tolist()
    assert draw(scores, rows).tolist() == short.tolist()


def test_equals_are_ordered_by_id_on_both_ways() -> None:
    """Scores of few different values: the best 20 end among hundreds of equals."""
    scores = scores_of(100).round()
    rows = [rule(seed, top_k=20) for seed in range(100)]
    assert draw(scores, rows).tolist() == drawing._draw_sorted(scores, rows).tolist()


def test_a_row_for_which_the_best_few_are_not_enough_goes_the_long_way() -> None:
    flat = scores_of(50, scale=0.01)
    rows = [rule(seed, top_p=0.9) for seed in range(50)]
    assert not any(drawing._draw_head(flat, rows)[1])
    drawn = draw(flat, rows).tolist()
    assert drawn == drawing._draw_sorted(flat, rows).tolist()
    assert len(set(drawn)) > 40


def test_a_row_draws_the_same_whatever_way_its_neighbours_go() -> None:
    scores = torch.cat([scores_of(5), scores_of(1, seed=9, scale=0.01)])
    rows = [
        rule(1),
        rule(2, top_k=5),
        rule(3, typical_p=0.5),
        rule(4, top_p=0.8, temperature=0.7),
        rule(5, top_k=VOCAB - 1),
        rule(6, top_p=0.9),
    ]
    together = draw(scores, rows).tolist()
    assert together == [int(draw(scores[i : i + 1], [row])) for i, row in enumerate(rows)]
    assert together[::-1] == draw(scores.flip(0), rows[::-1]).tolist()


def test_a_row_without_rules_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("sorted")

    monkeypatch.setattr(Tensor, "sort", refuse)
    assert len(draw(scores_of(4), [rule(seed) for seed in range(4)])) == 4


@pytest.mark.parametrize("params", [{}, {"top_k": 400}, {"top_p": 0.9999}])
def test_draws_are_distributed_as_the_softmax_says(params: dict[str, float]) -> None:
    """Chi-square with fixed seeds: 60 degrees of freedom, 99.9% of samples lie below 99.6."""
    count = 5000
    scores = torch.full((1, VOCAB), -30.0)
    scores[0, :61] = torch.randn(61, generator=torch.Generator().manual_seed(3))
    drawn = draw(scores.expand(count, -1), [rule(seed, **params) for seed in range(count)])
    observed = torch.bincount(drawn, minlength=VOCAB).double()[:61]
    expected = scores[0, :61].softmax(-1).double() * count
    assert ((observed - expected) ** 2 / expected).sum() < 99.6


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_does_not_disturb_the_others(poison: float) -> None:
    scores = scores_of(6)
    rows = [rule(1, top_k=5), rule(2, top_k=5), rule(3), rule(4), rule(5, top_p=0.5), rule(6, top_p=0.5)]
    clean = draw(scores, rows).tolist()
    scores[1::2] = poison
    drawn = draw(scores, rows).tolist()
    assert drawn[::2] == clean[::2]
    assert all(0 <= id < VOCAB for id in drawn)


# ---- the generator ----


def test_uniform_is_a_function_of_seed_and_index_in_the_unit_interval() -> None:
    values = [uniform(seed, index) for seed in (0, 1, 2**63, 2**64 - 1) for index in range(500)]
    assert values == [uniform(seed, index) for seed in (0, 1, 2**63, 2**64 - 1) for index in range(500)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) > 1990
    assert abs(sum(values) / len(values) - 0.5) < 0.02
    correlated = sum((a - 0.5) * (b - 0.5) for a, b in pairwise(values)) / len(values)
    assert abs(correlated) < 0.01


def test_uniform_is_splitmix64() -> None:
    """Its published first outputs for seed 0 are 0xE220A8397B1DCDAF and 0x6E789E6AA1B965F4."""
    assert uniform(0, 0) == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
    assert uniform(0, 1) == (0x6E789E6AA1B965F4 >> 11) * 2.0**-53
