"""`adapterd store`: on a store nobody serves, and beside a store that is open."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters_store.records import AdapterRecord
from adapters_store.store import Store
from tests.commands.invoke import done, invoke


def publish(store: Store, tenant: str, name: str, weights: bytes) -> AdapterRecord:
    with store.stage() as staged:
        staged.write("adapter_model.safetensors", [weights])
        return store.publish(staged, tenant=tenant, name=name, method="lora", parts=("lora",), details={})[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with two tenants' adapters."""
    with Store.open(tmp_path / "store") as store:
        publish(store, "acme", "support", b"one")
        publish(store, "zeta", "helper", b"two")
    return tmp_path / "store"


def test_verify_says_what_is_damaged_and_whose_it_is(root: Path) -> None:
    assert done("store", "verify", "--store", str(root)) == "2 adapters, no damage\n"
    with Store.open(root) as store:
        record = store.get("acme", "support")
        store.files(record.digest)["adapter_model.safetensors"].write_bytes(b"0ne")
    result = invoke("store", "verify", "--store", str(root))
    assert result.exit_code == 1
    assert "damaged  acme support@1" in " ".join(result.stdout.split(" "))
    assert "1 files are damaged or missing" in result.stderr


def test_gc_frees_what_is_old_enough_and_a_dry_run_nothing(root: Path) -> None:
    with Store.open(root) as store:
        size = sum(path.stat().st_size for path in (root / "blobs").rglob("*") if path.is_file())
        store.delete("acme", "support")
        store.delete("zeta", "helper")
        assert done("store", "gc", "--store", str(root)) == "freed 0 files, 0 bytes\n"  # beside an open store
    said = f"4 files, {size} bytes\n"
    for _ in range(2):
        assert done("store", "gc", "--store", str(root), "--grace", "0", "--dry-run") == f"would free {said}"
    assert done("store", "gc", "--store", str(root), "--grace", "0") == f"freed {said}"
    assert done("store", "gc", "--store", str(root), "--grace", "0") == "freed 0 files, 0 bytes\n"


@pytest.mark.parametrize(
    ("who", "tenants"), [(("acme",), {"acme"}), (("acme", "zeta"), {"acme", "zeta"}), (("--all",), {"acme", "zeta"})]
)
def test_what_was_exported_is_imported_elsewhere(root: Path, tmp_path: Path, who: tuple[str, ...], tenants: set[str]) -> None:
    archive, other = tmp_path / "backup.tar", tmp_path / "other"
    said = done("store", "export", str(archive), *who, "--store", str(root))
    assert said.startswith(f"{len(tenants)} tenants, {len(tenants)} versions, 0 users, {2 * len(tenants)} files, ")
    assert archive.stat().st_mode & 0o077 == 0
    for new in (len(tenants), 0):
        said = done("store", "import", str(archive), "--store", str(other))
        assert said.startswith(f"{len(tenants)} tenants, {len(tenants)} versions ({new} new), 0 users bound, ")
    with Store.open(root) as mine, Store.open(other) as theirs:
        for tenant in ("acme", "zeta"):
            assert theirs.list(tenant) == (mine.list(tenant) if tenant in tenants else ((), None))
    assert done("store", "verify", "--store", str(other)).endswith("no damage\n")


def test_an_export_overwrites_nothing_and_leaves_nothing_half_written(root: Path, tmp_path: Path) -> None:
    archive = tmp_path / "backup.tar"
    failed = invoke("store", "export", str(archive), "nobody", "--store", str(root))
    assert failed.exit_code == 1
    archive.write_bytes(b"mine")
    assert invoke("store", "export", str(archive), "--all", "--store", str(root)).exit_code == 1
    assert archive.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "store"]


@pytest.mark.parametrize("who", [(), ("--all", "acme")])
def test_an_export_needs_to_know_whose(root: Path, tmp_path: Path, who: tuple[str, ...]) -> None:
    result = invoke("store", "export", str(tmp_path / "backup.tar"), *who, "--store", str(root))
    assert (result.exit_code, "give --all" in result.stderr) == (2, True)


@pytest.mark.parametrize("command", [("verify",), ("gc",), ("export", "backup.tar", "--all")])
def test_no_store_is_made_where_one_was_expected(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert invoke("store", *command, "--store", str(tmp_path / "nowhere")).exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_is_none_is_refused(root: Path, tmp_path: Path) -> None:
    with Store.open(root) as store:
        store.put_tenant("acme", {"wings": 2})
        with (tmp_path / "backup.tar").open("wb") as file:
            store.export_to(file)
    assert invoke("store", "import", str(tmp_path / "backup.tar"), "--store", str(tmp_path / "other")).exit_code == 1
    with Store.open(tmp_path / "other") as other:
        assert (other.count(), other.list_tenants()) == (0, ())
