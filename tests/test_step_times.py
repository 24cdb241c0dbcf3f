"""StepTimes: phases add up, medians are those of the steps remembered, and a running engine fills them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.step_times import PHASES, SIZE, StepTimes
from tests.lab import Lab
from tests.tiny import tiny_model


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `perf_counter` tells, in its only element."""
    told = [100.0]
    monkeypatch.setattr("server.step_times.time.perf_counter", lambda: told[0])
    return told


def report(times: StepTimes, last: int = 0) -> Any:
    return json.loads(json.dumps(times.report(last)))


def play(times: StepTimes, now: list[float], rows: int, tokens: int, **milliseconds: float) -> None:
    times.begin()
    for phase, spent in milliseconds.items():
        now[0] += spent / 1e3
        times.mark(phase)  # type: ignore[arg-type]
    times.end(rows, tokens)


def test_medians_by_phase_of_decodes_and_of_other_steps(now: list[float]) -> None:
    times = StepTimes()
    for forward in (10, 30, 20):
        play(times, now, rows=8, tokens=8, plan=1, forward=forward)
    play(times, now, rows=9, tokens=29, forward=70, sample=2)
    found = report(times, last=2)
    assert found["steps"] == found["remembered"] == 4
    assert found["decode"]["median_ms"]["forward"] == pytest.approx(20)
    assert found["decode"]["median_ms"]["plan"] == pytest.approx(1)
    assert found["decode"]["median_total_ms"] == pytest.approx(21)
    assert (found["mixed"]["steps"], found["mixed"]["tokens"]) == (1, 29)
    assert [step["tokens"] for step in found["last"]] == [29, 8]
    assert found["last"][0]["total_ms"] == pytest.approx(72)


def test_a_phase_that_is_repeated_adds_up(now: list[float]) -> None:
    times = StepTimes()
    times.begin()
    for _ in range(2):
        for phase in PHASES[2:4]:
            now[0] += 0.005
            times.mark(phase)
    times.end(3, 3)
    assert report(times)["decode"]["median_ms"]["forward"] == pytest.approx(10)


def test_only_the_last_steps_are_remembered(now: list[float]) -> None:
    times = StepTimes()
    for i in range(SIZE + 10):
        play(times, now, rows=1, tokens=1, forward=1 if i < 10 else 3)
    found = report(times, last=SIZE)
    assert (found["steps"], found["remembered"], len(found["last"])) == (SIZE + 10, SIZE, SIZE)
    assert {step["ms"]["forward"] for step in found["last"]} == {3.0}


def test_a_step_that_broke_leaves_nothing_behind(now: list[float]) -> None:
    times = StepTimes()
    times.begin()
    now[0] += 9
    times.mark("plan")
    play(times, now, rows=1, tokens=1, forward=1)
    assert report(times)["decode"]["median_total_ms"] == pytest.approx(1)


def test_nothing_yet() -> None:
    assert report(StepTimes(), last=5) == {"steps": 0, "remembered": 0, "decode": None, "mixed": None, "last": []}


def test_an_engines_steps_show_every_phase() -> None:
    lab = Lab(tiny_model("llama"), {})
    lab.submit("a", [5, 6, 7, 8], max_new_tokens=5)
    lab.run()
    found = report(lab.engine.step_times(), last=10)
    assert found["steps"] == 5
    assert (found["decode"]["steps"], found["mixed"]["steps"]) == (4, 1)
    assert found["mixed"]["tokens"] == 4
    assert all(found["decode"]["median_ms"][phase] > 0 for phase in PHASES)
