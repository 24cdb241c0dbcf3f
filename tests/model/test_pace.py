"""Pace: the chunk that follows from measured times, and that measuring leaves a runner as it was."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import pytest
import torch

from server.engine.plan import Row
from server.methods import build_methods
from server.model import pace
from server.model.kernels import Kernels
from server.model.loader import make_base
from server.model.pace import DECODES, GRAIN, SHARE, chunk_for, tokens_beside_streams
from server.model.runner import CacheShape, Runner
from tests.lab import BASE
from tests.tiny import tiny_model


def new_runner(blocks: int = 64) -> Runner:
    base = make_base(tiny_model("llama"), BASE, torch.device("cpu"), torch.float32)
    return Runner(base, CacheShape(blocks, 4), build_methods(), Kernels("torch"))


def test_the_chunk_adds_its_share_of_a_step() -> None:
    assert chunk_for(0.040, 0.0001, 512) == pytest.approx(SHARE * 400, abs=GRAIN / 2)
    assert chunk_for(0.040, 0.001, 512) == 2 * GRAIN
    assert chunk_for(0.040, 0.010, 512) == GRAIN
    assert chunk_for(0.040, 0.001, 20) == 20
    assert chunk_for(0.040, 0.0, 512) == 512
    assert chunk_for(0.040, 0.010, 8) == 8


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A step takes 40 ms, and 2 ms per prompt token; in chunks of less than 40 tokens 3 ms. Notes each step's counts."""
    seen: list[list[int]] = []

    def seconds(runner: Runner, rows: Sequence[Row]) -> float:
        runner.run(rows)
        seen.append([row.count for row in rows])
        tokens = sum(row.count for row in rows if row.count > 1)
        return 0.040 + tokens * (0.003 if tokens < 40 else 0.002)

    monkeypatch.setattr(pace, "_seconds", seconds)
    return seen


def test_the_chunk_is_found_from_steps_of_its_own_size(timed: list[list[int]]) -> None:
    first = chunk_for(0.040, 0.002, 200)
    assert tokens_beside_streams(new_runner(), 200) == chunk_for(0.040, 0.003, 200)
    sizes = {sum(counts) - DECODES for counts in timed}
    assert sizes == {0, 64, first}
    assert all(counts[:DECODES] == [1] * DECODES for counts in timed)


def test_measuring_needs_no_more_cache_than_a_full_step(timed: list[list[int]]) -> None:
    runner = new_runner(blocks=9)
    assert tokens_beside_streams(runner, 15) == 15
    used = torch.stack(list(chain.from_iterable(runner._caches)), 1).flatten(1).any(1)
    assert used.tolist() == [False] + [True] * 4 + [False] * 4


def test_a_real_machine_gives_a_chunk_within_the_limits() -> None:
    assert GRAIN <= tokens_beside_streams(new_runner(), 100) <= 100
