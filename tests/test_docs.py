"""Documentation that cannot fall behind: what a README must name, and what a README may claim.

Every setting, route, method family and command must stand, as code, in some README.md; every `adapterd` command line in
one must be a command with those flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import typer

from server import cli
from server.api.app import create_app
from server.engine.mailbox import Mailbox
from server.methods import METHODS
from server.metrics import Metrics
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PLACES = (".", "server", "adapters_store", "docker", "tests")
FENCE = re.compile(r"^ {0,3}(```|~~~)")
SPAN = re.compile(r"(`+)(.+?)\1")
COMMAND_LINE = re.compile(r"(?:^|[\s(`])(?:python -m server|adapterd)((?: [^\s|&;<>()#]+)*)")


def readmes(root: Path) -> list[Path]:
    """The README of every folder that is the project's own."""
    deep = (path for place in PLACES[1:] for path in sorted((root / place).rglob("README.md")))
    return [path for path in (root / "README.md", *deep) if path.is_file()]


def coded(text: str) -> Iterator[tuple[str, str]]:
    """(line, the code in it): whole lines of fenced blocks, backslashes at their ends joined, and inline spans elsewhere."""
    fenced, held = False, ""
    for line in text.splitlines():
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            yield line, "\n".join(found[1] for found in SPAN.findall(line))
        elif line.endswith("\\"):
            held += line[:-1]
        else:
            yield held + line, held + line
            held = ""


def mentions(code: str, word: str) -> bool:
    """Whether `word` stands in `code` on its own: --port is not in --port-file, /adapters not in /adapters/{id}."""
    return re.search(rf"(?<![\w/}}.-]){re.escape(word)}(?![\w/{{-])", code) is not None


def flags_of(name: str) -> list[str]:
    flag = "--" + name.replace("_", "-")
    switched_off = Settings.model_fields[name].default is True
    return [flag, "--no-" + flag[2:]] if switched_off else [flag]


def routes() -> list[tuple[str, str]]:
    """(verb, path) of everything that is served; the engine, the store and the tokenizer behind it are never asked."""
    app = create_app(
        engine=Mock(),
        mailbox=Mailbox(),
        text=Mock(),
        store=Mock(),
        metrics=Metrics("base", 1),
        settings=Settings(),
        validate=Mock(),
        model_name="base",
    )
    paths: dict[str, dict[str, Any]] = app.openapi()["paths"]
    served = [(verb.upper(), unified(path)) for path, verbs in paths.items() for verb in verbs]
    return [*served, ("GET", "/docs"), ("GET", "/openapi.json")]


def unified(text: str) -> str:
    """Paths with placeholders that read alike, whatever they are called."""
    return re.sub(r"\{\w+\}", "{}", text)


def commands(command: Any = None, name: str = "") -> dict[str, Any]:
    """Every command a user can give, "users bind" say, and what parses it. Groups are listed as their commands."""
    command = command or typer.main.get_command(cli.app)
    parts: Mapping[str, Any] = getattr(command, "commands", {})
    if not parts:
        return {name: command}
    return {full: leaf for word, part in parts.items() for full, leaf in commands(part, f"{name} {word}".strip()).items()}


def command_lines(text: str) -> list[list[str]]:
    """The words after `adapterd` (or `python -m server`), wherever a line of code gives that command."""
    return [line.split() for _, code in coded(text) for line in COMMAND_LINE.findall(code)]


def wrong(words: list[str]) -> str | None:
    """What is not so about a command line; None if it could be run."""
    if not words or not words[0].isalpha():  # a flag, or the server's own words in an example's output
        return None
    known = commands()
    name = next((" ".join(words[:depth]) for depth in (2, 1) if " ".join(words[:depth]) in known), None)
    if name is None:
        return None if len(words) == 1 and any(each.startswith(f"{words[0]} ") for each in known) else "no such command"
    flags = {flag for option in known[name].params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in flags]
    return f"{name} has no {', '.join(unknown)}" if unknown else None


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in readmes(ROOT)}


@pytest.fixture(scope="module")
def lines(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """(line, the code in it) of every README for those who use the server; how it is tested is not for them."""
    return [pair for name, text in texts.items() if not name.startswith("tests/") for pair in coded(text)]


@pytest.fixture(scope="module")
def code(lines: list[tuple[str, str]]) -> str:
    return "\n".join(code for _, code in lines)


def test_every_setting_is_documented(code: str) -> None:
    assert [name for name in Settings.model_fields if not any(mentions(code, flag) for flag in flags_of(name))] == []


def test_every_method_is_documented(code: str) -> None:
    assert [name for name in METHODS if not mentions(code, name)] == []


def test_every_command_is_documented(code: str) -> None:
    assert [name for name in commands() if not mentions(code, f"adapterd {name}")] == []


def test_every_route_is_documented(lines: list[tuple[str, str]]) -> None:
    """Its path as code, and its verb in the same line, so that one line of a table may hold several verbs."""
    named = [(line, unified(code)) for line, code in lines]
    missing = [
        f"{verb} {path}"
        for verb, path in routes()
        if not any(mentions(code, path) and mentions(line, verb) for line, code in named)
    ]
    assert missing == []


def test_every_documented_command_line_could_be_run(texts: Mapping[str, str]) -> None:
    claims = [(name, words, wrong(words)) for name, text in texts.items() for words in command_lines(text)]
    assert [f"{name}: adapterd {' '.join(words)}: {fault}" for name, words, fault in claims if fault] == []


def test_links_between_files_lead_somewhere(texts: Mapping[str, str]) -> None:
    dead = [
        f"{name} -> {target}"
        for name, text in texts.items()
        for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)
        if not (ROOT / name).parent.joinpath(target).exists()
    ]
    assert dead == []


# -- that the rules above can fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word", "named"),
    [
        ("set `--port`", "--port", True),
        ("set `--port-file`", "--port", False),
        ("set --port in prose", "--port", False),
        ("```\nadapterd serve \\\n  --port 1\n```", "--port", True),
        ("| `POST /adapters/{id}` |", "/adapters", False),
        ("| `POST /adapters` |", "/adapters", True),
        ("`POST /`", "/", True),
        ("`POST /generate`", "/", False),
        ("`prompt_tuning`", "p_tuning", False),
    ],
)
def test_only_the_whole_word_as_code_counts(text: str, word: str, named: bool) -> None:
    assert any(mentions(code, word) for _, code in coded(text)) is named


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("adapterd serve --port 8080 && echo", None),
        ("pip install adapterd && true", None),
        ("adapterd --help", None),
        ("adapterd 0.1.0 serves smollm2-135m-instruct on http://127.0.0.1:8080", None),
        ("adapterd fly", "no such command"),
        ("adapterd serve --wings=2", "serve has no --wings=2"),
    ],
)
def test_a_command_line_that_could_not_be_run_is_found(line: str, fault: str | None) -> None:
    assert [wrong(words) for words in command_lines(f"```\n{line}\n```")] == [fault]
