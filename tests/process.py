"""Process: a real `adapterd serve` in a child process, started with flags, asked over HTTP and stopped with a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 300.0  # seconds; only a defect, or a machine that stands still, ever waits this long
T = TypeVar("T")


class ServerProcess:
    """A server that has announced itself. Leaving the context kills it if it still runs.

    Usage:
        with ServerProcess(directory, "--model", str(base)) as server:
            server.http.post("/generate", json=...)
            assert server.stop() == 0
    """

    def __init__(self, directory: Path, *flags: str) -> None:
        """`directory` gets the log, and the store unless the flags name one. Raises: AssertionError with the log."""
        self._log = directory / "stderr.log"
        self._store = directory / "store"
        store = () if "--store" in flags else ("--store", str(self._store))
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command("serve", "--port", "0", "--threads", "1", *store, *flags),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
                cwd=directory,
            )
        self.http = httpx.Client(timeout=DEADLINE)
        self.announced = self._announcement()
        self.url = self.announced.rpartition(" ")[2]
        self.http.base_url = httpx.URL(self.url)

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def engine(self) -> Mapping[str, int]:
        """What /info says about the engine's state."""
        state: Mapping[str, int] = self.http.get("/info").json()["engine"]
        return state

    def idle(self) -> bool:
        """Nothing runs or waits."""
        state = self.engine()
        return state["running"] == state["waiting"] == 0

    def generate(self, inputs: str = "hello", adapter: str | None = None, **parameters: Any) -> httpx.Response:
        body = {"inputs": inputs, "parameters": {"adapter_id": adapter, "max_new_tokens": 6, **parameters}}
        return self.http.post("/generate", json=body)

    def upload(self, name: str, files: Mapping[str, bytes]) -> httpx.Response:
        parts = [("files", (file, data, "application/octet-stream")) for file, data in files.items()]
        return self.http.post("/adapters", data={"adapter_id": name}, files=parts)

    def stored(self) -> set[str]:
        """The files of its own store, but for the database's."""
        return {str(path) for path in self._store.rglob("*") if path.is_file() and "sqlite3" not in path.name}

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self) -> int:
        """Waits for the process to end by itself."""
        return self.process.wait(DEADLINE)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.http.close()  # an open connection is one more thing a server that stops has to wait for
        self.terminate()
        return self.exit_code()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _announcement(self) -> str:
        assert self.process.stdout is not None
        alarm = threading.Timer(DEADLINE, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline().strip()
        alarm.cancel()
        if not re.search(r" on http://\S+:\d+$", line):
            self.__exit__(None, None, None)
            raise AssertionError(f"the server did not start; it said {line!r} and\n{self.log}")
        return line


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "server", *arguments]


def environment() -> dict[str, str]:
    """This process's, without settings that a developer may have exported, and with the tree under test on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTERD_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """One `adapterd` command in a process of its own, to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment() | variables, timeout=DEADLINE, check=False
    )


def until(condition: Callable[[], T]) -> T:
    """Asks again and again until the answer is true, and returns it; fails after the deadline."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
    return value


@contextmanager
def streaming(server: ServerProcess, inputs: str = "hello", **parameters: Any) -> Iterator[Iterator[str]]:
    """The `data:` payloads of a /generate_stream as they come, on a connection of its own."""
    body = {"inputs": inputs, "parameters": {"ignore_eos_token": True, "details": True, **parameters}}
    with (
        httpx.Client(base_url=server.url, timeout=DEADLINE) as http,
        http.stream("POST", "/generate_stream", json=body) as response,
    ):
        assert response.status_code == 200, response.read()
        yield (line.removeprefix("data: ") for line in response.iter_lines() if line)
