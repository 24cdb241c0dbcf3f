"""`adapterd keys`: made, listed and revoked on a store that no server need serve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adapters_store.store import Store
from tests.commands.invoke import done, invoke


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_the_last_line_is_the_key(root: Path) -> None:
    said = done("keys", "create", "--tenant", "acme", "--scopes", "infer,adapters", "--note", "ci", "--store", str(root))
    text = said.splitlines()[-1]
    assert re.fullmatch(r"adk_[0-9a-f]{12}_[0-9a-f]{64}", text)
    with Store.open(root) as store:
        found = store.find_key(text)
    assert found is not None
    key, tenant = found
    assert (key.tenant, key.scopes, key.note, tenant.name) == ("acme", ("infer", "adapters"), "ci", "acme")


def test_a_keys_life(root: Path) -> None:
    where = ("--store", str(root))
    text = done("keys", "create", "--tenant", "acme", *where).splitlines()[-1]
    done("keys", "create", "--tenant", "zeta", "--scopes", "admin", *where)
    key_id = text.split("_")[1]
    listed = done("keys", "list", *where)
    assert (listed.count("works"), listed.count("acme"), listed.count("zeta")) == (2, 1, 1)
    assert key_id in listed
    assert text.rpartition("_")[2] not in listed
    assert "zeta" not in done("keys", "list", "--tenant", "acme", *where)
    assert done("keys", "revoke", key_id, *where) == f"key {key_id} of tenant acme is revoked\n"
    assert "revoked 20" in done("keys", "list", "--tenant", "acme", *where)
    with Store.open(root) as store:
        assert store.find_key(text) is None


def test_the_store_may_come_from_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERD_STORE", str(root))
    done("keys", "create", "--tenant", "acme")
    assert "acme" in done("keys", "list")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tenant", "acme", "--scopes", "infer,fly"], "--scopes must be among infer, adapters, admin (got 'fly')"),
        (["--tenant", "acme", "--scopes", ""], "--scopes must be among"),
    ],
)
def test_scopes_that_there_are_not(root: Path, arguments: list[str], complaint: str) -> None:
    result = invoke("keys", "create", *arguments, "--store", str(root))
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert not root.exists()


def test_the_reserved_tenant_gets_no_key(root: Path) -> None:
    result = invoke("keys", "create", "--tenant", "shared", "--store", str(root))
    assert result.exit_code == 1
    assert "is reserved" in str(result.exception)


def test_no_store_is_made_to_list_nothing(root: Path) -> None:
    for arguments in (("list",), ("revoke", "0123456789ab")):
        assert invoke("keys", *arguments, "--store", str(root)).exit_code == 1
    assert not root.exists()
