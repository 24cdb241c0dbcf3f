"""Running `adapterd` in the tests' own process, and against the tiny server."""

from __future__ import annotations

from collections.abc import Callable

from typer.testing import CliRunner, Result

from server import cli

Command = Callable[..., Result]


def invoke(*arguments: str) -> Result:
    """What a command printed and how it ended."""
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def done(*arguments: str) -> str:
    """What a command that ends well prints."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout
