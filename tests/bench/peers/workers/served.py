"""This project's server: `adapterd serve` in a child process, every row a streaming HTTP request of its own."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from server import __version__
from server.bench.load import drive
from server.bench.results import OK
from server.bench.target import connect
from server.bench.workload import Order, Prompt

from .lines import Names, Rows, serve

_SECONDS = 600.0


class Served:
    """One server and its address."""

    def __init__(self, url: str, rows: int) -> None:
        self._url = url
        self._rows = rows
        self.version = f"adapterd {__version__}"

    def generate(self, prompts: Rows, texts: list[str], adapters: Names, new: int) -> tuple[float, Rows]:
        rows = zip(prompts, texts, adapters, strict=True)
        return asyncio.run(self._generate([Order(Prompt(text, tuple(ids)), name, new) for ids, text, name in rows]))

    async def _generate(self, orders: list[Order]) -> tuple[float, Rows]:
        async with connect(self._url, api_key=None, request_seconds=_SECONDS) as target:
            await target.info()  # the connection is there before the clock starts
            outcomes = await drive(target, orders, self._rows)
        for order, outcome in zip(orders, outcomes, strict=True):
            if outcome.status != OK:
                raise RuntimeError(f"a request failed with {outcome.status}: {outcome.message}")
            if outcome.prompt_tokens != len(order.prompt.ids):
                raise RuntimeError(f"the server reads {outcome.prompt_tokens} tokens where {len(order.prompt.ids)} were meant")
        seconds = max(outcome.ended for outcome in outcomes) - min(outcome.started for outcome in outcomes)
        return seconds, [list(outcome.token_ids) for outcome in outcomes]

    async def upload(self, adapters: dict[str, dict[str, bytes]]) -> None:
        async with connect(self._url, api_key=None, request_seconds=_SECONDS) as target:
            for name, files in adapters.items():
                await target.upload(name, files)


def load(base: str, adapters: dict[str, str], rows: int, tokens: int, threads: int) -> Served:
    server = Served(_start(base, len(adapters), threads), rows)
    files = {name: {path.name: path.read_bytes() for path in Path(at).iterdir()} for name, at in adapters.items()}
    asyncio.run(server.upload(files))
    return server


def _start(base: str, slots: int, threads: int) -> str:
    """The address of a server that is stopped and forgotten when this process ends."""
    store = tempfile.mkdtemp(prefix="adapterd-bench-")
    flags = ["--port", "0", "--model", base, "--store", store, "--threads", str(threads), "--adapter-slots", str(max(1, slots))]
    server = subprocess.Popen([sys.executable, "-m", "server", "serve", *flags], stdout=subprocess.PIPE, text=True)
    atexit.register(shutil.rmtree, store, ignore_errors=True)  # after the server has ended: the last registered runs first
    atexit.register(_stop, server)
    assert server.stdout is not None
    line = server.stdout.readline().strip()
    if " on http://" not in line:
        raise RuntimeError(f"the server did not start; it said {line!r}")
    return line.rpartition(" ")[2]


def _stop(server: subprocess.Popen[str]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    serve(load)
