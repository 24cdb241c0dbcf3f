"""`adapterd adapters`: what its commands do to a running server, and offline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save

from tests.commands.invoke import Command, done, invoke
from tests.e2e.uploads import HIDDEN, Files, lora, packed, tensors
from tests.process import ServerProcess, run


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
