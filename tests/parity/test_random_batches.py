"""Random batches: whatever arrives when, in chunks of any size, through evictions, preemptions and cancellations, every
answer is the one its adapter gives alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.model.kernels import Kernels
from server.requests import FinishReason, Token
from tests.lab import Lab
from tests.parity.families import FAMILIES
from tests.parity.zoo import OWN, Zoo, make_zoo
from tests.tiny import VOCAB

NEW = 12
#: Some start alike, so that blocks computed for one are found by another of the same adapter.
_TEXT = [5 + 37 * i % (VOCAB - 5) for i in range(40)]
PROMPTS = (_TEXT[:1], _TEXT[:6], _TEXT[:13], [*_TEXT[:13], 7, 8, 9], [*_TEXT[:26], 11], _TEXT, _TEXT[20:31])


@dataclass(frozen=True)
class Arrival:
    """One request: submitted after `turns` more steps, and cancelled `patience` steps later unless that is None."""

    adapter: int  # index into the zoo's names, modulo their number
    prompt: int
    count: int
    turns: int
    patience: int | None


@dataclass(frozen=True)
class Server:
    """The sizes a batch runs in: small enough for preemption and eviction to happen often."""

    blocks: int
    block_size: int
    slots: int
    budget: int
    beside: int  # tokens of a prompt beside streams
    speculate: int
    running: int


ARRIVALS = st.builds(
    Arrival,
    adapter=st.integers(0, 999),
    prompt=st.integers(0, len(PROMPTS) - 1),
    count=st.sampled_from([1, 3, 8, NEW, NEW]),
    turns=st.sampled_from([0, 0, 0, 1, 2]),
    patience=st.none() | st.integers(0, 20),
)
SERVERS = st.builds(
    Server,
    blocks=st.integers(24, 34),
    block_size=st.just(4),
    slots=st.integers(2, 8),
    budget=st.integers(4, 64),
    beside=st.sampled_from([0, 1, 3, 9]),
    speculate=st.sampled_from([0, 0, 1, 4]),
    running=st.integers(3, 12),
)


@dataclass
class Bench:
    """One architecture's zoo on one kind of kernels, with everyone's answer alone, found once."""

    zoo: Zoo
    kernels: Kernels
    alone: dict[tuple[str, int], tuple[Token, ...]] = field(default_factory=dict)
    seen: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("preemptions", "evictions", "cancelled", "cached", "guessed"), 0)
    )

    @property
    def names(self) -> list[str]:
        return ["base", *self.zoo.specimens]

    def solo(self, name: str, prompt: int) -> tuple[Token, ...]:
        if (name, prompt) not in self.alone:
            lab = self.zoo.lab(kernels=self.kernels)
            self._submit(lab, "solo", name, prompt, NEW)
            lab.run()
            self.alone[name, prompt] = answer(lab, "solo")
        return self.alone[name, prompt]

    def play(self, server: Server, arrivals: list[Arrival]) -> None:
        lab = self.zoo.lab(
            kernels=self.kernels,
            blocks=server.blocks,
            block_size=server.block_size,
            slots=server.slots,
            max_batch_tokens=server.budget,
            max_prefill_tokens=server.beside,
            speculate=server.speculate,
            max_running=server.running,
        )
        self._run(lab, arrivals)
        for i, arrival in enumerate(arrivals):
            self._check(lab, str(i), arrival)
        self._count(lab)

    def _run(self, lab: Lab, arrivals: list[Arrival]) -> None:
        leaving: dict[int, list[str]] = {}
        turn = 0

        def step() -> None:
            nonlocal turn
            for id in leaving.pop(turn, ()):
                lab.engine.cancel(id)
            lab.turn()
            turn += 1

        for i, arrival in enumerate(arrivals):
            for _ in range(arrival.turns):
                step()
            self._submit(lab, str(i), self._name(arrival), arrival.prompt, arrival.count)
            if arrival.patience is not None:
                leaving.setdefault(turn + arrival.patience, []).append(str(i))
        while leaving:
            step()
        lab.run()

    def _submit(self, lab: Lab, id: str, name: str, prompt: int, count: int) -> None:
        digests = () if name == "base" else (self.zoo.specimens[name].digest,)
        lab.submit(id, PROMPTS[prompt], *digests, max_new_tokens=count)

    def _name(self, arrival: Arrival) -> str:
        return self.names[arrival.adapter % len(self.names)]

    def _check(self, lab: Lab, id: str, arrival: Arrival) -> None:
        """All of it, or as much as there was before the cancellation."""
        name = self._name(arrival)
        got, solo = answer(lab, id), self.solo(name, arrival.prompt)[: arrival.count]
        finish = lab.ending(id).finish
        if arrival.patience is None or finish is not FinishReason.CANCELLED:
            assert finish is FinishReason.LENGTH, (name, lab.ending(id).error)
            assert len(got) == arrival.count
        for one, other in zip(got, solo, strict=False):
            assert one.id == other.id, (name, arrival)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4), (name, arrival)

    def _count(self, lab: Lab) -> None:
        self.seen["preemptions"] += lab.observer.preemptions
        self.seen["evictions"] += lab.observer.evictions
        self.seen["guessed"] += lab.observer.guessed
        self.seen["cancelled"] += sum(event.finish is FinishReason.CANCELLED for event in lab.events)
        self.seen["cached"] += sum(event.cached_tokens > 0 for event in lab.events if event.finish is not None)


def answer(lab: Lab, id: str) -> tuple[Token, ...]:
    return tuple(token for event in lab.events if event.request_id == id for token in event.tokens)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(request.param, [*FAMILIES, *OWN], tmp_path_factory.mktemp(request.param))


def play(zoo: Zoo, kernels: Kernels, batches: int) -> Mapping[str, int]:
    """Random batches on one zoo; returns how often what they are meant to meet was met."""
    bench = Bench(zoo, kernels)

    @settings(max_examples=batches, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(server=SERVERS, arrivals=st.lists(ARRIVALS, min_size=5, max_size=12))
    def run(server: Server, arrivals: list[Arrival]) -> None:
        bench.play(server, arrivals)

    run()
    return bench.seen


def test_random_batches(zoo: Zoo, kernels: Kernels) -> None:
    seen = play(zoo, kernels, 15)
    assert all(seen.values()), seen


@pytest.mark.slow
def test_three_hundred_random_batches(zoo: Zoo, kernels: Kernels) -> None:
    seen = play(zoo, kernels, 50)  # on three architectures and two kinds of kernels
    assert min(seen.values()) >= 5, seen
