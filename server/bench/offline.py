"""`adapterd bench --offline`: rounds of one batch through the base and through adapters, in this process.

Owns which batches are played and what is kept of each. Never prints.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from ..model.pull import console_report, resolve
from ..settings import default_home
from .adapters import make_adapter
from .floor import StepBytes
from .inprocess import Batch, EngineUnderTest
from .machine import CpuClock, Machine, foreign_cpus, is_disturbed, measure_machine
from .offline_report import OfflineReport, Point, Side
from .options import BenchOptions, Family
from .provenance import Provenance
from .results import Comparison, Round
from .scenarios import play_rounds

_WARMUP_TOKENS = 4
_FIRST_IDS = 5  # token ids below are special ones in most vocabularies
_MARGIN = 8  # positions of a sequence beyond prompt, new tokens and prefix


async def offline(options: BenchOptions) -> OfflineReport:
    """Raises: BenchError for a wrong option, or a row that fails."""
    seed = secrets.randbits(32) if options.seed is None else options.seed
    with console_report() as report:
        directory = options.base or resolve(options.model, default_home(), report)
    machine = measure_machine()
    with _engine(options, directory) as ours:
        bench = _Offline(options, ours, seed)
        points = [await bench.point(rows, adapters) for rows, adapters in shapes(options)]
        return OfflineReport(options, Provenance.now(), seed, ours.kernels, faster(machine, measure_machine()), tuple(points))


def faster(one: Machine, other: Machine) -> Machine:
    """Neighbours only ever slow things down: what was seen once is what the machine can do."""
    return replace(
        one,
        read_gb_per_second=max(one.read_gb_per_second, other.read_gb_per_second),
        gemm_gflop_per_second=max(one.gemm_gflop_per_second, other.gemm_gflop_per_second),
    )


def _engine(options: BenchOptions, directory: Path) -> EngineUnderTest:
    tokens = options.prompt_tokens + options.max_new_tokens + options.virtual_tokens + _MARGIN
    slots = max(1, options.adapters)
    return EngineUnderTest.load(
        directory, rows=options.concurrency, tokens=tokens, slots=slots, native=options.native, say=print
    )


def shapes(options: BenchOptions) -> list[tuple[int, int]]:
    """(rows, distinct adapters): those asked for, and with `sweep` the ones on the way there."""
    rows, most = options.concurrency, _distinct(options, options.concurrency)
    if not options.sweep:
        return [(rows, most)]
    along = [(rows, adapters) for adapters in powers(most)]
    across = [(fewer, _distinct(options, fewer)) for fewer in powers(rows)]
    return list(dict.fromkeys([*along, *across]))


def _distinct(options: BenchOptions, rows: int) -> int:
    most = min(options.adapters, 1) if options.popularity == "identical" else options.adapters
    return min(most, rows)


def powers(most: int) -> list[int]:
    """1, 2, 4 ... and `most` itself."""
    return sorted({1 << exponent for exponent in range(most.bit_length())} | {most})


class _Offline:
    """The adapters and the randomness of one run."""

    def __init__(self, options: BenchOptions, ours: EngineUnderTest, seed: int) -> None:
        self._options = options
        self._ours = ours
        self._random = np.random.default_rng((seed, 0))
        self._names = [f"adapter-{index}" for index in range(options.adapters)]
        ours.add({name: self._files(seed, index) for index, name in enumerate(self._names)})

    async def point(self, rows: int, adapters: int) -> Point:
        """Rounds at one shape, after a short batch of each side."""
        sides: tuple[list[str | None], list[str | None]]
        sides = ([self._names[row % adapters] for row in range(rows)] if adapters else [None] * rows, [None] * rows)
        for names in sides:
            self._ours.generate(self._prompts(rows), names, _WARMUP_TOKENS)
        batches: list[tuple[Batch, Batch]] = []
        rounds = await play_rounds(self._options.repeats, lambda index: self._round(index, sides, batches))
        counted = [pair for pair, round in zip(batches, rounds, strict=True) if not round.disturbed] or batches
        prompt_tokens = rows * self._options.prompt_tokens
        label = f"{adapters} adapters ({'+'.join(self._options.families)})"
        return Point(
            rows,
            adapters,
            Comparison(label, "base", rounds),
            adapted=_side([adapted for adapted, _ in counted], prompt_tokens),
            base=_side([base for _, base in counted], prompt_tokens),
            reads=self._reads(adapters),
        )

    async def _round(
        self, index: int, sides: tuple[list[str | None], list[str | None]], batches: list[tuple[Batch, Batch]]
    ) -> Round:
        """Every other round the base goes first, so that neither always follows the other."""
        prompts = self._prompts(len(sides[0]))
        played: dict[int, Batch] = {}
        start = CpuClock.read(0.0)
        for side in (0, 1) if index % 2 == 0 else (1, 0):
            played[side] = self._ours.generate(prompts, sides[side], self._options.max_new_tokens)
        foreign = foreign_cpus(start, CpuClock.read(0.0))
        batches.append((played[0], played[1]))
        return Round(played[0].tokens_per_second, played[1].tokens_per_second, foreign, is_disturbed(foreign))

    def _prompts(self, rows: int) -> list[list[int]]:
        """Random token ids."""
        size = (rows, self._options.prompt_tokens)
        prompts: list[list[int]] = self._random.integers(_FIRST_IDS, self._ours.base.shape.vocab_size, size).tolist()
        return prompts

    def _files(self, seed: int, index: int) -> dict[str, bytes]:
        options = self._options
        family: Family = options.families[index % len(options.families)]
        random = np.random.default_rng((seed, 1, index))
        return make_adapter(
            family,
            self._ours.dimensions,
            random,
            rank=options.rank,
            virtual_tokens=options.virtual_tokens,
            precision=options.precision,
        )

    def _reads(self, adapters: int) -> StepBytes:
        held, as_fp32 = self._ours.step_bytes()
        return StepBytes(held, as_fp32, sum(self._ours.adapter_bytes(name) for name in self._names[:adapters]))


def _side(batches: Sequence[Batch], prompt_tokens: int) -> Side:
    return Side.of(
        [median(batch.step_seconds) for batch in batches], [prompt_tokens / batch.prefill_seconds for batch in batches]
    )
