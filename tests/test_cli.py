"""The `adapterd` command: its help, its refusals, and what needs no server."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import __version__
from server.settings import Settings
from tests.commands.invoke import done, invoke
from tests.process import run

# -- help


def test_help_names_every_command() -> None:
    assert set(re.findall(r"^│ (\w+) ", done("--help"), re.M)) >= {"serve", "pull", "bench", "version", "adapters", "users"}
    assert invoke().exit_code == 2  # and says the same


def test_the_installed_command_and_the_module_are_one() -> None:
    said = run("version")
    assert (said.returncode, said.stdout) == (0, f"{__version__}\n")


def test_the_command_line_itself_imports_nothing_that_takes_long() -> None:
    check = "import sys, server.cli; print(sorted({'httpx', 'sqlalchemy', 'numpy', 'torch', 'fastapi'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_serve_help_has_a_flag_with_its_text_and_default_for_every_setting() -> None:
    text = re.sub(r"[\s│]+", " ", done("serve", "--help"))
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        default = "unset" if field.default is None else field.default
        assert f"{field.description} [default: {default}]" in text, name


@pytest.mark.parametrize("command", ["pull", "bench", "adapters upload", "adapters check", "adapters convert", "users bind"])
def test_every_command_has_help(command: str) -> None:
    assert "Usage:" in done(*command.split(), "--help")


# -- serve


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port", "70000"], "--port Input should be less than or equal to 65535 (got '70000')"),
        (["--port", "http"], "--port Input should be a valid integer, unable to parse string as an integer (got 'http')"),
        (["--device", "tpu"], "--device Input should be 'auto', 'cpu' or 'cuda' (got 'tpu')"),
        (["--kv-cache-gb", "0"], "--kv-cache-gb Input should be greater than 0 (got '0')"),
        (["--max-running", "0"], "--max-running Input should be greater than or equal to 1 (got '0')"),
    ],
)
def test_a_bad_value_names_the_flag_and_the_limit(arguments: list[str], complaint: str) -> None:
    result = invoke("serve", *arguments)
    assert result.exit_code == 2
    assert f"adapterd: {complaint}" in result.stderr


def test_every_bad_value_is_named_at_once() -> None:
    said = invoke("serve", "--port", "-1", "--threads", "x").stderr
    assert "--port " in said
    assert "--threads " in said


def test_a_bad_variable_is_named_too() -> None:
    said = run("serve", ADAPTERD_MAX_RANK="none")
    assert said.returncode == 2
    assert said.stderr.startswith("adapterd: --max-rank Input should be a valid integer")
    assert run("--help", ADAPTERD_MAX_RANK="none").returncode == 0


def test_an_unknown_flag() -> None:
    result = invoke("serve", "--frobnicate")
    assert result.exit_code == 2
    assert "No such option: --frobnicate" in result.stderr


# -- pull


def test_pull_prints_the_directory_last(tiny_base: Path) -> None:
    assert done("pull", str(tiny_base)).splitlines()[-1] == str(tiny_base)


def test_pull_of_something_that_is_not_there(tmp_path: Path) -> None:
    said = run("pull", str(tmp_path / "nothing"))
    assert said.returncode == 1
    assert said.stderr.splitlines()[-1].startswith("adapterd: ")
    assert str(tmp_path / "nothing") in said.stderr


# -- methods


def test_methods_are_listed_and_written_into_a_readme(tmp_path: Path) -> None:
    from server.methods import METHODS
    from server.supported import BEGIN, END, markdown

    shown = {line.split()[0] for line in done("methods").splitlines() if line.strip()}
    assert shown >= set(METHODS)
    assert done("methods", "--markdown").strip() == markdown()
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert done("methods", "--update", str(readme)) == ""
    assert markdown() in readme.read_text()
    readme.write_text("no markers")
    assert invoke("methods", "--update", str(readme)).exit_code == 1


@pytest.fixture(autouse=True, scope="module")
def _no_settings_in_the_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in Settings.model_fields:
            patch.delenv(f"ADAPTERD_{name.upper()}", raising=False)
        yield
