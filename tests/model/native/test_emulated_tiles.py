"""The kernels' tests again with AMX's instructions in plain C++: what uses tiles is tested where no processor has them, too."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from server.model.native import NativeKernels
from server.model.native.build import find_compiler

ROOT = Path(__file__).parents[3]
HEADER = Path(__file__).with_name("amx.h")
TESTS = ("tests/model/native", "tests/model/test_linear.py", "tests/model/test_program.py", "tests/model/test_bit_identity.py")


def emulating(compiler: str, folder: Path) -> Path:
    """A compiler that puts the header in front of every source, at a path that is another for another header: the path is
    part of what identifies a compiled library.
    """
    path = folder / sha256(HEADER.read_bytes()).hexdigest()[:16] / "c++"
    path.parent.mkdir(parents=True, exist_ok=True)
    quoted = shlex.quote(compiler)
    with_header = f'exec {quoted} -include {shlex.quote(str(HEADER))} "$@" -mamx-tile -mamx-bf16'
    path.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) {with_header};; esac\nexec {quoted} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_with_emulated_tiles_the_kernels_tests_pass(kernels: NativeKernels) -> None:
    if kernels.has_tiles:
        pytest.skip("this processor has AMX: the tests have run on it")
    if "avx512bw" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("what fills the tiles needs AVX-512")
    words = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *TESTS]
    folder = ROOT / ".pytest_cache" / "emulated-amx"
    environment = os.environ | {"CXX": str(emulating(find_compiler(), folder)), "HOME": str(folder)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "has no AMX tiles" not in done.stdout
