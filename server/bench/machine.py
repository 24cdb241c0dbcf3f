"""The machine under a measurement: what its memory and arithmetic give right now, and who else is using it.

Owns nothing of the server. Speeds are measured in the run they are printed with, as on a shared machine they vary by
the hour; other people's CPU time comes from /proc/stat and is absent on systems that have none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_LOADAVG = Path("/proc/loadavg")
_READ_BYTES = 256 << 20  # far beyond the last cache
_GEMM = 1536  # rows and columns: 7 GFLOP, large enough for peak, 28 MB in all
_TRIES = 5

#: A round in which others kept more than this share of the CPUs busy says little about the program under test.
DISTURBED = 0.10


@dataclass(frozen=True)
class Machine:
    """Measured in this run, before any load. None where it was not (a server on another machine)."""

    cpus: int
    read_gb_per_second: float  # sequential reads of memory, every thread
    gemm_gflop_per_second: float  # fp32
    load_average: float | None  # of the last minute, when it was measured


def measure_machine() -> Machine:
    """Takes about a second of every core; the best of a few tries each, as neighbours only ever slow things down."""
    import torch

    load_average, threads = _load_average(), torch.get_num_threads()
    torch.set_num_threads(_usable_cpus())
    data = torch.ones(_READ_BYTES // 4)
    a, b = torch.rand(_GEMM, _GEMM), torch.rand(_GEMM, _GEMM)
    reading, multiplying = _fastest(data.sum), _fastest(lambda: a @ b)
    torch.set_num_threads(threads)
    return Machine(
        cpus=_usable_cpus(),
        read_gb_per_second=_READ_BYTES / reading / 1e9,
        gemm_gflop_per_second=2 * _GEMM**3 / multiplying / 1e9,
        load_average=load_average,
    )


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls."""
    work()
    return min(_seconds(work) for _ in range(_TRIES))


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load_average() -> float | None:
    try:
        return float(_LOADAVG.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def busy_seconds(stat: str, ticks_per_second: float) -> float:
    """CPU seconds of all processes since boot, time stolen by other virtual machines included; from /proc/stat's text.

    cpu  user nice system idle iowait irq softirq steal guest guest_nice      (guest is part of user already)
    """
    fields = [int(field) for field in stat.splitlines()[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields + [0] * (8 - len(fields))
    return (user + nice + system + irq + softirq + steal) / ticks_per_second


@dataclass(frozen=True)
class CpuClock:
    """CPU time at one instant: of everybody, of this process, and of the server under test, in seconds."""

    wall: float
    everybody: float
    own: float
    server: float

    @classmethod
    def read(cls, server_cpu_seconds: float | None) -> CpuClock | None:
        """None where the system or the server does not tell."""
        if server_cpu_seconds is None:
            return None
        try:
            busy = busy_seconds(_STAT.read_text(), os.sysconf("SC_CLK_TCK"))
        except (OSError, ValueError, IndexError):
            return None
        return cls(time.perf_counter(), busy, time.process_time(), server_cpu_seconds)


def foreign_cpus(start: CpuClock | None, end: CpuClock | None) -> float | None:
    """Mean number of CPUs that neither this process nor the server kept busy in between; None where unknown."""
    if start is None or end is None or end.wall <= start.wall:
        return None
    ours = (end.own - start.own) + (end.server - start.server)
    return max(0.0, (end.everybody - start.everybody - ours) / (end.wall - start.wall))


def is_disturbed(foreign: float | None) -> bool:
    return foreign is not None and foreign > DISTURBED * _usable_cpus()
