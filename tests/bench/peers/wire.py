"""The driver's half of the wire: one worker process, asked a line of JSON at a time (workers/lines.py is the other half).

Owns the process: it ends with its `Worker`. Knows no benchmark.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from server.bench.options import BenchError

ROOT = Path(__file__).resolve().parents[3]
_LOG_SHOWN = 1500  # characters of a dead worker's last words
_PATIENCE = 20.0  # seconds for a worker to end once its stdin has


class Worker:
    """Usage: with Worker("peft", [python, "-m", module], log) as worker: worker.ask("load", base=..., ...)"""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        """`log` gets all that the worker and its libraries print."""
        self.name = name
        self._log = log
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, cwd=ROOT, env=_environment()
            )

    def ask(self, op: str, **values: Any) -> Mapping[str, Any]:
        """Raises: BenchError with what the worker says is wrong, or with its last words when it has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchError(f"{self.name} has died: ...{self._log.read_text(errors='replace')[-_LOG_SHOWN:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name}: {answer['error']}")
        return answer

    def cpu_seconds(self) -> float:
        """Of the worker and of all processes it has started."""
        own = psutil.Process(self._process.pid)
        times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _environment() -> dict[str, str]:
    """Threads are each worker's own business, and none may look for a hub."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
