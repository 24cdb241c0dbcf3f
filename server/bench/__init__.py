"""`adapterd bench`: offered load against a running server, comparisons, memory. A client: it knows the server by HTTP only.

Usage:
    report = run_bench(BenchOptions(url="http://127.0.0.1:8080", adapters=8, families=("lora", "ia3")))
    rich.print(render(report)); path.write_text(to_json(report))
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Final
from urllib.parse import urlsplit

import httpx

from .machine import Machine, measure_machine
from .options import BenchError, BenchOptions
from .report import BenchReport, render, to_json
from .scenarios import Findings, base_versus_adapters, many_adapters, plain_load
from .session import Session
from .target import connect

__all__ = ["BenchError", "BenchOptions", "BenchReport", "bench", "render", "run_bench", "to_json"]

_SCENARIOS: Final[Mapping[str, Callable[[Session], Awaitable[Findings]]]] = MappingProxyType(
    {"load": plain_load, "base-vs-adapters": base_versus_adapters, "many-adapters": many_adapters}
)
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


def run_bench(options: BenchOptions) -> BenchReport:
    """One bench run, from the first look at the server to the last adapter deleted.

    Raises: BenchError for a wrong option, no server, or a comparison in which requests fail.
    """
    return asyncio.run(bench(options))


async def bench(options: BenchOptions, transport: httpx.AsyncBaseTransport | None = None) -> BenchReport:
    """`run_bench` for callers that have an event loop; `transport` replaces the network."""
    options.check()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    async with connect(
        options.url,
        api_key=options.api_key,
        request_seconds=options.timeout,
        concurrency=options.concurrency,
        transport=transport,
    ) as target:
        session = Session(target, options, await target.info(), seed)
        machine = _machine(options.url)
        findings = await _scenario(options)(session)
        return BenchReport(
            options=options,
            seed=seed,
            model=str(session.info.get("model_id", "?")),
            machine=machine,
            uploads=session.uploads,
            loads=findings.loads,
            comparison=findings.comparison,
            memory=findings.memory,
        )


def _scenario(options: BenchOptions) -> Callable[[Session], Awaitable[Findings]]:
    if not options.versus_peft:
        return _SCENARIOS[options.scenario]
    from .versus_peft import versus_peft

    return versus_peft


def _machine(url: str) -> Machine | None:
    return measure_machine() if urlsplit(url).hostname in _LOOPBACK else None
