"""Opening and closing: a store finds everything again, and several at one place do not disturb each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters_store.errors import NotFound, Unavailable
from adapters_store.store import Store

from .conftest import Content, Upload
from .places import Place

EVERYWHERE = True


def test_a_store_finds_everything_again(place: Place, upload: Upload, content: Content) -> None:
    with place.open() as store:
        record, _ = upload(store, "acme", "support", a=b"1")
        binding = store.bind_user("acme", "ann", "support")
    with place.open() as store:
        assert store.get("acme", "support") == record
        assert store.get_user("acme", "ann") == binding
        assert content(store, record) == {"a": b"1"}
    assert place.root.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("files_only")
def test_a_directory_holds_what_the_readme_says(store: Store, root: Path, upload: Upload) -> None:
    upload(store, "acme", "support", a=b"1")
    store.close()
    assert sorted(path.name for path in root.iterdir()) == ["blobs", "catalog.sqlite3", "staging"]


def test_two_stores_at_one_place_see_each_others_changes(store: Store, place: Place, upload: Upload) -> None:
    with place.open() as other:
        record, _ = upload(store, "acme", "support", a=b"1")
        assert other.get("acme", "support") == record
        assert upload(other, "acme", "support", a=b"1") == (record, False)
        assert upload(other, "acme", "support", a=b"2")[0].version == 2
        assert set(store.files(store.get("acme", "support").digest)) == {"a"}
        other.delete("acme", "support")
        with pytest.raises(NotFound):
            store.get("acme", "support")


def test_opening_closing_and_collecting_elsewhere_spares_a_running_upload(store: Store, place: Place) -> None:
    with store.stage() as staged:
        staged.write("a", [b"1"])
        with place.open() as other:
            assert other.gc(0).uploads == 0
        record, _ = store.publish(staged, tenant="acme", name="x", method="lora", parts=(), details={})
    assert store.files(record.digest)["a"].read_bytes() == b"1"


def test_closing_twice_is_fine_and_an_upload_after_it_fails(place: Place) -> None:
    store = place.open()
    store.close()
    store.close()
    with pytest.raises(Unavailable), store.stage() as staged:
        staged.write("a", [b"1"])


def test_a_store_needs_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="disk failed"):
        Store.open(tmp_path / "file")
