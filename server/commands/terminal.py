"""What every command says, and what ends it: complaints on stderr, exit statuses, settings out of flags.

Owns the terminal; knows no server and no store.
"""

from __future__ import annotations

import sys
from typing import Any

import pydantic
from rich.console import Console

from ..settings import Settings

DEFAULT_MODEL: str = Settings.model_fields["model"].default
console = Console(stderr=True)


def complain(what: str) -> None:
    """One line on stderr, in red where there are colours."""
    console.print(f"adapterd: {what}", style="red", markup=False, highlight=False, soft_wrap=True)


def settings_of(**flags: Any) -> Settings:
    """What the flags and ADAPTERD_* variables say; a value that is wrong is named, and ends the command with status 2."""
    try:
        return Settings(**flags)
    except pydantic.ValidationError as error:
        complain_of(error)
        sys.exit(2)


def complain_of(error: pydantic.ValidationError) -> None:
    """One line for each flag that is wrong."""
    for problem in error.errors():
        name = "--" + str(problem["loc"][0]).replace("_", "-")
        complain(f"{name} {problem['msg']} (got {problem['input']!r})")
