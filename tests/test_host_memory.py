"""Memory from the system holds what it was given, and gives every tensor its own."""

from __future__ import annotations

import mmap
import resource
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch

from server import host_memory
from server.host_memory import Ahead, Room, taken, zeros

MB = 1 << 20


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


def faults(tensor: torch.Tensor) -> int:
    """How often the system had to be asked for memory while a tensor was written from end to end."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    tensor.view(torch.uint8).view(-1)[:: mmap.PAGESIZE] = 7
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def caches(count: int, megabytes: int) -> list[torch.Tensor]:
    return [zeros((megabytes * MB,), torch.uint8, large_pages=True) for _ in range(count)]


def test_what_is_taken_ahead_is_not_waited_for_when_it_is_written() -> None:
    pair = caches(2, 8)
    ahead = Ahead(pair)
    ahead.reach(1)
    assert ahead.nbytes == (2 + 1) * 2 * MB  # the pages that are begun, and the first of what follows
    faults(torch.empty(1, dtype=torch.uint8))  # the first call of anything has some of its own
    assert [faults(cache[: 2 * MB]) for cache in pair] == [0, 0]
    assert faults(pair[1][4 * MB :]) > 0  # else faults are not what is counted here


def test_pages_are_taken_in_turns_and_as_evenly_as_they_are_written() -> None:
    ahead, sizes = Ahead(caches(4, 16)), []
    for written in range(0, 8 * MB, MB // 4):
        ahead.reach(written)
        sizes.append(ahead.nbytes)
    steps = [after - before for before, after in pairwise(sizes)]
    assert max(steps) == 2 * MB
    assert sum(step > 0 for step in steps) == 16  # four pages of each, every other time one
    ahead.reach(0)
    assert ahead.nbytes == sizes[-1]


def test_nothing_that_was_written_is_changed() -> None:
    [cache] = caches(1, 4)
    cache[:] = 5
    ahead = Ahead([cache])
    ahead.reach(4 * MB)
    while ahead.more():
        pass
    assert bool((cache == 5).all())


def test_quiet_moments_take_a_page_each_until_enough_is_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_SPARE", 6 * MB)
    ahead = Ahead(caches(2, 64))
    ahead.reach(0)
    before, moments = ahead.nbytes, 1
    while ahead.more():
        moments += 1
    assert (ahead.nbytes - before, moments) == (6 * MB, 3)
    assert not ahead.more()
    ahead.reach(8 * MB)
    assert ahead.more()


def test_no_more_is_taken_than_there_is() -> None:
    odd = caches(3, 3)
    ahead = Ahead(odd)
    ahead.reach(3 * MB)
    assert ahead.nbytes == 3 * 3 * MB
    assert not ahead.more()
    assert all(torch.equal(cache, torch.zeros_like(cache)) for cache in odd)


def test_of_nothing_nothing_is_taken() -> None:
    ahead = Ahead([])
    ahead.reach(7)
    assert not ahead.more()
    assert ahead.nbytes == 0


@pytest.mark.parametrize("libc", [None, lambda *args: -1])
def test_where_the_system_can_not_memory_is_taken_as_it_is_written(libc: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_madvise", libc)
    monkeypatch.setattr(host_memory, "taken", lambda written, large_pages: written)
    ahead = Ahead(caches(3, 8))
    ahead.reach(5)
    assert not ahead.more()
    assert ahead.nbytes == 3 * 5


def group(path: Path, limit: str, used: int, files: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 9\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is in /outer/inner."""
    (tmp_path / "own").write_text("0::/outer/inner\n")
    monkeypatch.setattr(host_memory, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(host_memory, "_GROUPS", tmp_path / "groups")
    return tmp_path / "groups"


def test_a_control_group_leaves_what_it_has_not_used_and_the_files_it_could_drop(groups: Path) -> None:
    group(groups / "outer", "max", 5)
    group(groups / "outer" / "inner", "1000", 700, files=200)
    assert host_memory.available() == 500


def test_the_narrowest_of_all_groups_counts(groups: Path) -> None:
    group(groups / "outer", "800", 700)
    group(groups / "outer" / "inner", "1000", 300)
    assert host_memory.available() == 100


def test_a_group_over_its_limit_leaves_nothing(groups: Path) -> None:
    group(groups / "outer" / "inner", "1000", 1001)
    assert host_memory.available() == 0


def test_in_a_container_the_own_group_is_the_root(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group(groups, "1000", 400)
    (groups.parent / "own").write_text("12:memory:/elsewhere\n0::/\n")
    assert host_memory.available() == 600


@pytest.mark.parametrize("own", ["12:memory:/v1\n", "0::/gone\n", ""])
def test_without_a_group_that_limits_memory_the_machine_does(own: str, groups: Path) -> None:
    (groups.parent / "own").write_text(own)
    assert 0 < host_memory.available() <= psutil.virtual_memory().total
