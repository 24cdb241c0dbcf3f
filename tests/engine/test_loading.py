"""Loading: off the caller's thread, one answer per load, a host cache that stays within its bytes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from queue import Queue

import pytest
import torch

from adapters_store.digest import Digest
from server.engine.backoff import Backoff
from server.engine.loading import HostCache, Loading
from server.errors import AdapterdError, AdapterError, GenerationError
from server.methods.base import Adapter, Part

Answer = tuple[Digest, Adapter | AdapterdError, float]


def adapter(name: str, nbytes: int = 100) -> Adapter:
    weight = torch.zeros(nbytes, dtype=torch.uint8)
    return Adapter(Digest.of(name.encode()), (Part("bitfit", "bitfit", {"m": {"delta": weight}}),))


A, B, C = (adapter(name) for name in "abc")


# ---- the host cache ----


def test_the_least_recently_used_adapter_goes_first() -> None:
    cache = HostCache(250)
    cache.put(A)
    cache.put(B)
    assert cache.get(A.digest) is A
    cache.put(C)
    assert [cache.get(each.digest) for each in (A, B, C)] == [A, None, C]
    assert cache.nbytes == 200


def test_an_adapter_over_the_limit_is_not_kept_and_costs_nobody_its_place() -> None:
    cache = HostCache(250)
    cache.put(A)
    cache.put(adapter("huge", 251))
    assert (cache.get(A.digest), cache.nbytes) == (A, 100)


def test_a_limit_of_zero_keeps_nothing() -> None:
    cache = HostCache(0)
    cache.put(A)
    assert (cache.get(A.digest), cache.nbytes) == (None, 0)


def test_the_same_adapter_counts_once() -> None:
    cache = HostCache(1000)
    cache.put(A)
    cache.put(A)
    assert cache.nbytes == 100
    cache.discard(A.digest)
    cache.discard(A.digest)
    assert (cache.get(A.digest), cache.nbytes) == (None, 0)


def test_threads_never_see_more_than_the_limit() -> None:
    cache, seen = HostCache(500), []
    adapters = [adapter(str(i)) for i in range(20)]

    def work(offset: int) -> None:
        for i in range(300):
            cache.put(adapters[(i * 7 + offset) % 20])
            cache.get(adapters[i % 20].digest)
            cache.discard(adapters[(i + offset) % 20].digest)
            with cache._lock:
                seen.append(cache.nbytes)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(seen) <= 500
    assert cache.nbytes == sum(each.nbytes for each in adapters if cache.get(each.digest) is not None)


# ---- loading ----


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    def __init__(self, load: Callable[[Digest], Adapter], limit: int = 0) -> None:
        self.answers: Queue[Answer] = Queue()
        self.cache = HostCache(limit)
        self.clock = Clock()
        self.loading = Loading(load, self.cache, lambda *answer: self.answers.put(answer), backoff=Backoff(self.clock))

    def load(self, digest: Digest) -> Adapter | AdapterdError:
        self.loading.start(digest)
        found, result, seconds = self.answers.get(timeout=30)
        assert found == digest
        assert seconds >= 0
        return result


def test_loads_run_on_another_thread() -> None:
    threads: list[threading.Thread] = []

    def load(digest: Digest) -> Adapter:
        threads.append(threading.current_thread())
        return A

    bench = Bench(load)
    assert bench.load(A.digest) is A
    assert threads[0] is not threading.current_thread()
    bench.loading.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has one priority")
def test_loads_give_way_to_steps() -> None:
    """The engine's thread is as nice as it was."""
    nice: list[int] = []

    def load(digest: Digest) -> Adapter:
        nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return A

    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    bench = Bench(load)
    bench.load(A.digest)
    assert nice == [19]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
    bench.loading.stop()


def test_a_second_load_is_answered_by_the_cache() -> None:
    loads: list[Digest] = []

    def load(digest: Digest) -> Adapter:
        loads.append(digest)
        return A

    bench = Bench(load, limit=1000)
    assert bench.load(A.digest) is bench.load(A.digest)
    assert len(loads) == 1
    bench.cache.discard(A.digest)
    bench.load(A.digest)
    assert len(loads) == 2
    bench.loading.stop()


def test_a_refusal_is_passed_on_as_it_is_and_a_defect_by_its_type() -> None:
    refusal, defect = AdapterError("r", "too large"), MemoryError("secret path /home/x")
    errors: dict[Digest, Exception] = {A.digest: refusal, B.digest: defect}

    def load(digest: Digest) -> Adapter:
        raise errors[digest]

    bench = Bench(load, limit=1000)
    assert bench.load(A.digest) is refusal
    failure = bench.load(B.digest)
    assert isinstance(failure, GenerationError)
    assert str(failure) == "the adapter could not be loaded (MemoryError)"
    assert failure.__cause__ is defect
    assert bench.cache.nbytes == 0
    bench.loading.stop()


def test_an_answer_is_given_once_even_if_its_receiver_raises() -> None:
    calls: list[Digest] = []

    def done(digest: Digest, result: Adapter | AdapterdError, seconds: float) -> None:
        calls.append(digest)
        raise RuntimeError("the receiver's own fault")

    loading = Loading(lambda digest: A, HostCache(0), done)
    loading.start(A.digest)
    loading.stop()
    assert calls == [A.digest]


def test_a_broken_adapter_asked_for_1000_times_is_read_a_few_times() -> None:
    loads: list[Digest] = []
    broken = True

    def load(digest: Digest) -> Adapter:
        loads.append(digest)
        if broken:
            raise AdapterError("lora_A", "is torn")
        return A

    bench = Bench(load)
    answers = [bench.load(A.digest) for _ in range(1000)]
    assert {str(answer) for answer in answers} == {"lora_A: is torn"}
    assert len(loads) == 2
    assert isinstance(bench.load(B.digest), AdapterError)
    assert loads[2:] == [B.digest]
    bench.clock.now += 1
    broken = False
    assert bench.load(A.digest) is A
    assert bench.load(A.digest) is A
    bench.loading.stop()


def test_an_upload_mends_what_could_not_be_read() -> None:
    def load(digest: Digest) -> Adapter:
        raise AdapterError("lora_A", "is torn")

    bench = Bench(load, limit=1000)
    for _ in range(5):
        bench.load(A.digest)
    bench.loading.keep(A)
    assert bench.load(A.digest) is A
    bench.loading.stop()


@pytest.mark.parametrize("times", [1, 2])
def test_a_load_without_memory_drops_the_host_cache_and_is_tried_again(times: int) -> None:
    cached: list[int] = []

    def load(digest: Digest) -> Adapter:
        cached.append(bench.cache.nbytes)
        if len(cached) <= times:
            raise MemoryError
        return A

    bench = Bench(load, limit=1000)
    bench.loading.keep(B)
    found = bench.load(A.digest)
    assert cached == [B.nbytes, 0]
    assert found is A if times == 1 else str(found) == "the adapter could not be loaded (MemoryError)"
    bench.loading.stop()


def test_slow_loads_do_not_hold_up_each_other() -> None:
    both = threading.Barrier(2, timeout=30)

    def load(digest: Digest) -> Adapter:
        both.wait()
        return A

    bench = Bench(load)
    bench.loading.start(A.digest)
    bench.loading.start(B.digest)
    assert {bench.answers.get(timeout=30)[0] for _ in range(2)} == {A.digest, B.digest}
    bench.loading.stop()


def test_stop_waits_for_what_runs_and_drops_what_has_not_begun() -> None:
    begun, go = threading.Event(), threading.Event()

    def load(digest: Digest) -> Adapter:
        begun.set()
        go.wait(30)
        return A

    answers: list[Digest] = []
    loading = Loading(load, HostCache(0), lambda digest, *rest: answers.append(digest), workers=1)
    loading.start(A.digest)
    loading.start(B.digest)
    assert begun.wait(30)
    stopper = threading.Thread(target=loading.stop)
    stopper.start()
    go.set()
    stopper.join(30)
    assert answers in ([A.digest], [A.digest, B.digest])
    with pytest.raises(RuntimeError):
        loading.start(C.digest)
