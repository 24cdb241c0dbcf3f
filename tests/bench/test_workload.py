from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from server.bench.options import BenchError
from server.bench.workload import Piece, choose, make_prompts

NAMES = [f"a{index}" for index in range(8)]


async def _letters(text: str) -> Sequence[Piece]:
    """Pairs of characters, behind one token that is always there: a head may have one token more or less than asked."""
    return [Piece(0, 0), *(Piece(1, min(at + 2, len(text))) for at in range(0, len(text), 2))]


async def _all_one(text: str) -> Sequence[Piece]:
    return [Piece(0, len(text))]


async def test_prompts_have_exactly_the_length_asked_for() -> None:
    prompts = await make_prompts(_letters, 5, 40, Random(1))
    assert [len(await _letters(prompt.text)) for prompt in prompts] == [40] * 5
    assert [len(prompt.ids) for prompt in prompts] == [40] * 5


async def test_no_two_prompts_begin_alike() -> None:
    prompts = await make_prompts(_letters, 20, 40, Random(1))
    assert len({prompt.text[:32] for prompt in prompts}) == 20


async def test_one_seed_gives_one_set_of_prompts() -> None:
    assert await make_prompts(_letters, 3, 12, Random(5)) == await make_prompts(_letters, 3, 12, Random(5))


async def test_a_length_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(BenchError, match="prompt_tokens"):
        await make_prompts(_all_one, 1, 12, Random(1))


def test_distinct_takes_each_in_turn() -> None:
    assert choose("distinct", NAMES[:3], 7, Random(0)) == ["a0", "a1", "a2", "a0", "a1", "a2", "a0"]


def test_identical_takes_one() -> None:
    assert set(choose("identical", NAMES, 20, Random(0))) == {"a0"}


def test_uniform_takes_all_about_as_often() -> None:
    counts = Counter(choose("uniform", NAMES, 8000, Random(0)))
    assert set(counts) == set(NAMES)
    assert all(800 < count < 1200 for count in counts.values())


def test_zipf_halves_by_its_exponent() -> None:
    counts = Counter(choose("zipf", NAMES, 40_000, Random(0)))
    assert counts["a0"] / counts["a1"] == pytest.approx(2**1.5, rel=0.1)
    assert counts["a0"] / counts["a3"] == pytest.approx(4**1.5, rel=0.1)


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical"])
def test_without_adapters_every_request_is_the_base(popularity: str) -> None:
    assert choose(popularity, [], 3, Random(0)) == [None] * 3  # type: ignore[arg-type]
