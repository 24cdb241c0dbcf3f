"""Logged: everything that a server in the test's process writes to its log, down to debug, as JSON lines on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import structlog

from server.logs import configure


@contextmanager
def logged(captured: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Usage: with logged(capsys): ...; then capsys.readouterr().err has what was logged meanwhile.

    Not a fixture: pytest gives the phases of a test different streams, and closes those of the phase before.
    """
    root = logging.getLogger()
    before = root.handlers[:], root.level
    captured.readouterr()
    configure("debug", "json")
    try:
        yield
    finally:
        structlog.reset_defaults()
        root.handlers[:], root.level = before
