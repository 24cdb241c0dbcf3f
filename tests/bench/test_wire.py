from __future__ import annotations

import sys
from pathlib import Path

import pytest

from server.bench.options import BenchError
from tests.bench.peers.wire import Worker

#: A worker in the protocol's own words, loud on stdout as libraries are.
SCRIPT = """
import os, sys
from tests.bench.peers.workers.lines import serve, stopwatch

class Parrot:
    version = "parrot 1"
    def generate(self, prompts, texts, adapters, new):
        print("chatter that belongs to no protocol", flush=True)
        os.system("echo chatter of a child")
        if texts == ["die"]:
            os._exit(3)
        if new < 1:
            raise ValueError("nothing to say")
        with stopwatch() as seconds:
            rows = [[prompt[-1]] * new for prompt in prompts]
        return seconds(), rows

def load(base, adapters, rows, tokens, threads):
    print("loading", base)
    return Parrot()

serve(load)
"""


def _worker(tmp_path: Path) -> Worker:
    return Worker("parrot", [sys.executable, "-c", SCRIPT], tmp_path / "log")


def _load(worker: Worker) -> str:
    answer = worker.ask("load", base="b", adapters={}, rows=1, tokens=9, threads=1)
    return str(answer["version"])


def test_a_worker_answers_line_by_line_whatever_its_libraries_print(tmp_path: Path) -> None:
    with _worker(tmp_path) as worker:
        assert _load(worker) == "parrot 1"
        answer = worker.ask("generate", prompts=[[1, 2], [3]], texts=["", ""], adapters=[None, "a"], new=2)
        assert answer["tokens"] == [[2, 2], [3, 3]]
        assert answer["seconds"] >= 0
        assert worker.cpu_seconds() > 0
    log = (tmp_path / "log").read_text()
    assert "loading b" in log
    assert "chatter of a child" in log


def test_what_a_worker_raises_is_told_and_it_goes_on(tmp_path: Path) -> None:
    with _worker(tmp_path) as worker:
        with pytest.raises(BenchError, match="parrot: AssertionError: load comes first"):
            worker.ask("generate", prompts=[], texts=[], adapters=[], new=1)
        _load(worker)
        with pytest.raises(BenchError, match="parrot: ValueError: nothing to say"):
            worker.ask("generate", prompts=[], texts=[], adapters=[], new=0)
        assert worker.ask("generate", prompts=[], texts=[], adapters=[], new=1)["tokens"] == []


def test_a_worker_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    with _worker(tmp_path) as worker:
        _load(worker)
        with pytest.raises(BenchError, match=r"parrot has died: \.\.\.(.|\n)*chatter"):
            worker.ask("generate", prompts=[], texts=["die"], adapters=[], new=1)
