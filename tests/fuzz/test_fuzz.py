"""Every fuzz target for a minute, from a small corpus made in code: nothing but the server's own errors comes out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process import ROOT, environment

TARGETS = ("checkpoint", "config", "request")
SECONDS = os.environ.get("ADAPTERD_TEST_FUZZ_SECONDS", "60")


def run(target: str, directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"tests.fuzz.{target}", f"-artifact_prefix={directory}/", *flags],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=int(SECONDS) + 300, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_minute_of_fuzzing_finds_nothing(target: str, tmp_path: Path) -> None:
    done = run(target, tmp_path, f"-max_total_time={SECONDS}")
    assert done.returncode == 0, done.stderr[-4000:] + str([path.read_bytes() for path in tmp_path.iterdir()])
    executed = re.search(r"Done (\d+) runs", done.stderr)
    assert executed is not None
    assert int(executed[1]) > 1000, "the target ran, and fast enough to find anything"
    covered = [int(found) for found in re.findall(r" cov: (\d+)", done.stderr)]
    assert covered[-1] > covered[0], "new inputs reached new code: the modules are instrumented"
