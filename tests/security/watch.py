"""Watch: what the interpreter is asked to do while an upload is handled: files opened, modules imported, sockets, programs.

Uses Python's audit hooks, which see every thread of the process and cannot be talked past by library code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_TOLD: Final = frozenset(
    {"open", "import", "compile", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "pickle.find_class"}
)
_watching: list[Seen] = []


class Seen:
    """What happened, as (event, its arguments as text)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def of(self, event: str) -> list[str]:
        return [arguments for name, arguments in self.events if name == event]

    def mentions(self, text: str) -> list[tuple[str, str]]:
        return [(name, arguments) for name, arguments in self.events if text in arguments]


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event in _TOLD:
        told = (
            event,
            " ".join(str(argument)[:500] for argument in arguments if isinstance(argument, str | bytes | int | tuple)),
        )
        for seen in _watching:
            seen.events.append(told)


@contextmanager
def watched() -> Iterator[Seen]:
    """Usage: with watched() as seen: ...; assert not seen.of("pickle.find_class")"""
    if not _installed:
        sys.addaudithook(_hook)  # for the life of the process; idle unless somebody watches
        _installed.append(True)
    seen = Seen()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


_installed: list[bool] = []
