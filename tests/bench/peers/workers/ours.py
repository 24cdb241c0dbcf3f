"""This project's engine in the worker's process, without HTTP: what `adapterd bench --offline` measures."""

from __future__ import annotations

from pathlib import Path

from server import __version__
from server.bench.inprocess import EngineUnderTest

from .lines import Names, Rows, serve

_VIRTUAL = 64  # positions that an adapter may put in front of a text


class Ours:
    """One engine; its thread ends with the process."""

    def __init__(self, engine: EngineUnderTest) -> None:
        self._engine = engine
        self.version = f"adapterd {__version__}, kernels {engine.kernels}"

    def generate(self, prompts: Rows, texts: list[str], adapters: Names, new: int) -> tuple[float, Rows]:
        batch = self._engine.generate(prompts, adapters, new)
        return batch.seconds, list(map(list, batch.tokens))


def load(base: str, adapters: dict[str, str], rows: int, tokens: int, threads: int) -> Ours:
    engine = EngineUnderTest.load(Path(base), rows=rows, tokens=tokens + _VIRTUAL, slots=max(1, len(adapters)), threads=threads)
    engine.add({name: {path.name: path.read_bytes() for path in Path(at).iterdir()} for name, at in adapters.items()})
    return Ours(engine.__enter__())


if __name__ == "__main__":
    serve(load)
