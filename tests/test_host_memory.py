"""Memory from the system holds what it was given, and gives every tensor its own."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from server import host_memory
from server.host_memory import Room, taken, zeros


@pytest.mark.parametrize("large_pages", [True, False])
def test_zeros_are_zero_and_writable(large_pages: bool) -> None:
    cache = zeros((2, 3, 5), torch.bfloat16, large_pages=large_pages)
    assert cache.shape == (2, 3, 5)
    assert cache.is_contiguous()
    assert not cache.any()
    cache += 1
    assert bool((cache == 1).all())


def test_of_nothing_there_is_nothing() -> None:
    assert zeros((0, 4), torch.float32, large_pages=True).shape == (0, 4)
    assert Room().place(torch.empty(0, 7)).shape == (0, 7)


def test_placed_tensors_are_contiguous_copies_that_do_not_meet() -> None:
    room, first = Room(), torch.arange(15, dtype=torch.float32).view(3, 5)
    placed = [room.place(first.T), room.place(first.bfloat16()), room.place(torch.ones(33, dtype=torch.int8))]
    wanted = [first.T.clone(), first.bfloat16(), torch.ones(33, dtype=torch.int8)]
    first += 1
    for got, want in zip(placed, wanted, strict=True):
        assert got.is_contiguous()
        assert got.data_ptr() % 64 == 0
        assert torch.equal(got, want)
    placed[1].zero_()
    assert torch.equal(placed[0], wanted[0])
    assert torch.equal(placed[2], wanted[2])


def test_a_tensor_larger_than_what_is_taken_at_once_has_room_too() -> None:
    large = torch.zeros((65 << 20) + 1, dtype=torch.uint8)
    large[-1] = 7
    room = Room()
    assert torch.equal(room.place(large), large)
    assert room.place(large[-3:]).tolist() == [0, 0, 7]


@pytest.mark.parametrize(
    ("mode", "large"), [("always [madvise] never", True), ("always madvise [never]", False), (None, False)]
)
def test_memory_is_taken_in_whole_pages(mode: str | None, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode is not None:
        (tmp_path / "enabled").write_text(mode)
    monkeypatch.setattr(host_memory, "_MODE", tmp_path / "enabled")
    page = 2 << 20 if large else mmap.PAGESIZE
    assert [taken(count, large_pages=True) for count in (0, 1, page, page + 1)] == [0, page, page, 2 * page]
    assert taken(1, large_pages=False) == mmap.PAGESIZE
