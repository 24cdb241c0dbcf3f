"""A pass that breaks: only culprits fail, at a bounded cost; what was too large goes in smaller passes for a while."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from adapters_store.digest import Digest
from server.engine.passes import CALM, MOST_CALM, PassSize, Suspects, _halves, _sized
from server.engine.plan import Row
from server.engine.plan import Sequence as Seq
from server.errors import GenerationError
from server.memory import out_of_memory
from server.methods.base import Adapter, Part
from server.requests import FinishReason
from tests.lab import Lab
from tests.tiny import tiny_model

ROWS = 64
PROMPT = [5, 9, 33, 60, 12]
A = Adapter(Digest.of(b"a"), (Part("bitfit", "bitfit", {"model.layers.0.mlp.down_proj": {"delta": torch.ones(32)}}),))
B = Adapter(Digest.of(b"b"), (Part("bitfit", "bitfit", {"model.layers.1.mlp.down_proj": {"delta": -torch.ones(32)}}),))
EXHAUSTED = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Failures are provoked here by the dozen, and printing them all takes long."""
    with capture_logs():
        yield


def new_lab(**options: Any) -> Lab:
    return Lab(tiny_model("llama"), {A.digest: A, B.digest: B}, blocks=2049, **{"max_batch_tokens": 512, **options})


def break_when(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, guilty: Callable[[Sequence[Row]], bool], error: Exception
) -> list[int]:
    """Let the forward pass raise for such rows; returns the tokens of each pass that was tried."""
    real, sizes = lab.runner.run, list[int]()

    def run(rows: Sequence[Row]) -> Any:
        sizes.append(sum(row.count for row in rows))
        if guilty(rows):
            raise error
        return real(rows)

    monkeypatch.setattr(lab.runner, "run", run)
    return sizes


def named(*ids: str) -> Callable[[Sequence[Row]], bool]:
    return lambda rows: any(row.sequence.request is not None and row.sequence.request.id in ids for row in rows)


def together(*ids: str) -> Callable[[Sequence[Row]], bool]:
    """Rows that fail only in each other's company."""
    return lambda rows: all(named(id)(rows) for id in ids)


def larger_than(tokens: int) -> Callable[[Sequence[Row]], bool]:
    return lambda rows: sum(row.count for row in rows) > tokens


def failed(lab: Lab) -> set[str]:
    return {event.request_id for event in lab.events if event.finish is FinishReason.ERROR}


@pytest.fixture(scope="module")
def answer() -> list[int]:
    lab = new_lab()
    lab.submit("alone", PROMPT)
    lab.run()
    return lab.tokens("alone")


# ---- culprits ----


@pytest.mark.parametrize("culprits", [("7",), ("0", "63"), ("31", "32"), ("5", "6", "7", "40")])
def test_of_64_rows_only_the_culprits_fail_and_finding_them_costs_little(
    culprits: tuple[str, ...], answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab()
    sizes = break_when(lab, monkeypatch, named(*culprits), ValueError("odd"))
    for i in range(ROWS):
        lab.submit(f"{i}", PROMPT)
    lab.turn()
    assert len(sizes) <= 2 * len(culprits) * math.log2(ROWS) + 1
    lab.run()
    assert failed(lab) == set(culprits)
    assert all(lab.tokens(f"{i}") == answer for i in range(ROWS) if f"{i}" not in culprits)
    assert lab.engine._passes.size.limit is None  # nobody is slowed by what one of them did


def test_a_step_in_which_everything_breaks_ends_everybody_at_twice_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab()
    sizes = break_when(lab, monkeypatch, lambda rows: True, ValueError())
    for i in range(ROWS):
        lab.submit(f"{i}", PROMPT)
    lab.run()
    assert len(failed(lab)) == ROWS
    assert len(sizes) == 2 * ROWS - 1


def test_an_adapter_that_keeps_breaking_steps_runs_apart_until_it_goes_well(
    answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab()
    lab.engine.warm((A.digest,))
    for _ in range(3):
        lab.turn()
    for i in range(ROWS - 1):
        lab.submit(f"{i}", PROMPT, max_new_tokens=20)
    lab.turn()
    with monkeypatch.context() as patched:
        sizes = break_when(lab, patched, lambda rows: any(A.digest in row.sequence.adapters for row in rows), ValueError())
        costs = []
        for again in range(4):
            lab.submit(f"bad {again}", PROMPT, A.digest)
            lab.turn()
            costs.append(len(sizes))
            sizes.clear()
    assert costs[0] > 2
    assert costs[1:] == [2, 2, 2]  # everybody else in one pass, the suspect in another
    lab.submit("good", PROMPT, A.digest)
    lab.run()
    assert failed(lab) == {f"bad {again}" for again in range(4)}
    assert lab.finished("good")
    assert not lab.engine._passes.suspects._digests
    assert all(lab.tokens(f"{i}")[:6] == answer for i in range(ROWS - 1))


def test_suspects_are_bounded() -> None:
    suspects = Suspects()
    rows = [Row(Seq(None, (Digest(f"{n:064x}"),), b"", 0, [1], 1), 0, 1) for n in range(300)]
    for row in rows:
        suspects.blame(row)
    assert sum(row in suspects for row in rows) == 256
    assert rows[-1] in suspects
    suspects.clear(rows)
    assert not any(row in suspects for row in rows)


def test_rows_that_break_only_in_company_all_succeed_and_are_kept_apart(
    answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab()
    sizes = break_when(lab, monkeypatch, together("20", "21"), ValueError("a pair"))
    for i in range(ROWS):
        lab.submit(f"{i}", PROMPT, max_new_tokens=6)
    lab.turn()
    assert len(sizes) <= 4 * math.log2(ROWS) + 1
    lab.run()
    assert failed(lab) == set()
    assert all(lab.tokens(f"{i}") == answer for i in range(ROWS))
    assert set(lab.observer.failed_passes) == {"error"}


# ---- memory ----


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda error: type(error).__name__)
def test_a_step_that_does_not_fit_is_made_smaller_and_nobody_fails(
    error: Exception, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab()
    sizes = break_when(lab, monkeypatch, larger_than(40), error)
    for i in range(ROWS):
        lab.submit(f"{i}", PROMPT)
    lab.submit("long", PROMPT * 20)
    lab.run()
    assert failed(lab) == set()
    assert all(lab.tokens(f"{i}") == answer for i in range(ROWS))
    alone = new_lab()
    alone.submit("long", PROMPT * 20)
    alone.run()
    assert lab.tokens("long") == alone.tokens("long")
    assert max(sizes) > 40
    assert set(lab.observer.failed_passes) == {"memory"}


def test_later_steps_are_small_from_the_start_and_grow_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab()
    with monkeypatch.context() as patched:
        break_when(lab, patched, larger_than(40), MemoryError())
        for i in range(ROWS):
            lab.submit(f"{i}", PROMPT, max_new_tokens=100)
        lab.turn()
    limit = lab.engine._passes.size.limit
    assert limit is not None
    assert limit <= 40
    failures = len(lab.observer.failed_passes)
    sizes = break_when(lab, monkeypatch, lambda rows: False, MemoryError())
    lab.turn()
    assert max(sizes) <= limit
    for _ in range(CALM * 2):
        lab.turn()
    assert max(sizes) > limit
    assert len(lab.observer.failed_passes) == failures
    assert sizes[-1] == ROWS


@pytest.mark.parametrize("more", [{}, {"speculate": 4}])
def test_a_row_that_does_not_fit_even_alone_fails_alone(
    more: dict[str, int], answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab(**more)
    sizes = break_when(lab, monkeypatch, named("huge"), MemoryError())
    lab.submit("huge", PROMPT)
    for i in range(7):
        lab.submit(f"{i}", PROMPT)
    lab.run()
    assert failed(lab) == {"huge"}
    assert str(lab.ending("huge").error) == "the step failed (MemoryError)"
    assert isinstance(lab.ending("huge").error, GenerationError)
    assert all(lab.tokens(f"{i}") == answer for i in range(7))
    assert 1 in sizes  # down to a single position
    assert lab.engine._passes.size.limit is None


def test_before_a_position_fails_idle_adapters_and_the_host_cache_make_room(
    answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab()
    lab.engine.warm((A.digest, B.digest))
    for _ in range(4):
        lab.turn()
    lab.engine.keep(A)
    resident = lab.scheduler.residency
    assert set(resident.resident) == {A.digest, B.digest}
    lab.submit("b", PROMPT, B.digest, max_new_tokens=30)
    lab.turn()
    break_when(lab, monkeypatch, lambda rows: resident.is_resident(A.digest), MemoryError())
    lab.submit("base", PROMPT)
    lab.run()
    assert failed(lab) == set()
    assert lab.tokens("base") == answer
    assert resident.resident == (B.digest,)  # somebody runs on it
    assert lab.engine._cache.nbytes == 0


def test_guesses_are_given_up_before_a_row_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that verifies guesses is larger than one without: that one fits."""
    lab = new_lab(speculate=4)
    prompt = [5, 9, 33] * 8
    lab.submit("s", prompt, max_new_tokens=24)
    lab.turn()
    break_when(lab, monkeypatch, lambda rows: any(row.draft for row in rows), MemoryError())
    lab.run()
    plain = new_lab()
    plain.submit("s", prompt, max_new_tokens=24)
    plain.run()
    assert lab.tokens("s") == plain.tokens("s")
    assert lab.observer.failed_passes


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda error: type(error).__name__)
def test_what_says_that_memory_ran_out(error: Exception) -> None:
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes do not match"))
    assert not out_of_memory(ValueError("out of memory"))


# ---- sizes ----


def test_a_size_halves_and_doubles_back_and_is_patient_after_many_failures() -> None:
    size = PassSize(512)

    def steps(limit: int | None) -> int:
        for count in itertools.count(1):
            size.stepped()
            if size.limit == limit:
                return count
        raise AssertionError

    size.shrink(400)
    assert size.limit == 200
    size.shrink(300)  # another pass of the same step: no less than needed
    assert size.limit == 150
    assert [steps(300), steps(None)] == [CALM, CALM - 1]
    for _ in range(10):
        size.shrink(400)
        size.stepped()
    assert steps(None) > 1
    size.shrink(400)
    assert MOST_CALM < steps(None) <= 2 * MOST_CALM  # 200, 400, all
    size.shrink(1)
    assert size.limit == 1


def row(count: int, start: int = 0, draft: tuple[int, ...] = ()) -> Row:
    return Row(Seq(None, (), b"", 0, [7] * (start + count - len(draft)), start + count - len(draft)), start, count, draft)


def test_passes_hold_every_position_once_and_no_more_than_they_may() -> None:
    rows = [row(1, 8), row(1, 3), row(11), row(4, 20), row(3, 5, draft=(1, 2)), row(1, 2)]
    batches = list(_sized(rows, 4))
    assert all(sum(piece.count for piece in batch) <= 4 for batch in batches)
    assert all(len({id(piece.sequence) for piece in batch}) == len(batch) for batch in batches)
    pieces = [piece for batch in batches for piece in batch]
    for given in rows:
        own = [piece for piece in pieces if piece.sequence is given.sequence]
        assert [at for piece in own for at in range(piece.start, piece.start + piece.count)] == [
            *range(given.start, given.start + given.count)
        ]
    ((guessless,),) = _sized([row(3, 5, draft=(1, 2))], 2)
    assert (guessless.count, guessless.draft) == (1, ())


def test_halves_of_many_of_a_prompt_of_guesses_and_of_one_position() -> None:
    many = [row(1), row(2), row(3)]
    assert _halves(many) == (many[:1], many[1:])
    first, second = _halves([row(5, 10)])
    assert [(piece.start, piece.count) for piece in (*first, *second)] == [(10, 3), (13, 2)]
    ((plain,),) = _halves([row(3, 5, draft=(1, 2))])
    assert (plain.start, plain.count, plain.draft) == (5, 1, ())
    lone = row(1, 4)
    assert _halves([lone]) == ([lone],)
