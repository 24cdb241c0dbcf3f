"""Engine: every accepted request ends once, whatever breaks; nothing that breaks costs anyone else."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from adapters_store.digest import Digest
from server.engine.engine import Engine
from server.engine.footprint import Footprint
from server.engine.pages import Pages
from server.engine.plan import Change, Copy, Evict, Fill, Put, Row
from server.engine.residency import Residency
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.errors import AdapterdError, AdapterError, GenerationError, NotFoundError, OverloadedError, UnavailableError
from server.methods import build_methods
from server.methods.base import Adapter, Part, Prefix
from server.model.kernels import Kernels
from server.model.loader import make_base
from server.model.runner import CacheShape, Runner
from server.requests import Event, FinishReason, Request, Sampling
from server.tenancy.quotas import Admission, AdmissionLimits
from tests.lab import BASE, Lab, Observer
from tests.tiny import tiny_model

CPU = torch.device("cpu")
WAIT = 60  # seconds after which a test gives up; none waits that long
PROMPT = [5, 9, 33, 60, 12]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    """What the engine logged; failures are provoked here by the dozen, and printing them all takes seconds."""
    with capture_logs() as captured:
        yield captured


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


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """What each adapter answers to PROMPT, alone."""
    found = {}
    for name in ["base", *ADAPTERS]:
        lab = new_lab()
        lab.submit(name, PROMPT, *([] if name == "base" else [DIGESTS[name]]))
        lab.run()
        found[name] = lab.tokens(name)
    assert len({tuple(tokens) for tokens in found.values()}) == len(found)
    return found


def ask(lab: Lab, *names: str, suffix: str = "") -> None:
    for name in names:
        lab.submit(name + suffix, PROMPT, *([] if name == "base" else [DIGESTS[name]]))


def error_of(lab: Lab, id: str) -> str:
    event = lab.ending(id)
    assert event.finish is FinishReason.ERROR
    return f"{type(event.error).__name__}: {event.error}"


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


@pytest.fixture
def run() -> Iterator[Callable[..., Running]]:
    """Makes started engines; at the end they are stopped and must have ended every request exactly once."""
    made: list[Running] = []

    def make(*args: Any, start: bool = True, **options: Any) -> Running:
        made.append(Running(*args, **options))
        if start:
            made[-1].engine.start()
        return made[-1]

    yield make
    for running in made:
        running.engine.stop()
        assert not running.engine._thread.is_alive()
        assert running.engine.pending == 0
        check_events(running.events)
        running.scheduler.check_idle()


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


# ---- requests ----


def test_requests_of_all_kinds_are_answered(run: Callable[..., Running], expected: dict[str, list[int]]) -> None:
    running = run()
    for name in expected:
        running.submit(name, *([] if name == "base" else [name]))
    assert {name: running.tokens(name) for name in expected} == expected
    first = next(event for event in running.events if event.request_id == "a")
    assert first.queue_seconds is not None
    assert first.queue_seconds >= 0
    assert max(running.observer.families_per_step) >= 1


def test_requests_may_come_from_any_thread(run: Callable[..., Running], expected: dict[str, list[int]]) -> None:
    running = run()
    threads = [threading.Thread(target=running.submit, args=(f"{i}", "a")) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(running.tokens(f"{i}") == expected["a"] for i in range(12))


def test_a_request_that_can_never_fit_is_answered_with_an_error(run: Callable[..., Running]) -> None:
    running = run()
    running.submit("long", new=196)
    event = running.ending("long")
    assert "must be <= 200. Given: 5 `inputs` tokens and 196 `max_new_tokens`" in str(event.error)


def test_a_defect_while_queueing_costs_that_request_alone(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, expected: dict[str, list[int]]
) -> None:
    running = run()
    real = running.scheduler.submit

    def submit(request: Request) -> None:
        if request.id == "odd":
            raise RuntimeError("a defect")
        real(request)

    monkeypatch.setattr(running.scheduler, "submit", submit)
    running.submit("odd")
    running.submit("fine")
    assert str(running.ending("odd").error) == "the request failed (RuntimeError)"
    assert running.tokens("fine") == expected["base"]


def test_pending_and_stats_follow_the_requests() -> None:
    lab = new_lab(max_running=2, slots=3)
    ask(lab, "a", "base", "b")
    assert lab.engine.pending == 3
    lab.turn()
    lab.turn()
    stats = lab.engine.stats()
    assert (stats.running, stats.waiting, lab.engine.pending) == (2, 1, 3)
    assert stats.kv_blocks_used > 0
    assert stats.kv_blocks_total == 256
    assert (stats.slots_used, stats.slots_total, stats.resident) == (1, 3, (DIGESTS["a"],))
    assert stats.waiting_for == (DIGESTS["b"],)
    assert stats.device_bytes == lab.runner.adapter_bytes > 0
    lab.run()
    stats = lab.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used, lab.engine.pending) == (0, 0, 0, 0)
    assert set(stats.resident) == {DIGESTS["a"], DIGESTS["b"]}


def test_one_too_many_is_refused_at_once_and_a_place_comes_free_again() -> None:
    lab = new_lab(admission=Admission(AdmissionLimits(max_running=2, max_waiting=3)))
    for i in range(5):
        lab.submit(f"{i}", PROMPT)
    with pytest.raises(
        OverloadedError, match="5 requests are accepted, the most that max_running 2 and max_waiting 3"
    ) as refused:
        lab.submit("one too many", PROMPT)
    assert refused.value.retry_after > 0
    assert lab.observer.refusals == ["max_waiting"]
    lab.run()
    lab.submit("later", PROMPT)
    lab.run()
    assert lab.finished("later")
    assert not [event for event in lab.events if event.request_id == "one too many"]


# ---- cancelling ----


@pytest.mark.parametrize("name", ["base", "a", "kv", "soft"])
def test_a_cancelled_request_gives_everything_back_within_one_step(name: str) -> None:
    lab = new_lab()
    lab.submit(name, PROMPT, *([] if name == "base" else [DIGESTS[name]]), max_new_tokens=50)
    for _ in range(6):
        lab.turn()
    assert lab.scheduler.running
    lab.engine.cancel(name)
    lab.turn()
    assert lab.ending(name).finish is FinishReason.CANCELLED
    assert lab.scheduler.idle
    lab.scheduler.check_idle()
    assert lab.engine.pending == 0


def test_cancelling_leaves_the_others_as_they_were(expected: dict[str, list[int]]) -> None:
    lab = new_lab()
    ask(lab, "a", "b", "soft")
    for _ in range(5):
        lab.turn()
    lab.engine.cancel("b")
    lab.run()
    assert {name: lab.tokens(name) for name in ("a", "soft")} == {name: expected[name] for name in ("a", "soft")}


def test_a_waiting_request_can_be_cancelled_too(run: Callable[..., Running]) -> None:
    gate = Gate()
    running = run(gate)
    running.submit("a", "a")
    assert gate.asked.wait(WAIT)
    running.engine.cancel("a")
    assert running.ending("a").finish is FinishReason.CANCELLED
    gate.open.set()


def test_cancelling_what_is_unknown_or_over_does_nothing(run: Callable[..., Running]) -> None:
    running = run()
    running.engine.cancel("nobody")
    running.submit("a")
    running.ending("a")
    running.engine.cancel("a")
    running.submit("b")
    assert running.tokens("b")


def test_a_cancel_between_submit_and_the_first_step_wins() -> None:
    lab = new_lab()
    ask(lab, "base")
    lab.engine.cancel("base")
    lab.run()
    assert lab.ending("base").finish is FinishReason.CANCELLED
    assert lab.tokens("base") == []


# ---- steps that break ----


def poison(lab: Lab, monkeypatch: pytest.MonkeyPatch, guilty: Callable[[Row], bool], error: Exception) -> list[int]:
    """Make the forward pass raise as soon as a guilty row is in it; returns the sizes of the batches tried."""
    real, sizes = lab.runner.run, []

    def run(rows: Sequence[Row]) -> Any:
        sizes.append(len(rows))
        if any(guilty(row) for row in rows):
            raise error
        return real(rows)

    monkeypatch.setattr(lab.runner, "run", run)
    return sizes


def is_request(*ids: str) -> Callable[[Row], bool]:
    return lambda row: row.sequence.request is not None and row.sequence.request.id in ids


@pytest.mark.parametrize("culprit", ["base", "a", "kv", "soft"])
def test_a_request_that_breaks_the_step_fails_alone(
    culprit: str, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab(max_batch_tokens=200)
    sizes = poison(lab, monkeypatch, is_request(culprit), RuntimeError("prompt text that must not get out"))
    ask(lab, *expected)
    lab.run()
    assert error_of(lab, culprit) == "GenerationError: the step failed (RuntimeError)"
    assert {name: lab.tokens(name) for name in expected if name != culprit} == {
        name: tokens for name, tokens in expected.items() if name != culprit
    }
    check_events(lab.events)
    assert 1 in sizes


def test_two_culprits_of_six_are_found_by_halving(expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab(max_batch_tokens=200)
    sizes = poison(lab, monkeypatch, is_request("b0", "base3"), ValueError())
    lab.engine.warm((DIGESTS["b"],))
    for _ in range(3):
        lab.turn()
    for i in range(6):
        ask(lab, "b" if i % 2 == 0 else "base", suffix=f"{i}")
    lab.run()
    assert {event.request_id for event in lab.events if event.finish is FinishReason.ERROR} == {"b0", "base3"}
    assert all(lab.tokens(f"b{i}") == expected["b"] for i in (2, 4))
    assert max(sizes) == 6


def test_an_error_of_the_tree_reaches_the_client_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab()
    poison(lab, monkeypatch, is_request("base"), AdapterError("lora_A", "is odd"))
    ask(lab, "base")
    lab.run()
    assert error_of(lab, "base") == "AdapterError: lora_A: is odd"


def test_a_request_that_breaks_later_keeps_the_tokens_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab()
    poison(lab, monkeypatch, lambda row: row.sequence.generated == 3, RuntimeError())
    ask(lab, "base")
    lab.run()
    assert len(lab.tokens("base")) == 3
    assert lab.ending("base").finish is FinishReason.ERROR


def test_a_soft_prompt_that_breaks_its_run_fails_who_waits_for_it_and_is_tried_again(
    expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab()
    with monkeypatch.context() as patched:
        poison(lab, patched, lambda row: row.sequence.request is None, RuntimeError())
        ask(lab, "soft", "base")
        ask(lab, "soft", suffix=" too")
        lab.run()
    assert {error_of(lab, "soft"), error_of(lab, "soft too")} == {"GenerationError: the step failed (RuntimeError)"}
    assert lab.tokens("base") == expected["base"]
    ask(lab, "soft", suffix=" again")
    lab.run()
    assert lab.tokens("soft again") == expected["soft"]


# ---- changes that break ----


def breaking(lab: Lab, monkeypatch: pytest.MonkeyPatch, guilty: Callable[[Change], bool]) -> None:
    real = lab.runner.apply

    def apply(changes: Sequence[Change], adapters: Any) -> None:
        if any(guilty(change) for change in changes):
            raise torch.OutOfMemoryError("out of memory")
        real(changes, adapters)

    monkeypatch.setattr(lab.runner, "apply", apply)


@pytest.mark.parametrize(("kind", "name"), [(Put, "a"), (Put, "kv"), (Put, "soft"), (Fill, "kv")])
def test_an_adapter_that_the_device_does_not_take_fails_only_who_asked_for_it(
    kind: type, name: str, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab()
    ask(lab, "base", "b")
    for _ in range(3):
        lab.turn()
    with monkeypatch.context() as patched:
        breaking(lab, patched, lambda change: isinstance(change, kind) and change.digest == DIGESTS[name])
        ask(lab, name, "c")
        ask(lab, name, suffix=" too")
        lab.run()
    for id in (name, f"{name} too"):
        assert error_of(lab, id) == "GenerationError: the adapter could not be put on the device (OutOfMemoryError)"
    assert {id: lab.tokens(id) for id in ("base", "b", "c")} == {id: expected[id] for id in ("base", "b", "c")}
    assert lab.engine.residency(DIGESTS[name]) == ("stored", None)
    ask(lab, name, suffix=" again")
    lab.run()
    assert lab.tokens(f"{name} again") == expected[name]
    check_events(lab.events)


def test_a_put_that_fails_half_way_leaves_nothing_for_the_slots_next_owner(
    expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab()
    site = "model.layers.1.mlp.down_proj"
    whole = dict(ADAPTERS["a"].parts[0].sites)
    wrong = Part("bitfit", "bitfit", {**whole, site: {"delta": torch.zeros(31)}})
    lab.adapters[DIGESTS["a"]] = Adapter(DIGESTS["a"], (wrong,))
    with monkeypatch.context() as patched:
        patched.setattr(lab.engine, "_weigh", lambda adapter: Footprint())  # it would have noticed
        ask(lab, "a")
        lab.run()
    assert "could not be put on the device (ValueError)" in error_of(lab, "a")
    assert lab.runner.sites.attached == ()
    only_last = Part("bitfit", "bitfit", {site: ADAPTERS["b"].parts[0].sites[site]})
    small = Adapter(Digest.of(b"small"), (only_last,))
    lab.adapters[small.digest] = small
    lab.submit("small", PROMPT, small.digest)
    lab.run()
    clean = Lab(tiny_model("llama"), {small.digest: small})
    clean.submit("small", PROMPT, small.digest)
    clean.run()
    assert lab.tokens("small") == clean.tokens("small")


@pytest.mark.parametrize("kind", [Evict, Copy])
def test_a_step_that_breaks_half_way_never_leaves_an_adapter_believed_present(
    kind: type, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan puts "a" on the device behind a change that fails: "a" must not answer as the base does."""
    lab = new_lab(slots=2)
    ask(lab, "kv", "c")
    lab.run()
    with monkeypatch.context() as patched:
        breaking(lab, patched, lambda change: isinstance(change, kind))
        ask(lab, "kv", "a", suffix=" broken")
        lab.run()
    ask(lab, "a", "kv", suffix=" later")
    lab.run()
    assert lab.tokens("a later") == expected["a"]
    assert lab.tokens("kv later") == expected["kv"]
    check_events(lab.events)


def test_a_slot_that_could_not_be_cleared_is_used_by_nobody_until_it_is(
    expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab(slots=1)
    ask(lab, "a")
    lab.run()
    steps = []
    with monkeypatch.context() as patched:
        breaking(lab, patched, lambda change: isinstance(change, Evict))
        patched.setattr(lab.runner, "run", lambda rows: steps.append(rows))
        ask(lab, "b")
        for _ in range(6):
            lab.turn()
    assert steps == []
    lab.run()
    ask(lab, "b", "a", suffix=" later")
    lab.run()
    assert [lab.tokens("b later"), lab.tokens("a later")] == [expected["b"], expected["a"]]
    check_events(lab.events)


def test_a_defect_in_the_step_itself_fails_who_runs_and_the_engine_goes_on(
    run: Callable[..., Running], expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = run()
    real, broken = running.scheduler.advance, threading.Event()

    def advance(*args: Any) -> None:
        if not broken.is_set():
            broken.set()
            raise ZeroDivisionError
        real(*args)

    monkeypatch.setattr(running.scheduler, "advance", advance)
    running.submit("a", "a")
    assert str(running.ending("a").error) == "the step failed (ZeroDivisionError)"
    running.submit("b", "b")
    assert running.tokens("b") == expected["b"]


def test_events_that_cannot_be_published_do_not_stop_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab()

    def publish(events: list[Event]) -> None:
        raise RuntimeError("the loop is closed")

    with monkeypatch.context() as patched:
        patched.setattr(lab.engine, "_publish", publish)
        ask(lab, "base")
        lab.run()
    assert lab.engine.pending == 0
    ask(lab, "a")
    lab.run()
    assert lab.finished("a")


def test_a_leak_is_reported_once_the_engine_is_idle(logs: list[Any]) -> None:
    lab = new_lab()
    lab.scheduler.pages.allocate(1)
    ask(lab, "base")
    for _ in range(20):
        lab.turn()
    assert "the engine is idle and something is still held" in {line["event"] for line in logs}
    assert lab.finished("base")


# ---- loading ----


def test_a_failed_load_is_told_to_every_waiter_and_tried_again_by_the_next(
    run: Callable[..., Running], expected: dict[str, list[int]]
) -> None:
    gate = Gate()
    gate.error = AdapterError("lora_A", "is torn")
    running = run(gate)
    for i in range(4):
        running.submit(f"{i}", "a")
    running.submit("base")
    assert running.tokens("base") == expected["base"]  # nobody else waits for a slow load
    assert len(gate.loads) == 1
    assert running.engine.residency(DIGESTS["a"]) == ("loading", None)
    gate.open.set()
    assert {str(running.ending(f"{i}").error) for i in range(4)} == {"lora_A: is torn"}
    assert running.engine.residency(DIGESTS["a"]) == ("failed", "lora_A: is torn")
    gate.error = None
    running.submit("again", "a")
    assert running.tokens("again") == expected["a"]
    assert len(gate.loads) == 2


def test_a_load_that_meets_a_defect_says_so_without_its_words(run: Callable[..., Running]) -> None:
    gate = Gate()
    gate.error = OSError("/secret/path")
    gate.open.set()
    running = run(gate)
    running.submit("a", "a")
    assert str(running.ending("a").error) == "the adapter could not be loaded (OSError)"


def test_an_evicted_adapter_comes_back_from_host_memory(run: Callable[..., Running], expected: dict[str, list[int]]) -> None:
    gate = Gate()
    gate.open.set()
    running = run(gate, slots=1)
    for turn in range(2):
        for name in ("a", "b"):
            running.submit(f"{name}{turn}", name)
            assert running.tokens(f"{name}{turn}") == expected[name]
    assert running.observer.evictions == 3
    assert Counter(gate.loads) == {DIGESTS["a"]: 1, DIGESTS["b"]: 1}
    assert running.engine.stats().host_cache_bytes == 2 * ADAPTERS["a"].nbytes


# ---- warming and unloading ----


def test_residency_from_stored_to_resident_and_back(run: Callable[..., Running]) -> None:
    gate = Gate()
    running = run(gate)
    engine, digest = running.engine, DIGESTS["a"]
    assert engine.residency(digest) == ("stored", None)
    warmed = engine.warm((digest,))
    assert gate.asked.wait(WAIT)
    assert engine.residency(digest) == ("loading", None)
    assert not warmed.done()
    gate.open.set()
    assert warmed.result(WAIT) is None
    assert engine.residency(digest) == ("resident", None)
    assert engine.warm((digest,)).result(WAIT) is None
    assert engine.unload(digest) is True
    assert engine.residency(digest) == ("stored", None)
    assert engine.unload(digest) is False
    assert running.runner.sites.attached == ()


def test_unloading_drops_host_memory_and_shared_prefixes_too(
    run: Callable[..., Running], expected: dict[str, list[int]]
) -> None:
    gate = Gate()
    gate.open.set()
    running = run(gate)
    for turn in range(2):
        running.submit(f"{turn}", "kv")
        assert running.tokens(f"{turn}") == expected["kv"]
        assert running.engine.unload(DIGESTS["kv"]) is True
        running.wait(lambda: running.scheduler.pages.used == 0)
    assert gate.loads == [DIGESTS["kv"]] * 2


def test_warming_several_is_done_when_the_last_is_there(run: Callable[..., Running]) -> None:
    running = run()
    digests = tuple(DIGESTS[name] for name in ("a", "b", "kv"))
    running.engine.warm(digests).result(WAIT)
    assert {running.engine.residency(digest)[0] for digest in digests} == {"resident"}


def test_warming_tells_the_first_thing_that_went_wrong(run: Callable[..., Running]) -> None:
    def load(digest: Digest) -> Adapter:
        if digest == DIGESTS["b"]:
            raise NotFoundError("the adapter is gone")
        return KNOWN[digest]

    running = run(load)
    with pytest.raises(NotFoundError, match="the adapter is gone"):
        running.engine.warm((DIGESTS["a"], DIGESTS["b"])).result(WAIT)


def test_warming_what_the_device_does_not_take_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab()
    breaking(lab, monkeypatch, lambda change: isinstance(change, Put))
    future = lab.engine.warm((DIGESTS["a"],))
    for _ in range(4):
        lab.turn()
    with pytest.raises(GenerationError, match="could not be put on the device"):
        future.result(0)


@pytest.mark.parametrize("when", ["before it is taken in", "while it loads"])
def test_a_caller_who_gives_up_warming_harms_nobody(
    when: str, run: Callable[..., Running], expected: dict[str, list[int]]
) -> None:
    gate = Gate()
    running = run(gate, start=False)
    future = running.engine.warm((DIGESTS["a"],))
    if when == "before it is taken in":
        assert future.cancel()
        running.engine.start()
    else:
        running.engine.start()
        assert gate.asked.wait(WAIT)
        future.cancel()
    gate.open.set()
    running.submit("a", "a")
    assert running.tokens("a") == expected["a"]


def test_an_adapter_in_use_is_not_unloaded() -> None:
    lab = new_lab()
    ask(lab, "a")
    for _ in range(4):
        lab.turn()
    answers: list[bool] = []
    asker = threading.Thread(target=lambda: answers.append(lab.engine.unload(DIGESTS["a"])))
    asker.start()
    while asker.is_alive():
        if lab.engine._inbox:
            lab.turn()
            asker.join()
    assert answers == [False]
    assert lab.scheduler.residency.resident == (DIGESTS["a"],)
    lab.run()
    assert lab.finished("a")


def test_an_unload_that_breaks_tells_its_caller(run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    running = run()
    running.engine.warm((DIGESTS["a"],)).result(WAIT)

    def apply(*args: Any) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patched:
        patched.setattr(running.runner, "apply", apply)
        with pytest.raises(RuntimeError, match="the device is gone"):
            running.engine.unload(DIGESTS["a"])
    running.submit("base")
    assert running.tokens("base")


# ---- stopping ----


def test_stop_ends_who_runs_who_waits_and_who_was_not_looked_at_yet(run: Callable[..., Running]) -> None:
    gate = Gate()
    running = run(gate, running=2)
    running.submit("runs", new=150)
    running.submit("loads", "a")
    running.started("runs")
    assert gate.asked.wait(WAIT)
    with running.engine._inbox.lock:  # the engine cannot look into its inbox before it is told to stop
        for i in range(5):
            running.submit(f"inbox {i}")
        running.engine._inbox.closed = True
    gate.open.set()
    running.engine.stop()
    assert running.engine.pending == 0
    for id in ("runs", "loads", *(f"inbox {i}" for i in range(5))):
        assert isinstance(running.ending(id).error, UnavailableError)


def test_after_stop_everything_is_refused_and_nothing_hangs(run: Callable[..., Running]) -> None:
    running = run()
    running.engine.warm((DIGESTS["a"],)).result(WAIT)
    running.engine.stop()
    running.engine.stop()
    with pytest.raises(UnavailableError, match="shutting down"):
        running.submit("late")
    with pytest.raises(UnavailableError, match="shutting down"):
        running.engine.warm((DIGESTS["b"],)).result(0)
    assert running.engine.unload(DIGESTS["a"]) is False
    running.engine.cancel("late")
    assert running.events == []


def test_stop_fails_those_who_wait_for_a_warm_adapter(run: Callable[..., Running]) -> None:
    gate = Gate()
    running = run(gate)
    future = running.engine.warm((DIGESTS["a"],))
    assert gate.asked.wait(WAIT)
    stopper = threading.Thread(target=running.engine.stop)
    stopper.start()
    with pytest.raises(UnavailableError):
        future.result(WAIT)
    gate.open.set()
    stopper.join(WAIT)


def test_an_engine_that_was_never_started_ends_its_requests_too(run: Callable[..., Running]) -> None:
    running = run(start=False)
    running.submit("a", "a")
    future = running.engine.warm((DIGESTS["a"],))
    running.engine.stop()
    assert isinstance(running.ending("a").error, UnavailableError)
    assert isinstance(future.exception(0), UnavailableError)


def test_many_threads_submit_and_cancel_until_the_engine_stops(run: Callable[..., Running]) -> None:
    """Accepted or refused, each request hears of its end exactly once; the fixture checks the rest."""
    running = run(running=4, waiting=20, slots=2)
    accepted: list[str] = []
    stop_at = threading.Barrier(4, timeout=WAIT)

    def client(number: int) -> None:
        choice = random.Random(number)
        for i in range(25):
            if i == 20:
                stop_at.wait()
            id = f"{number}-{i}"
            name = choice.choice(["base", *ADAPTERS])
            try:
                running.submit(id, *([] if name == "base" else [name]), new=choice.randint(1, 6))
            except (OverloadedError, UnavailableError):
                continue
            accepted.append(id)
            if choice.random() < 0.4:
                running.engine.cancel(choice.choice(accepted))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    for each in clients:
        each.start()
    stop_at.wait()
    running.engine.stop()
    for each in clients:
        each.join(WAIT)
    assert {event.request_id for event in running.events} == set(accepted)


def test_errors_of_the_engine_are_of_the_tree(run: Callable[..., Running]) -> None:
    """What reaches a client is never a bare exception."""
    gate = Gate()
    gate.error = KeyError("x")
    gate.open.set()
    running = run(gate)
    running.submit("a", "a")
    assert isinstance(running.ending("a").error, AdapterdError)
