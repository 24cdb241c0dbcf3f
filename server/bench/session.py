"""One bench run's connection, randomness and adapters: what every scenario needs before it can offer any load.

Owns the adapters that it uploads: they have names of their own and are deleted whatever happens. Measures nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Final

import numpy as np

from ..errors import AdapterdError
from ..model.pull import resolve
from ..settings import default_home
from .adapters import Files, make_adapter
from .dimensions import Dimensions
from .load import drive
from .options import BenchError, BenchOptions, Family
from .results import OK, MemorySample, Percentiles, Uploads
from .target import Target
from .workload import Order, Prompt, choose, make_orders, make_prompts

#: Part of the server -> field of /info with the bytes it may hold.
_BUDGET: Final = {
    "runtime": "runtime_bytes",
    "base": "base_bytes",
    "KV cache": "kv_cache_bytes",
    "host cache of adapters": "host_cache_limit_bytes",
}
_SHAPE_DIGITS: Final = 12
_AT_ONCE: Final = 4  # uploads: one is written to disk while others are received, checked or made
_WARMUP_TOKENS = 2  # generated per adapter: one prefill, one decode


@dataclass
class Session:
    """One run against one server. `seed` decides everything random in it."""

    target: Target
    options: BenchOptions
    info: Mapping[str, object]
    seed: int
    _prefix: str = field(default_factory=lambda: f"bench-{secrets.token_hex(4)}")
    _begun: int = 0  # uploads that may have reached the server, whatever the client heard of them
    _uploads: list[tuple[Family, int, float]] = field(default_factory=list)  # family, bytes, seconds

    def __post_init__(self) -> None:
        self._random = Random(self.seed)

    def under(self, target: Target, adapters: int) -> Session:
        """The part of the run that belongs to another tenant, with so many adapters of its own."""
        options = replace(self.options, adapters=adapters)
        return Session(target, options, self.info, self._random.getrandbits(32), _uploads=self._uploads)

    def fleet(self, adapters: int) -> Session:
        """So many adapters of fixed content, named after it: a later run of this shape finds them where one left them."""
        options = replace(self.options, adapters=adapters)
        shape = repr((options.families, options.rank, options.virtual_tokens, options.precision, self.dimensions))
        content = hashlib.sha256(shape.encode()).hexdigest()[:_SHAPE_DIGITS]
        return Session(self.target, options, self.info, int(content, 16), f"bench-fleet-{content}", _uploads=self._uploads)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all the adapters of this run, uploaded or not."""
        return tuple(f"{self._prefix}-{index}" for index in range(self.options.adapters))

    @property
    def uploads(self) -> Uploads:
        families = Counter[str](family for family, _, _ in self._uploads)
        size = sum(size for _, size, _ in self._uploads)
        return Uploads(len(self._uploads), dict(families), size, Percentiles.of(took for _, _, took in self._uploads))

    async def prompts(self, count: int, tokens: int | None = None) -> list[Prompt]:
        """Of `tokens` tokens each, or as many as were asked for."""
        return await make_prompts(self.target.tokenize, count, tokens or self.options.prompt_tokens, self._random)

    def orders(self, prompts: Sequence[Prompt], adapters: Sequence[str]) -> list[Order]:
        """One request per prompt, through `adapters` by the popularity asked for; the base model without any."""
        chosen = choose(self.options.popularity, adapters, len(prompts), self._random)
        return make_orders(prompts, chosen, self.options.max_new_tokens)

    @asynccontextmanager
    async def adapters(self) -> AsyncIterator[tuple[str, ...]]:
        """All adapters of the run, uploaded; deleted afterwards."""
        async with self.cleanup():
            for index in range(self.options.adapters):
                await self.upload(index)
            yield self.names

    @asynccontextmanager
    async def cleanup(self) -> AsyncIterator[None]:
        """Deletes what the run has uploaded, also when it is interrupted. What fails then does not hide the cause."""
        try:
            yield
        finally:
            for name in self.names[: self._begun]:
                with suppress(BenchError):
                    await asyncio.shield(self.target.delete(name))

    async def upload(self, index: int) -> None:
        """The adapter of that number; numbers are begun in order."""
        files = await asyncio.to_thread(self.files, index)
        self._begun = max(self._begun, index + 1)
        took = await self.target.upload(self.names[index], files)
        self._uploads.append((self._family(index), sum(map(len, files.values())), took))

    async def upload_missing(self) -> None:
        """Every adapter whose name the tenant does not have yet, a few at once."""
        names, there = self.names, await self.target.adapter_names()
        self._begun = len(names)
        missing = iter([index for index, name in enumerate(names) if name not in there])

        async def work() -> None:
            for index in missing:
                await self.upload(index)

        await asyncio.gather(*(work() for _ in range(_AT_ONCE)))

    def files(self, index: int) -> Files:
        """Adapter `index` of the run: the same bytes whenever asked."""
        return make_adapter(
            self._family(index),
            self.dimensions,
            np.random.default_rng((self.seed, index)),
            rank=self.options.rank,
            virtual_tokens=self.options.virtual_tokens,
            precision=self.options.precision,
        )

    async def warm_up(self, adapters: Sequence[str]) -> None:
        """One short request through the base and through each adapter. Raises: BenchError when one of them fails."""
        if not self.options.warmup:
            return
        through: list[str | None] = [None, *adapters]
        prompts = await self.prompts(min(len(through), self.options.concurrency))
        orders = [Order(prompts[i % len(prompts)], name, _WARMUP_TOKENS) for i, name in enumerate(through)]
        for outcome in await drive(self.target, orders, self.options.concurrency):
            if outcome.status != OK:
                raise BenchError(f"warming up {outcome.adapter or 'the base'} failed with {outcome.status}: {outcome.message}")

    async def memory(self, adapters: int) -> list[MemorySample]:
        """One sample, or none from a server that does not export its resident set."""
        resident = (await self.target.scrape()).resident_bytes
        return [] if resident is None else [MemorySample(adapters, resident)]

    async def budget(self) -> dict[str, int | None]:
        """Bytes that each part of the server may hold; None for a part of which it does not tell."""
        told = {part: self.info.get(name) for part, name in _BUDGET.items()}
        slots = (await self.target.scrape()).adapter_slots_bytes
        return {part: size if isinstance(size, int) else None for part, size in {**told, "adapter slots": slots}.items()}

    @cached_property
    def dimensions(self) -> Dimensions:
        return Dimensions.of(self.info)

    @cached_property
    def base_directory(self) -> Path:
        """Where the server's base lies on this machine. Raises: BenchError when that has to be told."""
        if self.options.base is not None:
            return self.options.base
        try:
            return resolve(str(self.info.get("model_id", "")), default_home())
        except AdapterdError as error:
            raise BenchError(f"`base` must name the directory of the server's base model: {error}") from error

    def _family(self, index: int) -> Family:
        return self.options.families[index % len(self.options.families)]
