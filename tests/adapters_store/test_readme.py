import doctest
from pathlib import Path

import pytest

import adapters_store

FOLDER = Path(adapters_store.__file__).parent


def test_the_session_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(FOLDER / "README.md"), module_relative=False)
    assert result.attempted > 20
    assert result.failed == 0


def test_every_module_is_named() -> None:
    text = (FOLDER / "README.md").read_text()
    modules = {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if f"({name})" not in text} == set()
