"""Where and when a figure was taken, so that a kept report can be read a year later: commit, machine, versions, date.

Owns no measurement. Everything that cannot be found out is None, never an error.
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__

_ROOT = Path(__file__).resolve().parents[2]
_CPUINFO = Path("/proc/cpuinfo")
_PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Provenance:
    """`commit` ends in "+" where the tree held changes that were not committed; None where there is no checkout."""

    date: str  # ISO 8601, UTC
    commit: str | None
    cpu: str | None  # the processor's own name
    platform: str
    python: str
    versions: dict[str, str]

    @classmethod
    def now(cls) -> Provenance:
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=commit_of(_ROOT),
            cpu=_cpu_name(),
            platform=platform.platform(),
            python=platform.python_version(),
            versions={"adapterd": __version__, **_versions()},
        )


def commit_of(tree: Path) -> str | None:
    """Of the checkout at `tree` itself: a package that is installed inside somebody else's checkout has none."""
    if not (tree / ".git").exists():
        return None
    found = _git(tree, "rev-parse", "HEAD")
    return found and found + ("+" if _git(tree, "status", "--porcelain", "--untracked-files=no") else "")


def _git(tree: Path, *words: str) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # `status` would refresh the index
    try:
        done = subprocess.run(
            ["git", "-C", str(tree), *words], env=environment, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str | None:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
