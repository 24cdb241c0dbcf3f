"""Running: an engine on its own thread and what it published; the adapters its tests know, and a loader that can be held up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from adapters_store.digest import Digest
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.residency import Residency
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.methods import build_methods
from server.methods.base import Adapter, Part, Prefix
from server.model.kernels import Kernels
from server.model.loader import make_base
from server.model.runner import CacheShape, Runner
from server.requests import Event, FinishReason, Request, Sampling
from tests.lab import BASE, Lab, Observer
from tests.tiny import tiny_model

CPU = torch.device("cpu")
WAIT = 60  # seconds after which a test gives up; none waits that long
PROMPT = [5, 9, 33, 60, 12]


def vectors(name: str) -> Adapter:
    """A BitFit adapter whose effect is plain to see."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    sites = {f"model.layers.{i}.mlp.down_proj": {"delta": 3 * torch.randn(32, generator=generator)} for i in range(2)}
    return Adapter(Digest.of(name.encode()), (Part("bitfit", "bitfit", sites),))


def prefix(name: str, *, soft: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if soft:
        embeddings = torch.randn(5, 32, generator=generator)
        return Adapter(Digest.of(name.encode()), (Part("prompt_tuning", prefix=Prefix(5, embeddings=embeddings)),))
    keys, values = torch.randn(2, 2, 5, 2, 8, generator=generator)
    return Adapter(Digest.of(name.encode()), (Part("prefix_tuning", prefix=Prefix(5, keys, values)),))


ADAPTERS = {name: vectors(name) for name in ("a", "b", "c")} | {"kv": prefix("kv"), "soft": prefix("soft", soft=True)}
DIGESTS = {name: adapter.digest for name, adapter in ADAPTERS.items()}
KNOWN = {adapter.digest: adapter for adapter in ADAPTERS.values()}


def new_lab(**options: Any) -> Lab:
    return Lab(tiny_model("llama"), KNOWN, **options)


def ask(lab: Lab, *names: str, suffix: str = "") -> None:
    for name in names:
        lab.submit(name + suffix, PROMPT, *([] if name == "base" else [DIGESTS[name]]))


class Running:
    """An engine on its own thread, and what it published."""

    def __init__(self, load: Callable[[Digest], Adapter] = KNOWN.__getitem__, **options: int) -> None:
        base = make_base(tiny_model("llama"), BASE, CPU, torch.float32)
        self.runner = Runner(base, CacheShape(129, 4), build_methods(), Kernels("torch"))
        self.limits = SchedulerLimits(options.get("budget", 32), options.get("running", 8), options.get("waiting", 64), 200)
        self.scheduler = Scheduler(Pages(129, 4), Residency(options.get("slots", 4)), self.limits, BASE, [2])
        self.observer = Observer()
        self.events: list[Event] = []
        self.heard = threading.Condition()
        self.engine = Engine(self.runner, self.scheduler, load, self.observer, self._publish, options.get("cache", 1 << 20))

    def _publish(self, events: list[Event]) -> None:
        with self.heard:
            self.events += events
            self.heard.notify_all()

    def submit(self, id: str, *adapters: str, new: int = 6, prompt: Sequence[int] = PROMPT) -> None:
        sampling = Sampling(max_new_tokens=new, ignore_eos=True)
        digests = tuple(DIGESTS[name] for name in adapters)
        self.engine.submit(Request(id, "t", digests, tuple(prompt), sampling, time.monotonic()))

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.heard:
            assert self.heard.wait_for(condition, WAIT)

    def ending(self, id: str) -> Event:
        self.wait(lambda: any(event.request_id == id and event.finish for event in self.events))
        (event,) = [event for event in self.events if event.request_id == id and event.finish]
        return event

    def tokens(self, id: str) -> list[int]:
        assert self.ending(id).finish is FinishReason.LENGTH
        return [token.id for event in self.events if event.request_id == id for token in event.tokens]

    def started(self, id: str) -> None:
        self.wait(lambda: any(event.request_id == id for event in self.events))


def check_events(events: Sequence[Event]) -> None:
    """Each request has one finishing event, none after it, and none twice."""
    assert len({id(event) for event in events}) == len(events)
    ended: set[str] = set()
    for event in events:
        assert event.request_id not in ended
        if event.finish is not None:
            ended.add(event.request_id)
        assert (event.error is not None) == (event.finish is FinishReason.ERROR)
    assert {event.request_id for event in events} == ended


class Gate:
    """A loader that waits to be let through, and can be told to fail."""

    def __init__(self) -> None:
        self.open, self.asked = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.loads: list[Digest] = []

    def __call__(self, digest: Digest) -> Adapter:
        self.loads.append(digest)
        self.asked.set()
        assert self.open.wait(WAIT)
        if self.error is not None:
            raise self.error
        return KNOWN[digest]
