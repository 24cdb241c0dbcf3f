"""`python -m tests.bench.peers`: load every entrant, play the rounds, print the table, keep the JSON."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from tokenizers import Tokenizer

from server.bench.adapters import Files, make_adapter
from server.bench.dimensions import Dimensions
from server.bench.machine import measure_machine
from server.bench.offline import faster
from server.bench.options import FAMILIES, BenchError, Family
from server.bench.provenance import Provenance
from server.bench.workload import Piece, Prompt, make_prompts
from server.model.outline import outline
from server.model.pull import console_report, resolve
from server.settings import Settings, default_home

from .contest import Contest, Round
from .entrants import ENTRANTS, Entrant, Mode, Turn
from .summary import Report, blocks, to_json
from .venvs import RECIPES, make_venv
from .wire import Worker

DEFAULT_MODEL: str = Settings.model_fields["model"].default
console = Console(width=160)


def main(
    rounds: Annotated[int, typer.Option(help="Undisturbed rounds wanted.", min=1)] = 5,
    peers: Annotated[str, typer.Option(help=f"Entrants, of {', '.join(ENTRANTS)}.")] = ",".join(ENTRANTS),
    modes: Annotated[str, typer.Option(help="What is played, of base, lora, families.")] = "base,lora,families",
    rows: Annotated[int, typer.Option(min=1)] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of every prompt.", min=2)] = 128,
    new: Annotated[int, typer.Option(help="Tokens to generate per row.", min=2)] = 64,
    rank: Annotated[int, typer.Option(help="Of the LoRA adapters, on all linear layers.", min=1, max=16)] = 16,
    model: Annotated[str, typer.Option(help="A directory, a Hub id or a short name.")] = DEFAULT_MODEL,
    seed: Annotated[int | None, typer.Option(help="Of prompts and adapters; unset = a new one.")] = None,
    json: Annotated[Path | None, typer.Option(help="Keep the report in this file.")] = None,
    install: Annotated[list[str] | None, typer.Option(help=f"Install peers first: {', '.join(RECIPES)}.")] = None,
) -> None:
    for name in install or ():
        make_venv(name)
    seed = secrets.randbits(32) if seed is None else seed
    with console_report() as told:
        base = resolve(model, default_home(), told)
    chosen, missing = choose(peers.split(","))
    with tempfile.TemporaryDirectory(prefix="adapterd-peers-") as scratch, ExitStack() as stack:
        setup = Setup(base, Path(scratch), rows, prompt + new, seed, rank)
        machine = measure_machine()
        players = {entrant.name: stack.enter_context(setup.worker(entrant)) for entrant in chosen}
        versions = {entrant.name: setup.load(entrant, players[entrant.name]) for entrant in chosen}
        turns: list[Turn] = [(each.name, mode) for each in chosen for mode in each.modes if mode in modes.split(",")]
        contest = Contest(players, turns, setup.names, setup.prompts(prompt), new)
        contest.rehearse()
        played = contest.play(rounds, show)
    machine = faster(machine, measure_machine())
    report = Report(Provenance.now(), machine, model, rows, prompt, new, seed, versions, missing, played)
    console.print(*blocks(report), sep="\n")
    if json is not None:
        json.write_text(to_json(report))


def choose(names: Sequence[str]) -> tuple[list[Entrant], dict[str, str]]:
    """The entrants that can play, and why the others cannot. Raises: BenchError for one that is not known."""
    unknown = [name for name in names if name not in ENTRANTS]
    if unknown:
        raise BenchError(f"`peers` may name {', '.join(ENTRANTS)}. Given: {', '.join(unknown)}")
    chosen = [ENTRANTS[name] for name in names]
    absent = {
        entrant.name: f"python -m tests.bench.peers --install {entrant.venv}" for entrant in chosen if entrant.python is None
    }
    return [entrant for entrant in chosen if entrant.name not in absent], absent


class Setup:
    """What all entrants are given: base, adapters as files, prompts."""

    def __init__(self, base: Path, scratch: Path, rows: int, tokens: int, seed: int, rank: int) -> None:
        self._base, self._scratch, self._rows, self._tokens = base, scratch, rows, tokens
        self._random = Random(seed)
        self._dimensions = Dimensions.of_shape(outline(base)[0])
        lora = {f"lora-{row}": self._files("lora", (seed, row), rank) for row in range(rows)}
        others = {f"{family}-x": self._files(family, (seed, rows + at), rank) for at, family in enumerate(families(rows))}
        self._adapters: dict[Mode, dict[str, str]] = {
            "base": {},
            "lora": self._written(lora),
            "families": self._written(others),
        }

    @property
    def names(self) -> dict[Mode, list[str | None]]:
        """The adapter of every row, by mode."""
        return {mode: _repeated(list(found), self._rows) for mode, found in self._adapters.items()}

    def worker(self, entrant: Entrant) -> Worker:
        command = [str(entrant.python), "-m", f"tests.bench.peers.workers.{entrant.worker}"]
        return Worker(entrant.name, command, self._scratch / f"{entrant.name}.log")

    def load(self, entrant: Entrant, worker: Worker) -> str:
        """What it says it is."""
        console.print(f"loading {entrant.name} ...", highlight=False)
        adapters = {name: path for mode in entrant.adapted for name, path in self._adapters[mode].items()}
        threads = len(os.sched_getaffinity(0))
        answer = worker.ask(
            "load", base=str(self._base), adapters=adapters, rows=self._rows, tokens=self._tokens, threads=threads
        )
        return str(answer["version"])

    def prompts(self, tokens: int) -> Prompts:
        return Prompts(self._base, self._rows, tokens, self._random)

    def _files(self, family: Family, seed: tuple[int, int], rank: int) -> Files:
        return make_adapter(family, self._dimensions, np.random.default_rng(seed), rank=rank)

    def _written(self, adapters: dict[str, Files]) -> dict[str, str]:
        for name, files in adapters.items():
            (self._scratch / name).mkdir()
            for file, body in files.items():
                (self._scratch / name / file).write_bytes(body)
        return {name: str(self._scratch / name) for name in adapters}


class Prompts:
    """New prompts of one length at each call."""

    def __init__(self, base: Path, rows: int, tokens: int, random: Random) -> None:
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        self._rows, self._tokens, self._random = rows, tokens, random

    def __call__(self) -> list[Prompt]:
        return asyncio.run(make_prompts(self._tokenize, self._rows, self._tokens, self._random))

    async def _tokenize(self, text: str) -> list[Piece]:
        found = self._tokenizer.encode(text)
        return [Piece(id, stop) for id, (_, stop) in zip(found.ids, found.offsets, strict=True)]


def families(rows: int) -> list[Family]:
    """One family per row, as far as they go."""
    known: list[Family] = list(FAMILIES)  # type: ignore[arg-type]  # the names of that very Literal
    return known[:rows]


def _repeated(names: list[str], rows: int) -> list[str | None]:
    return [names[row % len(names)] for row in range(rows)] if names else [None] * rows


def show(round: Round) -> None:
    told = ", ".join(f"{name} {mode} {play.tokens_per_second:.1f}" for (name, mode), play in round.plays.items())
    console.print(f"{'disturbed: ' if round.disturbed else ''}{told}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
