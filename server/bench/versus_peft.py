"""The server against PEFT's generate(adapter_names=...): same base, same LoRA adapters, same prompts, turn and turn about.

Owns the PEFT side: in this process, in fp32, with as many threads as the server says it has, which idles meanwhile. PEFT
and transformers are imported here and only when asked for.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from .adapters import Files
from .machine import CpuClock, foreign_cpus, is_disturbed
from .options import BenchError
from .results import Comparison, Load, Outcome, Round
from .scenarios import Findings, measure_all, play_rounds
from .session import Session
from .workload import Order


@dataclass(frozen=True)
class Batch:
    """One call of generate: `seconds` for all rows, and the new tokens of each."""

    seconds: float
    tokens: tuple[tuple[int, ...], ...]


class PeftModel:
    """The base with all adapters attached, as PEFT holds them."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    def load(cls, base: Path, adapters: Mapping[str, Files]) -> Self:
        """Raises: BenchError when PEFT is not installed."""
        try:
            import peft
        except ImportError as error:
            raise BenchError("`versus_peft` needs PEFT: pip install 'adapterd[test]'") from error
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="adapterd-bench-") as scratch:
            warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers is about to rename
            model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
            directories = {name: _written(Path(scratch) / name, files) for name, files in adapters.items()}
            first = next(iter(directories))
            wrapped: Any = peft.PeftModel.from_pretrained(model, directories.pop(first), adapter_name=first)
            for name, directory in directories.items():
                wrapped.load_adapter(directory, adapter_name=name)
        model.generation_config = cast("Any", GenerationConfig)(do_sample=False, eos_token_id=None, pad_token_id=0)
        return cls(wrapped.eval())

    def generate(self, orders: Sequence[Order]) -> Batch:
        """Every order as one row of one batch; prompts have one length, so nothing is padded."""
        import torch

        prompts = torch.tensor([order.prompt.ids for order in orders])
        names = [order.adapter or "__base__" for order in orders]
        new = orders[0].max_new_tokens
        begun = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), adapter_names=names, max_new_tokens=new
            )
        seconds = time.perf_counter() - begun
        tokens = tuple(tuple(row) for row in out[:, prompts.shape[1] :].tolist())
        if any(len(row) != new for row in tokens):
            raise BenchError(f"PEFT ended after {len(tokens[0])} tokens, not {new}: the two sides would not do the same work")
        return Batch(seconds, tokens)


def _written(directory: Path, files: Files) -> Path:
    directory.mkdir()
    for name, body in files.items():
        (directory / name).write_bytes(body)
    return directory


async def versus_peft(session: Session) -> Findings:
    """Rounds of one batch of `concurrency` rows on the server (A) and in PEFT (B)."""
    async with session.adapters() as names:
        files = {name: session.files(index) for index, name in enumerate(names)}
        _take_threads(session.info.get("threads"))
        model = PeftModel.load(session.base_directory, files)
        await session.warm_up(names)
        duel = _Duel(session, names, model)
        duel.rehearse(await session.prompts(session.options.concurrency))
        rounds = await play_rounds(session.options.repeats, duel.play)
        label = f"PEFT generate(adapter_names), {session.options.concurrency} rows"
        comparison = Comparison("adapterd", label, rounds, same_tokens=duel.same_tokens)
        return Findings(tuple(duel.loads), comparison)


def _take_threads(count: object) -> None:
    """torch's own choice where the server does not tell."""
    import torch

    if isinstance(count, int) and count > 0:
        torch.set_num_threads(count)


class _Duel:
    """Plays rounds, and keeps the server's reports and how many rows came out the same."""

    def __init__(self, session: Session, names: Sequence[str], model: PeftModel) -> None:
        self._session = session
        self._names = names
        self._model = model
        self._rows: list[bool] = []
        self.loads: list[Load] = []

    @property
    def same_tokens(self) -> float:
        return sum(self._rows) / len(self._rows)

    def rehearse(self, prompts: Sequence[Any]) -> None:
        """One short batch, so that PEFT's first round is not its slowest."""
        orders = self._session.orders(prompts, self._names)
        self._model.generate([Order(order.prompt, order.adapter, 2) for order in orders])

    async def play(self, index: int) -> Round:
        session = self._session
        prompts = await session.prompts(session.options.concurrency)  # new ones: the server caches those it has seen
        orders = session.orders(prompts, self._names)
        start = await self._clock()
        if index % 2 == 0:
            load, outcomes = await measure_all(session, orders, f"adapterd, round {index + 1}")
            batch = self._model.generate(orders)
        else:
            batch = self._model.generate(orders)
            load, outcomes = await measure_all(session, orders, f"adapterd, round {index + 1}")
        foreign = foreign_cpus(start, await self._clock())
        self.loads.append(load)
        self._compare(outcomes, batch)
        generated = sum(map(len, batch.tokens))
        return Round(load.tokens_per_second, generated / batch.seconds, foreign, is_disturbed(foreign))

    def _compare(self, outcomes: Sequence[Outcome], batch: Batch) -> None:
        pairs = zip(outcomes, batch.tokens, strict=True)
        self._rows.extend(outcome.token_ids == tokens for outcome, tokens in pairs)

    async def _clock(self) -> CpuClock | None:
        return CpuClock.read((await self._session.target.scrape()).cpu_seconds)
