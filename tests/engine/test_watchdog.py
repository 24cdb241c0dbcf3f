"""The pulse on a clock that moves only when told, and an engine whose runner hangs until it is let go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from adapters_store.digest import Digest
from server.api.readiness import Readiness
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.plan import Row
from server.engine.residency import Residency
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.watchdog import FIRST_STEP, Pulse
from server.methods import build_methods
from server.methods.base import Adapter, Part
from server.model.kernels import Kernels
from server.model.loader import make_base
from server.model.runner import CacheShape, Runner
from server.requests import Event, Request, Sampling
from tests.lab import BASE, Observer
from tests.tiny import tiny_model

WAIT = 60  # seconds after which a test gives up; none waits that long
LIMIT = 120.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_age_and_lateness_are_counted_from_the_last_beat() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    pulse.stepped()
    clock.now += LIMIT
    assert pulse.age == LIMIT
    assert not pulse.late(LIMIT)
    clock.now += 1
    assert pulse.late(LIMIT)
    pulse.beat()
    assert pulse.age == 0
    assert not pulse.late(LIMIT)


def test_the_first_step_may_take_longer() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    clock.now += FIRST_STEP * LIMIT
    assert not pulse.late(LIMIT)
    clock.now += 1
    assert pulse.late(LIMIT)


class Hanging:
    """An engine on its own thread whose forward passes (and loads) wait to be let through."""

    def __init__(self) -> None:
        base = make_base(tiny_model("llama"), BASE, torch.device("cpu"), torch.float32)
        self.runner = Runner(base, CacheShape(65, 4), build_methods(), Kernels("torch"))
        self.go, self.entered = threading.Event(), threading.Event()
        self.clock = Clock()
        self.ended: dict[str, Future[Event]] = {}
        self._run = self.runner.run
        self.runner.run = self._held  # type: ignore[method-assign]
        limits = SchedulerLimits(32, 8, 64, 200)
        scheduler = Scheduler(Pages(65, 4), Residency(4), limits, BASE, [2])
        self.engine = Engine(runner=self.runner, scheduler=scheduler, load=self._load, observer=Observer(),
                             publish=self._publish, pulse=Pulse(self.clock))  # fmt: skip
        self.engine.start()

    def _held(self, rows: Sequence[Row]) -> Any:
        self.entered.set()
        assert self.go.wait(WAIT)
        return self._run(rows)

    def _load(self, digest: Digest) -> Adapter:
        self.entered.set()
        assert self.go.wait(WAIT)
        return Adapter(digest, (Part("bitfit", "bitfit", {"model.layers.0.mlp.down_proj": {"delta": torch.ones(32)}}),))

    def _publish(self, events: list[Event]) -> None:
        for event in events:
            if event.finish is not None:
                self.ended[event.request_id].set_result(event)

    def submit(self, id: str, *adapters: Digest) -> Future[Event]:
        self.ended[id] = Future()
        self.engine.submit(Request(id, "t", adapters, (5, 9, 33), Sampling(max_new_tokens=2), time.monotonic()))
        return self.ended[id]


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    with capture_logs():
        held = Hanging()
        yield held
        held.go.set()
        held.engine.stop()


def after_a_first_step(hanging: Hanging) -> None:
    hanging.go.set()
    hanging.submit("first").result(WAIT)
    hanging.engine.unload(Digest("1" * 64))  # comes round once more: the first step's turn is over
    hanging.go.clear()
    hanging.entered.clear()


def test_a_step_that_hangs_turns_livez_and_health_red_until_it_goes_on(hanging: Hanging) -> None:
    readiness = Readiness()
    readiness.watch(lambda: hanging.engine.stalled(LIMIT))
    after_a_first_step(hanging)
    ended = hanging.submit("second")
    assert hanging.entered.wait(WAIT)
    assert not hanging.engine.stalled(LIMIT)
    hanging.clock.now += LIMIT + 1
    assert hanging.engine.stalled(LIMIT)
    assert hanging.engine.stats().last_step_age == LIMIT + 1
    assert [answer.status_code for answer in (readiness.alive(), readiness.health(), readiness.report())] == [503] * 3
    hanging.go.set()
    ended.result(WAIT)
    hanging.engine.unload(Digest("1" * 64))
    assert not hanging.engine.stalled(LIMIT)
    assert [answer.status_code for answer in (readiness.alive(), readiness.health(), readiness.report())] == [200] * 3


def test_a_long_first_step_is_no_stall(hanging: Hanging) -> None:
    hanging.submit("first")
    assert hanging.entered.wait(WAIT)
    hanging.clock.now += FIRST_STEP * LIMIT
    assert not hanging.engine.stalled(LIMIT)


def test_a_load_that_takes_long_is_no_stall(hanging: Hanging) -> None:
    """The loop comes round while somebody else reads."""
    after_a_first_step(hanging)
    ended = hanging.submit("cold", Digest("2" * 64))
    assert hanging.entered.wait(WAIT)
    hanging.clock.now += LIMIT + 1
    hanging.engine.unload(Digest("1" * 64))  # answered by the loop, so it has come round
    hanging.engine.unload(Digest("1" * 64))
    assert hanging.engine.pending == 1
    assert not hanging.engine.stalled(LIMIT)
    hanging.go.set()
    assert ended.result(WAIT).error is None


def test_without_work_nothing_is_stalled(hanging: Hanging) -> None:
    after_a_first_step(hanging)
    hanging.clock.now += 10 * LIMIT
    assert hanging.engine.pending == 0
    assert not hanging.engine.stalled(LIMIT)


def test_a_loop_that_fails_even_to_recover_is_stalled(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes round, but in no good order: it does not beat, and it does not end."""
    after_a_first_step(hanging)
    broken, tried = threading.Event(), threading.Event()
    plan = hanging.engine._scheduler.plan

    def plan_or_break() -> Any:
        if broken.is_set():
            tried.set()
            raise RuntimeError("the state is inconsistent")
        return plan()

    monkeypatch.setattr(hanging.engine._scheduler, "plan", plan_or_break)
    monkeypatch.setattr(hanging.engine._placing, "undo", lambda error: 1 / 0)
    broken.set()
    hanging.submit("second")
    assert tried.wait(WAIT)
    hanging.clock.now += LIMIT + 1
    tried.clear()
    assert tried.wait(WAIT)  # it still tries
    assert hanging.engine.stalled(LIMIT)
    broken.clear()
