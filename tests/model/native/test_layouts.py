"""Layouts: where a weight's value lies in memory, on every processor; that the kernels read it there is theirs to test."""

from __future__ import annotations

import pytest
import torch

from server.model.native.layouts import pack, pack_tiles
from tests.model.native.tensors import BF16, random

SHAPES = [(1, 1), (33, 31), (70, 37), (64, 96)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_columns_of_a_bf16_panel_lie_in_pairs_sixteen_apart(n: int, k: int) -> None:
    weight = random(n, k, dtype=BF16)
    panels = pack(weight)
    assert panels.shape == (-(-n // 32), k, 32)
    column = torch.arange(n)
    at = column % 16 * 2 + column % 32 // 16
    assert torch.equal(panels[column // 32, :, at], weight)
    assert panels.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_tile_holds_pairs_of_k_by_sixteen_columns(n: int, k: int) -> None:
    weight = random(n, k, dtype=BF16)
    tiles = pack_tiles(weight)
    assert tiles.shape == (-(-n // 32), -(-k // 32), 2, 16, 16, 2)
    column, depth = torch.arange(n)[:, None], torch.arange(k)
    found = tiles[column // 32, depth // 32, column % 32 // 16, depth % 32 // 2, column % 16, depth % 2]
    assert torch.equal(found, weight)
    assert tiles.count_nonzero() == weight.count_nonzero()
