"""The package: its metadata says what the code imports, and what gets installed is all that the source tree holds."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest

import server

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("server", "adapters_store")

#: Dependencies that no line of ours imports, and who does.
UNSEEN = {
    "accelerate": "transformers, to read a GGUF checkpoint",
    "fastapi-offline": "GET /docs, which serves the files in it and runs none of its code",
    "gguf": "transformers, to read a GGUF checkpoint",
    "httptools": "uvicorn's HTTP parser",
    "uvloop": "uvicorn's event loop",
    "psycopg": "SQLAlchemy's driver of PostgreSQL",
    "python-multipart": "FastAPI's form parser",
}


#: Imported, not required: who brings it. Nothing imports these modules where it is absent.
BROUGHT = {"triton": "torch's CUDA builds"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    metadata: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return metadata


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]) for requirement in requirements}


def source_files() -> Iterator[Path]:
    """All that the packages hold, relative to the root, but for what running them leaves behind."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.is_file() and not {"__pycache__", "prebuilt"} & set(path.parts):
                yield path.relative_to(ROOT)


@cache
def imported(*, late: bool) -> dict[str, str]:
    """Distribution -> the first file that imports it: at its top level, or `late`, in a function."""
    owners = packages_distributions()
    found: dict[str, str] = {}
    for path in (path for path in source_files() if path.suffix == ".py"):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {node for function in functions for node in ast.walk(function)}
        nodes = inside if late else set(ast.walk(tree)) - inside
        for name in sorted(top_level_names(nodes) - set(PACKAGES) - sys.stdlib_module_names):
            found.setdefault(normal(owners.get(name, [name])[0]), str(path))
    return found


def top_level_names(nodes: set[ast.AST]) -> set[str]:
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    absolute = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in plain | absolute}


def test_what_is_imported_is_declared(project: dict[str, Any]) -> None:
    declared = required(project["dependencies"])
    undeclared = {name: path for name, path in imported(late=False).items() if name not in declared | BROUGHT.keys()}
    assert undeclared == {}


def test_what_a_function_imports_is_declared_or_an_extra(project: dict[str, Any]) -> None:
    extras = (requirement for extra in project["optional-dependencies"].values() for requirement in extra)
    declared = required([*project["dependencies"], *extras])
    undeclared = {name: path for name, path in imported(late=True).items() if name not in declared}
    assert undeclared == {}


def test_what_is_declared_is_used(project: dict[str, Any]) -> None:
    used = {*imported(late=False), *imported(late=True), *UNSEEN}
    assert required(project["dependencies"]) - used == set()


def test_the_version_is_one(project: dict[str, Any]) -> None:
    assert project["version"] == server.__version__


def test_the_command_exists(project: dict[str, Any]) -> None:
    for target in project["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.skipif("CI" not in os.environ, reason="only CI is sure to run beside an install of this very tree")
def test_the_install_holds_every_file_of_the_tree() -> None:
    """Kernels' sources, demo adapters and READMEs are package data, and easily forgotten."""
    shipped = {str(path) for path in distribution("adapterd").files or ()}
    assert [str(path) for path in source_files() if str(path) not in shipped] == []
