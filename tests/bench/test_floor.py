from __future__ import annotations

import pytest

from server.bench.floor import Floor, StepBytes


def test_a_step_cannot_beat_the_bytes_it_reads() -> None:
    floor = Floor.of(StepBytes(base=269_000_000, base_as_fp32=538_000_000, adapters=78_000_000), 15.6)
    assert floor.base == pytest.approx(0.01724, rel=1e-3)
    assert floor.base_as_fp32 == pytest.approx(0.0345, rel=1e-3)
    assert floor.adapted == pytest.approx(floor.base + 0.005)
