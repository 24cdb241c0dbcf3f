"""An adapter's life in a running engine: loaded once, warmed, evicted, unloaded; whoever waits for it hears how that ended."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from adapters_store.digest import Digest
from server.errors import AdapterError, NotFoundError
from server.methods.base import Adapter
from tests.engine.running import ADAPTERS, DIGESTS, KNOWN, WAIT, Gate, Running, ask, new_lab

pytestmark = pytest.mark.usefixtures("one_thread", "logs")


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


@pytest.mark.parametrize("deleted", [True, False])
def test_who_asks_for_an_adapter_after_it_was_deleted_leaves_nothing_of_it(
    deleted: bool, run: Callable[..., Running], expected: dict[str, list[int]]
) -> None:
    """It was found by name before; an adapter that was only unloaded may come back."""
    running = run()
    running.engine.unload(DIGESTS["a"], deleted=deleted)
    running.submit("a", "a")
    assert running.tokens("a") == expected["a"]
    running.submit("behind it")  # a request later, whoever had to go is gone
    assert running.tokens("behind it") == expected["base"]
    assert running.engine.residency(DIGESTS["a"])[0] == ("stored" if deleted else "resident")


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
