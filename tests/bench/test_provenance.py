from __future__ import annotations

import subprocess
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from server.bench import provenance
from server.bench.provenance import Provenance, commit_of


def _git(tree: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", "-C", str(tree), *identity, *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    _git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    _git(tmp_path, "add", "file")
    _git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_the_commit_is_marked_when_the_tree_is_not_it(tree: Path) -> None:
    head = _git(tree, "rev-parse", "HEAD").strip()
    assert commit_of(tree) == head
    (tree / "file").write_text("b")
    assert commit_of(tree) == head + "+"


def test_results_that_lie_about_do_not_mark_it(tree: Path) -> None:
    (tree / "results.json").write_text("{}")
    assert not (commit_of(tree) or "").endswith("+")


def test_an_install_inside_anothers_checkout_has_no_commit(tree: Path) -> None:
    (tree / "inside").mkdir()
    assert commit_of(tree / "inside") is None


def test_what_cannot_be_found_out_is_none(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(provenance, "_CPUINFO", tree / "nowhere")
    assert commit_of(tree) is None
    assert Provenance.now().cpu is None


def test_the_date_is_utc_and_the_versions_are_there() -> None:
    found = Provenance.now()
    assert datetime.fromisoformat(found.date).utcoffset() == timedelta(0)
    assert found.versions["torch"].startswith("2.")
