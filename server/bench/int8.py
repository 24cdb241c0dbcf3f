"""`adapterd bench-int8`: what rounding the base's linear layers to eight bits costs in accuracy and gives in speed.

Owns both bases, side by side in this process, and the text they are tried on. Scores and decodes through the runner that
serves; no engine, no HTTP, no adapters.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import torch
from rich.table import Table
from transformers import AutoTokenizer

from ..engine.plan import Row
from ..engine.plan import Sequence as Seq
from ..methods import build_methods
from ..model.kernels import choose_kernels
from ..model.loader import load_base
from ..model.runner import CacheShape, Runner
from ..requests import Request, Sampling
from ..settings import default_home
from .machine import CpuClock, foreign_cpus, is_disturbed
from .options import BenchError
from .results import Comparison, Round

BLOCK = 16
WINDOW = 512  # tokens that are scored together; each window's first has nothing before it
PROMPT, NEW = 128, 32  # tokens per row of a round
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Int8Report:
    """Both bases on the same text and the same rows. `speed` compares decoding: A is int8, B the base as it is."""

    tokens: int  # scored
    perplexity: float
    int8_perplexity: float
    logprob_change: float  # mean of |difference| over the scored tokens
    base_bytes: int
    int8_bytes: int
    rows: int
    kernels: str
    speed: Comparison


def prose() -> str:
    """Six short pieces of plain English, written for this purpose: no model can have been trained on them."""
    return files(__package__).joinpath("prose.txt").read_text(encoding="utf-8")


def compare_int8(directory: Path, text: str, rows: int, rounds: int, say: Callable[[str], None]) -> Int8Report:
    """Raises: BenchError for a text too short to be scored."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    ids: list[int] = AutoTokenizer.from_pretrained(directory, local_files_only=True)(text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise BenchError("the text has fewer than 2 tokens")
    whole, small = (Subject(directory, rows, int8, say) for int8 in (False, True))
    logprobs, small_logprobs = whole.logprobs(ids), small.logprobs(ids)
    changes = [abs(a - b) for a, b in zip(logprobs, small_logprobs, strict=True)]
    return Int8Report(
        tokens=len(logprobs),
        perplexity=math.exp(-fmean(logprobs)),
        int8_perplexity=math.exp(-fmean(small_logprobs)),
        logprob_change=fmean(changes),
        base_bytes=whole.nbytes,
        int8_bytes=small.nbytes,
        rows=rows,
        kernels=small.kernels,
        speed=_race(small, whole, ids, rounds),
    )


class Subject:
    """One base and the runner over it."""

    def __init__(self, directory: Path, rows: int, int8: bool, say: Callable[[str], None]) -> None:
        kernels = choose_kernels(_CPU, torch.float32, True, default_home(), say, BLOCK, int8=int8)
        base = load_base(directory, _CPU, torch.float32, kernels.prepare, kernels.int8)
        self.kernels, self.nbytes, self._rows = kernels.name, base.nbytes, rows
        self._blocks = -(-max(WINDOW, PROMPT + NEW) // BLOCK)
        methods = build_methods(kernels.lora, kernels.linear, kernels.bottleneck)
        shape = CacheShape(1 + rows * self._blocks, BLOCK)
        self._runner = Runner(base, shape, methods, kernels)

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Of every token but the first of each window."""
        found: list[float] = []
        for first in range(0, len(ids) - 1, WINDOW):
            window = ids[first : first + WINDOW]
            sequence = self._sequence(0, window, Sampling(1, prompt_logprobs=True))
            sample = self._runner.run([Row(sequence, 0, len(window))])[sequence]
            found += [token.logprob for token in sample.prompt if token.logprob is not None]
        return found

    def tokens_per_second(self, ids: Sequence[int]) -> float:
        """Decoding, after rows of other parts of `ids` were prefilled."""
        starts = [row * PROMPT % max(1, len(ids) - PROMPT) for row in range(self._rows)]
        sequences = [self._sequence(row, ids[at : at + PROMPT], Sampling(NEW)) for row, at in enumerate(starts)]
        self._step(sequences)
        begun = time.perf_counter()
        for _ in range(NEW):
            self._step(sequences)
        return NEW * self._rows / (time.perf_counter() - begun)

    def _step(self, sequences: Sequence[Seq]) -> None:
        """Everything that is not computed yet, and the next token of each."""
        samples = self._runner.run([Row(sequence, sequence.done, sequence.remaining) for sequence in sequences])
        for sequence in sequences:
            token = samples[sequence].token
            if token is None:
                raise BenchError("the base gives no finite logits")
            sequence.done = len(sequence.ids)
            sequence.ids.append(token.id)

    def _sequence(self, row: int, ids: Sequence[int], sampling: Sampling) -> Seq:
        request = Request(f"row {row}", "bench", (), tuple(ids), sampling)
        first = 1 + row * self._blocks  # block 0 is nobody's
        return Seq(request, (), b"", 0, list(ids), len(ids), blocks=list(range(first, first + self._blocks)))


def _race(a: Subject, b: Subject, ids: Sequence[int], rounds: int) -> Comparison:
    """Turn and turn about, each side first in every other round, after one that does not count."""
    played: list[Round] = []
    for index in range(rounds + 1):
        begun = CpuClock.read(0.0)
        speeds = {subject: subject.tokens_per_second(ids) for subject in ((a, b) if index % 2 else (b, a))}
        foreign = foreign_cpus(begun, CpuClock.read(0.0))
        played.append(Round(speeds[a], speeds[b], foreign, is_disturbed(foreign)))
    return Comparison("int8", "as it is", tuple(played[1:]))


def render_int8(report: Int8Report) -> Table:
    """For people: milliseconds, MB (10^6 bytes), percent."""
    title = f"{report.tokens} tokens scored, {report.rows} rows decoded, kernels: {report.kernels}"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for name in ("", "as it is", "int8", "int8 / as it is"):
        table.add_column(name, justify="left" if not name else "right")
    worse = report.int8_perplexity / report.perplexity
    table.add_row("perplexity", f"{report.perplexity:.3f}", f"{report.int8_perplexity:.3f}", f"{worse:.4f}")
    size = report.int8_bytes / report.base_bytes
    table.add_row("weights", f"{report.base_bytes / 1e6:.0f} MB", f"{report.int8_bytes / 1e6:.0f} MB", f"{size:.2f}")
    speed = report.speed
    spread = f"{speed.ratio.median:.2f} ({speed.ratio.least:.2f} to {speed.ratio.most:.2f})"
    table.add_row("decode tokens/s", f"{speed.b.median:.1f}", f"{speed.a.median:.1f}", spread)
    left_out = len(speed.rounds) - len(speed.counted)
    table.caption = f"mean change of a token's logprob {report.logprob_change:.4f}; disturbed rounds left out: {left_out}"
    return table
