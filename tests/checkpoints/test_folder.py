"""An adapter's directory: what is sent, what stays behind, and pickles turned into safetensors by those who trust them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from server.checkpoints.files import CONVERSION
from server.checkpoints.folder import PICKLED, Conversion, Folder, convert
from server.checkpoints.parts import parts_of
from server.errors import AdapterError

CONFIG = "adapter_config.json"


def make(directory: Path, *names: str) -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return directory


def test_what_save_pretrained_and_a_trainer_leave_behind(tmp_path):
    """A Trainer's directory: the adapter, the tokenizer, arguments, and earlier states of the same adapter."""
    make(tmp_path, CONFIG, "adapter_model.safetensors", "README.md", "tokenizer.json", "training_args.bin", ".gitattributes")
    make(tmp_path, f"checkpoint-10/{CONFIG}", "checkpoint-10/adapter_model.safetensors", "runs/events.out")
    folder = Folder.of(tmp_path)
    assert set(folder.files) == {CONFIG, "adapter_model.safetensors"}
    assert set(folder.left_out) == {"README.md", "tokenizer.json", "training_args.bin", ".gitattributes"}
    assert folder.files[CONFIG] == tmp_path / CONFIG


def test_sub_directories_with_an_adapter_are_parts(tmp_path):
    make(tmp_path, f"lora/{CONFIG}", "lora/adapter_model.safetensors", "lora/README.md", f"p/{CONFIG}", "p/adapter.safetensors")
    make(tmp_path, f"p/deeper/{CONFIG}", "notes/todo.txt")
    folder = Folder.of(tmp_path)
    assert set(folder.files) == {f"lora/{CONFIG}", "lora/adapter_model.safetensors", f"p/{CONFIG}", "p/adapter.safetensors"}
    assert folder.left_out == ("lora/README.md",)
    assert set(parts_of(folder.files)) == {"lora", "p"}


@pytest.mark.parametrize("name", PICKLED)
def test_a_pickle_is_sent_only_where_it_is_all_there_is_and_then_refused(name, tmp_path):
    make(tmp_path, CONFIG, name)
    with pytest.raises(AdapterError, match=f"{name}: pickled files are not accepted.*{CONVERSION}"):
        parts_of(Folder.of(tmp_path).files)
    make(tmp_path, PICKLED[name])
    assert set(Folder.of(tmp_path).files) == {CONFIG, PICKLED[name]}


@pytest.mark.parametrize("part", ["", "lora/"])
@pytest.mark.parametrize("name", PICKLED)
def test_conversion_keeps_every_tensor(name, part, tmp_path):
    """Also one that is not contiguous, and two that share memory."""
    whole = torch.arange(6.0).view(3, 2)
    stored = {"turned": whole.T, "row": whole[1], "half": torch.ones(2, dtype=torch.bfloat16)}
    source, out = make(tmp_path / "in", f"{part}{CONFIG}", "README.md"), tmp_path / "out"
    torch.save(stored, source / f"{part}{name}")

    assert convert(source, out) == (Conversion(f"{part}{name}", f"{part}{PICKLED[name]}", 3),)

    written = load_file(out / f"{part}{PICKLED[name]}")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], stored[key]) and written[key].dtype == stored[key].dtype for key in stored)
    assert (out / f"{part}{CONFIG}").read_bytes() == f"{part}{CONFIG}".encode()
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        f"{part}{CONFIG}",
        f"{part}{PICKLED[name]}",
    }
    assert (source / f"{part}{name}").exists()


def test_conversion_in_place_deletes_nothing_and_has_nothing_left_to_do(tmp_path):
    make(tmp_path, CONFIG)
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter_model.bin")
    convert(tmp_path, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, "adapter_model.bin", "adapter_model.safetensors"}
    assert set(parts_of(Folder.of(tmp_path).files)) == {""}
    with pytest.raises(AdapterError, match="holds nothing to convert"):
        convert(tmp_path, tmp_path)


def test_nothing_is_overwritten(tmp_path):
    source, out = make(tmp_path / "in", CONFIG), make(tmp_path / "out", "adapter_model.safetensors")
    torch.save({"a": torch.ones(1)}, source / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: is in .* already"):
        convert(source, out)
    assert (out / "adapter_model.safetensors").read_bytes() == b"adapter_model.safetensors"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ([torch.ones(1)], "holds a list, a file of weights holds tensors by name"),
        ({}, "holds a dict"),
        ({"a": {"b": torch.ones(1)}}, "holds 'a', a dict"),
        ({"a": 1}, "holds 'a', a int"),
        ({1: torch.ones(1)}, "holds '1', a Tensor"),
        ({"a": Evil()}, "cannot be read as tensors and nothing else"),
    ],
)
def test_what_is_no_file_of_tensors_is_refused_and_never_run(stored, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(stored, make(tmp_path, CONFIG) / "adapter_model.bin")
    with pytest.raises(AdapterError, match=message) as refused:
        convert(tmp_path, tmp_path)
    assert refused.value.field == "adapter_model.bin"
    assert not (tmp_path / "evil").exists()
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, "adapter_model.bin"}


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps({"a": 1}, protocol=2), b"PK\x03\x04broken"])
def test_a_damaged_file_is_refused(data, tmp_path):
    (make(tmp_path, CONFIG) / "adapter_model.bin").write_bytes(data)
    with pytest.raises(AdapterError, match=r"^adapter_model.bin: "):
        convert(tmp_path, tmp_path)
