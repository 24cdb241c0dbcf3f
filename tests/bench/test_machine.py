from __future__ import annotations

import os

import pytest

from server.bench import machine
from server.bench.machine import CpuClock, busy_seconds, foreign_cpus, is_disturbed, measure_machine


def test_idle_and_waiting_are_not_busy_but_stolen_time_is() -> None:
    stat = "cpu  100 10 20 5000 700 3 4 50 60 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert busy_seconds(stat, 100) == pytest.approx(1.87)


def test_an_old_kernels_shorter_line_is_read() -> None:
    assert busy_seconds("cpu  100 10 20 5000\n", 10) == pytest.approx(13.0)


def test_foreign_is_what_neither_we_nor_the_server_used() -> None:
    start = CpuClock(wall=100.0, everybody=50.0, own=1.0, server=2.0)
    end = CpuClock(wall=110.0, everybody=69.0, own=2.0, server=14.0)
    assert foreign_cpus(start, end) == pytest.approx(0.6)


def test_foreign_is_never_negative_and_unknown_without_a_clock() -> None:
    start = CpuClock(wall=0.0, everybody=0.0, own=0.0, server=0.0)
    assert foreign_cpus(start, CpuClock(wall=1.0, everybody=1.0, own=1.0, server=1.0)) == 0.0
    assert foreign_cpus(None, start) is None
    assert foreign_cpus(start, start) is None


def test_the_clock_needs_the_servers_share() -> None:
    assert CpuClock.read(None) is None


def test_a_tenth_of_the_cpus_disturbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert is_disturbed(0.41)
    assert not is_disturbed(0.39)
    assert not is_disturbed(None)


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "_GEMM", 16)
    found = measure_machine()
    assert found.cpus >= 1
    assert found.read_gb_per_second > 0
    assert found.gemm_gflop_per_second > 0
