"""Building and loading: compiled once per machine, and whatever stands in the way is a reason, never a crash."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.model.native import NativeKernels, NativeUnavailable, load, open_library
from server.model.native.build import library_path, prebuild


def test_no_compiler_is_a_reason_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    told: list[str] = []
    assert load(tmp_path, told.append) is None
    assert told == ["native kernels unavailable: no C++ compiler found (looked for no-such-compiler)"]


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A compiler that has a version, writes down every other call in `calls` and runs `script`."""
    path = folder / "fake-c++"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho "$@" >> {folder}/calls\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return folder / "calls"


#: Leaves a file where the real compiler would.
WRITES = 'while [ "$1" != -o ]; do shift; done; echo made > "$2"'


def test_a_failing_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch, 'echo "x.cpp:1: error: no such target" >&2; exit 1')
    told: list[str] = []
    assert load(tmp_path / "cache", told.append) is None
    assert told[-1] == "native kernels unavailable: the compiler failed: x.cpp:1: error: no such target"
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_the_library_is_compiled_once_for_many_starters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, told = fake_compiler(tmp_path, monkeypatch, WRITES), list[str]()
    with ThreadPoolExecutor(4) as pool:
        paths = {pool.submit(library_path, tmp_path / "cache", told.append) for _ in range(4)}
    assert len({path.result() for path in paths}) == 1
    assert len([line for line in calls.read_text().splitlines() if "-shared" in line]) == 1
    assert len(told) == 1
    library_path(tmp_path / "cache", told.append)
    assert len(told) == 1


def test_an_unwritable_cache_falls_back_to_a_private_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch, WRITES)
    (tmp_path / "cache").write_text("a file where the directory should be")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    made = library_path(tmp_path / "cache", print)
    assert made.is_relative_to(temporary)
    (private,) = temporary.iterdir()
    private.chmod(0o777)
    told: list[str] = []
    assert load(tmp_path / "cache", told.append) is None
    assert "can be written" in told[0]


def test_another_compiler_version_or_processor_means_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch, WRITES)
    first = library_path(tmp_path, print)
    monkeypatch.setattr("server.model.native.build._cpuinfo", lambda: "model name : other\n")
    assert library_path(tmp_path, print) != first


def test_a_prebuilt_library_serves_where_there_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch, WRITES)
    monkeypatch.setattr("server.model.native.build.LEVELS", {"new": ("feature-of-2099",), "old": ("sse",)})
    monkeypatch.setattr("server.model.native.build.PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr("server.model.native.build._cpuinfo", lambda: "flags : fpu sse sse2\n")
    _, old = prebuild(["new", "old"], tmp_path / "prebuilt")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library_path(tmp_path / "cache", print) == old
    monkeypatch.setattr("server.model.native.build.source_digest", lambda: "of other sources")
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler"):
        library_path(tmp_path / "cache", print)


def test_a_library_that_computes_wrongly_is_refused(
    kernels: NativeKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.model.native.checks.reference.silu_mul", lambda gate, up: gate + up)
    monkeypatch.setattr("server.model.native.library_path", lambda cache, say: kernels.path)
    with pytest.raises(NativeUnavailable, match="self-check of elementwise failed"):
        open_library(tmp_path, print)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.so").write_text("not a library")
    monkeypatch.setattr("server.model.native.library_path", lambda cache, say: tmp_path / "bad.so")
    with pytest.raises(NativeUnavailable, match="built or loaded"):
        open_library(tmp_path, print)
