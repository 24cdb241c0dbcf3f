"""Harness: what every target shares. Owns libFuzzer's start, the seed corpus and what a target may raise."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris

Target = Callable[[bytes], None]


def fuzz(target: Target, seeds: Iterable[bytes]) -> None:
    """Never returns. The command line is libFuzzer's; a corpus of one's own may follow its flags."""
    with tempfile.TemporaryDirectory() as directory:
        for number, seed in enumerate(seeds):
            (Path(directory) / str(number)).write_bytes(seed)
        arguments = [sys.argv[0], "-max_len=4096", "-timeout=20", "-rss_limit_mb=4096", *sys.argv[1:], directory]
        atheris.Setup(arguments, target)
        atheris.Fuzz()


def pick(source: atheris.FuzzedDataProvider, among: list[str]) -> str:
    return among[source.ConsumeIntInRange(0, len(among) - 1)]


def json_value(source: atheris.FuzzedDataProvider, likely: list[str], depth: int = 3) -> object:
    """Any JSON, more often than not of a type that some field has."""
    match source.ConsumeIntInRange(0, 9 if depth else 6):
        case 0:
            return None
        case 1:
            return source.ConsumeBool()
        case 2:
            return source.ConsumeIntInRange(-2, 64)
        case 3:
            return source.ConsumeInt(9)
        case 4:
            return source.ConsumeFloat()
        case 5:
            return source.ConsumeUnicode(12)
        case 6 | 9:
            return pick(source, likely)
        case 7:
            return [json_value(source, likely, depth - 1) for _ in range(source.ConsumeIntInRange(0, 3))]
    pairs = range(source.ConsumeIntInRange(0, 3))
    return {pick(source, likely): json_value(source, likely, depth - 1) for _ in pairs}
