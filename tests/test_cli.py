"""The `adapterd` command: its help, its refusals, and what it does to a running server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server import __version__, cli
from server.settings import Settings
from tests.e2e.uploads import Files, lora, packed, tensors
from tests.process import ServerProcess, run

Command = Callable[..., Result]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def done(*arguments: str) -> str:
    """What a command that ends well prints."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def ask(tiny_server: ServerProcess) -> Command:
    """A command that talks to the tiny server."""
    return lambda *arguments: invoke(*arguments, "--url", tiny_server.url)


@pytest.fixture
def directory(tmp_path: Path) -> Callable[[Files], Path]:
    """An upload's files in a directory."""

    def write(files: Files) -> Path:
        path = tmp_path / "adapter"
        path.mkdir(exist_ok=True)
        for name, data in files.items():
            (path / name).write_bytes(data)
        return path

    return write


# -- help


def test_help_names_every_command() -> None:
    assert set(re.findall(r"^│ (\w+) ", done("--help"), re.M)) >= {"serve", "pull", "bench", "version", "adapters", "users"}
    assert invoke().exit_code == 2  # and says the same


def test_the_installed_command_and_the_module_are_one() -> None:
    said = run("version")
    assert (said.returncode, said.stdout) == (0, f"{__version__}\n")


def test_serve_help_has_a_flag_with_its_text_and_default_for_every_setting() -> None:
    text = re.sub(r"[\s│]+", " ", done("serve", "--help"))
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        default = "unset" if field.default is None else field.default
        assert f"{field.description} [default: {default}]" in text, name


@pytest.mark.parametrize("command", ["pull", "bench", "adapters upload", "adapters check", "users bind"])
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


# -- adapters


def test_an_adapters_life(ask: Command, directory: Callable[[Files], Path]) -> None:
    """upload, show, list, upload again, delete one version, delete all."""
    first = json.loads(ask("adapters", "upload", "cli/life", str(directory(lora(1)))).stdout)
    assert (first["adapter_id"], first["version"], first["method"]) == ("cli/life", 1, "lora")
    assert json.loads(ask("adapters", "show", "cli/life").stdout) == first
    (row,) = (line for line in ask("adapters", "list").stdout.splitlines() if "cli/life" in line)
    assert row.split() == ["cli/life", "1", "lora", "stored", str(first["size_bytes"]), first["digest"][:12]]
    second = json.loads(ask("adapters", "upload", "cli/life", str(directory(lora(2)))).stdout)
    assert second["version"] == 2
    assert ask("adapters", "delete", "cli/life", "--version", "2").exit_code == 0
    assert json.loads(ask("adapters", "show", "cli/life").stdout) == first
    assert ask("adapters", "delete", "cli/life").exit_code == 0
    gone = ask("adapters", "show", "cli/life")
    assert (gone.exit_code, gone.stderr) == (1, "adapterd: 404 adapter 'cli/life' does not exist\n")


def test_an_upload_that_the_server_refuses(ask: Command, directory: Callable[[Files], Path]) -> None:
    result = ask("adapters", "upload", "bad", str(directory(packed(tensors(1), r=0))))
    assert result.exit_code == 1
    assert result.stderr.startswith("adapterd: 422 ")


def test_an_upload_of_no_directory(ask: Command, tmp_path: Path) -> None:
    result = ask("adapters", "upload", "bad", str(tmp_path / "nothing"))
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_every_page_of_a_long_list_is_shown(ask: Command, tiny_server: ServerProcess) -> None:
    files = lora(5)
    names = {f"page{i}" for i in range(102)}  # a page has 100
    for name in names:
        tiny_server.upload(name, files)
    assert names <= set(re.findall(r"^ *(\S+)", ask("adapters", "list").stdout, re.M))
    for name in names:
        tiny_server.http.delete(f"/adapters/{name}")


def test_check_says_what_an_upload_would_be(directory: Callable[[Files], Path], tiny_base: Path) -> None:
    report = json.loads(done("adapters", "check", str(directory(lora(1))), "--model", str(tiny_base)))
    assert report["methods"] == ["lora"]


def test_check_refuses_offline_with_the_reason_that_the_server_gives(
    directory: Callable[[Files], Path], tiny_base: Path, tiny_server: ServerProcess
) -> None:
    files = packed(tensors(1), r=0)
    said = run("adapters", "check", str(directory(files)), "--model", str(tiny_base))
    assert said.returncode == 1
    assert said.stderr.splitlines()[-1] == f"adapterd: {tiny_server.upload('bad', files).json()['error']}"


# -- users


def test_binding_users(ask: Command, tiny_server: ServerProcess) -> None:
    tiny_server.upload("cli-user", lora(3))
    assert json.loads(ask("users", "bind", "cli-ann", "cli-user").stdout)["adapter_id"] == "cli-user"
    assert re.search(r"^ *cli-ann +cli-user *$", ask("users", "list").stdout, re.M)
    assert ask("users", "unbind", "cli-ann").exit_code == 0
    assert "cli-ann" not in ask("users", "list").stdout
    missing = ask("users", "bind", "cli-ann", "nobody")
    assert (missing.exit_code, missing.stderr) == (1, "adapterd: 404 adapter 'nobody' does not exist\n")
    tiny_server.http.delete("/adapters/cli-user")


def test_ids_that_need_escaping_in_a_path(ask: Command, tiny_server: ServerProcess) -> None:
    """A name with a question mark or a percent sign is refused for what it is, never taken for another."""
    tiny_server.upload("a", lora(4))
    for name in ("a?b", "a#b", "%61"):
        for verb in ("show", "delete"):
            result = ask("adapters", verb, name)
            assert result.exit_code == 1
            assert name in result.stderr
        assert ask("users", "unbind", name).exit_code == 1
    assert ask("adapters", "delete", "a").exit_code == 0


# -- no server


def test_no_server_is_one_clear_line() -> None:
    said = run("adapters", "list", "--url", "http://127.0.0.1:1")
    assert said.returncode == 1
    assert said.stderr == "adapterd: http://127.0.0.1:1/adapters: [Errno 111] Connection refused\n"


def test_the_url_may_come_from_the_environment(tiny_server: ServerProcess) -> None:
    assert run("adapters", "list", ADAPTERD_URL=tiny_server.url).returncode == 0


def test_a_url_that_is_none() -> None:
    said = run("adapters", "list", "--url", "localhost")
    assert said.returncode == 1
    assert len(said.stderr.splitlines()) == 1


@pytest.fixture(autouse=True, scope="module")
def _no_settings_in_the_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in Settings.model_fields:
            patch.delenv(f"ADAPTERD_{name.upper()}", raising=False)
        yield
