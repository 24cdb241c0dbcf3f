"""One bench run: which scenario the options ask for, where it runs, and its report.

Towards a server it is a client and knows it by HTTP only.

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
from rich.console import Group, RenderableType

from .cold import cold_start
from .machine import Machine, measure_machine
from .neighbour import noisy_neighbour
from .offline_report import OfflineReport, offline_blocks, offline_json
from .options import BenchOptions
from .provenance import Provenance
from .registered import many_registered
from .report import BenchReport, bench_json, blocks
from .scenarios import Findings, base_versus_adapters, many_adapters, plain_load, prefill_while_decoding
from .session import Session
from .target import connect
from .weights import weights

_SCENARIOS: Final[Mapping[str, Callable[[Session], Awaitable[Findings]]]] = MappingProxyType(
    {
        "load": plain_load,
        "base-vs-adapters": base_versus_adapters,
        "many-adapters": many_adapters,
        "prefill-while-decoding": prefill_while_decoding,
        "noisy-neighbour": noisy_neighbour,
        "weights": weights,
        "many-registered": many_registered,
        "cold-start": cold_start,
    }
)
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


def run_bench(options: BenchOptions) -> BenchReport | OfflineReport:
    """One bench run, from the first look at the server to the last adapter deleted.

    Raises: BenchError for a wrong option, no server, or a comparison in which requests fail.
    """
    if not options.offline:
        return asyncio.run(bench(options))
    options.check()
    from .offline import offline  # loads torch and the engine

    return asyncio.run(offline(options))


def render(report: BenchReport | OfflineReport) -> RenderableType:
    """The report as tables, for a `rich.console.Console`."""
    return Group(*(offline_blocks(report) if isinstance(report, OfflineReport) else blocks(report)))


def to_json(report: BenchReport | OfflineReport) -> str:
    """The report with its derived figures, as one JSON object. API keys are left out."""
    return offline_json(report) if isinstance(report, OfflineReport) else bench_json(report)


async def bench(options: BenchOptions, transport: httpx.AsyncBaseTransport | None = None) -> BenchReport:
    """`run_bench` for callers that have an event loop; `transport` replaces the network."""
    options.check()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    async with connect(
        options.url,
        api_key=options.api_key or next(iter(options.api_keys), None),
        request_seconds=options.timeout,
        transport=transport,
    ) as target:
        session = Session(target, options, await target.info(), seed)
        machine = _machine(options.url)
        findings = await _scenario(options)(session)
        return BenchReport(
            options=options,
            provenance=Provenance.now(),
            seed=seed,
            model=str(session.info.get("model_id", "?")),
            machine=machine,
            uploads=session.uploads,
            loads=findings.loads,
            comparison=findings.comparison,
            memory=findings.memory,
            interference=findings.interference,
            verdict=findings.verdict,
        )


def _scenario(options: BenchOptions) -> Callable[[Session], Awaitable[Findings]]:
    if not options.versus_peft:
        return _SCENARIOS[options.scenario]
    from .versus_peft import versus_peft

    return versus_peft


def _machine(url: str) -> Machine | None:
    return measure_machine() if urlsplit(url).hostname in _LOOPBACK else None
