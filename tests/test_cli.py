"""The `adapterd` command: its help, its refusals, and what it does to a running server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from typer.testing import CliRunner, Result

from server import __version__, cli
from server.settings import Settings
from tests.e2e.uploads import HIDDEN, Files, lora, packed, tensors
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
    """An upload's files in a directory; "part/file" in one below."""

    def write(files: Files) -> Path:
        path = tmp_path / "adapter"
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
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


def test_an_upload_sends_only_what_an_adapter_has(ask: Command, directory: Callable[[Files], Path]) -> None:
    """Beside the adapter lie a tokenizer, the trainer's arguments and an earlier state."""
    files = lora(6)
    more = {"tokenizer.json": b"{}", "training_args.bin": b"x", "README.md": b"", **in_part("checkpoint-10", lora(7))}
    path = directory(files | more)
    first = json.loads(ask("adapters", "upload", "cli-lean", str(path)).stdout)
    assert first["size_bytes"] == sum(map(len, files.values()))
    assert ask("adapters", "delete", "cli-lean").exit_code == 0


def test_an_upload_of_several_parts(ask: Command, directory: Callable[[Files], Path], tiny_server: ServerProcess) -> None:
    path = directory(in_part("voice", lora(1)) | in_part("prompt", soft_prompt(2)))
    record = json.loads(ask("adapters", "upload", "cli-parts", str(path)).stdout)
    assert (record["method"], record["parts"]) == ("prompt_tuning+lora", ["prompt_tuning", "lora"])
    assert tiny_server.generate(adapter="cli-parts").status_code == 200
    assert ask("adapters", "delete", "cli-parts").exit_code == 0


def in_part(part: str, files: Files) -> Files:
    return {f"{part}/{name}": data for name, data in files.items()}


def soft_prompt(length: int) -> Files:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": length}
    weights = save({"prompt_embeddings": torch.ones(length, HIDDEN)})
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}


def test_check_says_what_an_upload_would_be(directory: Callable[[Files], Path], tiny_base: Path) -> None:
    arguments = ("adapters", "check", str(directory(lora(1))), "--model", str(tiny_base))
    report = json.loads(done(*arguments, "--json"))
    assert (report["accepted"], report["methods"]) == (True, ["lora"])
    assert "would be lora against" in done(*arguments)


def test_a_refused_check_is_json_too(directory: Callable[[Files], Path], tiny_base: Path) -> None:
    path = directory(packed(tensors(1), r=0))
    result = invoke("adapters", "check", str(path), "--model", str(tiny_base), "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["accepted"], report["field"]) == (1, False, "r")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(
    ask: Command, directory: Callable[[Files], Path]
) -> None:
    files = lora(8)
    path = directory({"adapter_config.json": files["adapter_config.json"]})
    torch.save(load(files["adapter_model.safetensors"]), path / "adapter_model.bin")
    refused = invoke("adapters", "upload", "cli-bin", str(path), "--url", "http://127.0.0.1:1")  # and nothing is sent
    command = str(refused.exception).partition("trust them: adapterd ")[2]
    assert command == "adapters convert DIR"

    assert done(*command.replace("DIR", str(path)).split()) == "adapter_model.bin -> adapter_model.safetensors (4 tensors)\n"

    assert json.loads(ask("adapters", "upload", "cli-bin", str(path)).stdout)["method"] == "lora"
    assert ask("adapters", "delete", "cli-bin").exit_code == 0


def test_convert_into_another_directory(directory: Callable[[Files], Path], tmp_path: Path) -> None:
    path = directory({"adapter_config.json": b"{}"})
    torch.save({"prompt_embeddings": torch.ones(2)}, path / "pytorch_adapter.bin")
    assert done("adapters", "convert", str(path), "--out", str(tmp_path / "out")).startswith("pytorch_adapter.bin -> ")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter.safetensors"}
    nothing = invoke("adapters", "convert", str(tmp_path / "out"))
    assert nothing.exit_code == 1


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
