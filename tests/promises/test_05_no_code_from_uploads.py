"""Promise 5: no code comes from uploads: no pickle, no template, no module, no file, no address, no backtracking pattern.

Class by class, with what each would have done: `tests/security/test_code_in_uploads.py`.
"""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

from tests.e2e.uploads import lora
from tests.house import Caller
from tests.security.contents import CONFIG

ROOT = Path(__file__).resolve().parents[2]
SERVER_SIDE = ("server/checkpoints", "server/methods", "adapters_store", "server/api")
#: `adapterd adapters convert`, which users run on files of their own, and an operator's backups.
TRUSTED = {"server/checkpoints/folder.py", "adapters_store/archive.py"}


def test_a_pickle_is_refused_by_name(acme: Caller) -> None:
    response = acme.upload("pickled", {CONFIG: lora(1)[CONFIG], "adapter_model.bin": pickle.dumps({})})
    assert response.status_code == 422
    assert "pickled files are not accepted" in response.json()["error"]


@pytest.mark.parametrize("package", SERVER_SIDE)
def test_nothing_that_reads_uploads_can_unpickle_import_by_name_or_evaluate(package: str) -> None:
    forbidden = {"pickle", "importlib", "peft", "marshal", "shelve", "dill", "yaml", "zipfile", "tarfile", "jinja2"}
    calls = {"eval", "exec", "__import__", "compile"}
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.relative_to(ROOT).as_posix() in TRUSTED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & forbidden, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").partition(".")[0] not in forbidden, path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in calls, path
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("os", "system")}, path
