from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store import disk
from adapters_store.errors import Conflict, Invalid, TooLarge, Unavailable
from adapters_store.staging import MAX_FILES, Staged
from adapters_store.store import Store


def staged_files(root: Path) -> list[Path]:
    return [path for path in (root / "staging").rglob("*") if path.is_file()]


def test_files_are_readable_before_they_are_published(store: Store) -> None:
    with store.stage() as staged:
        staged.write("a.json", [b"{", b"}"])
        with staged.file("b.safetensors") as file:
            assert file.write(b"12345") == 5
            file.write(b"678")
            assert set(staged.paths) == {"a.json"}
        assert {name: path.read_bytes() for name, path in staged.paths.items()} == {
            "a.json": b"{}",
            "b.safetensors": b"12345678",
        }
        assert staged.size_bytes == 10


def test_no_path_is_made_of_a_name(store: Store) -> None:
    with store.stage() as staged:
        for name in ("adapter_config.json", "lora/adapter_config.json"):
            staged.write(name, [name.encode()])
            assert "adapter_config" not in str(staged.paths[name])
        assert {name: path.read_bytes().decode() for name, path in staged.paths.items()} == {n: n for n in staged.paths}


def test_leaving_without_publishing_removes_everything(store: Store, root: Path) -> None:
    with store.stage() as staged:
        staged.write("a", [b"1"])
        assert len(staged_files(root)) == 1
    assert staged_files(root) == []


def test_leaving_by_an_exception_removes_everything(store: Store, root: Path) -> None:
    def body() -> Iterator[bytes]:
        yield b"first half"
        raise ConnectionResetError("client gone")

    with pytest.raises(ConnectionResetError), store.stage() as staged:
        staged.write("a", body())
    assert staged_files(root) == []


@pytest.mark.parametrize("limit", [10, 11, 1000])
def test_an_upload_up_to_the_limit_is_accepted(store: Store, limit: int) -> None:
    with store.stage(max_bytes=limit) as staged:
        staged.write("a", [b"12345"])
        staged.write("b", [b"12345"])
        assert staged.size_bytes == 10


def test_the_limit_counts_all_files_and_stops_before_writing(store: Store, root: Path) -> None:
    with store.stage(max_bytes=9) as staged:
        staged.write("a", [b"12345"])
        with pytest.raises(TooLarge, match="at most 9 bytes are accepted, got 10 or more") as refused:
            staged.write("b", [b"1234", b"5", b"6"])
        assert (refused.value.limit, refused.value.value) == (9, 10)
        assert sum(path.stat().st_size for path in staged_files(root)) == 9
        with pytest.raises(Conflict, match="is broken"):
            staged.write("c", [b""])


def test_a_caller_that_ignores_a_failed_write_cannot_publish(store: Store) -> None:
    with store.stage(max_bytes=4) as staged:
        with staged.file("a") as file:
            file.write(b"1234")
            with pytest.raises(TooLarge):
                file.write(b"5")
        with pytest.raises(Conflict, match="is broken"):
            staged.seal("acme")


def test_file_names_are_checked_and_used_once(store: Store) -> None:
    with store.stage() as staged:
        with pytest.raises(Invalid, match=r"^files: a file name must"):
            staged.write("../a", [b"1"])
        staged.write("a", [b"1"])
        with pytest.raises(Invalid, match="once per upload, got 'a'"):
            staged.write("a", [b"2"])
        assert staged.paths["a"].read_bytes() == b"1"


def test_one_file_at_a_time(store: Store) -> None:
    with store.stage() as staged, staged.file("a"):
        with pytest.raises(Conflict, match="is receiving a file"):
            staged.write("b", [b""])
        with pytest.raises(Conflict, match="is receiving a file"):
            staged.seal("acme")


def test_a_file_ends_with_its_block(store: Store) -> None:
    with store.stage() as staged:
        with staged.file("a") as first:
            first.write(b"1")
        with pytest.raises(Conflict, match="this file is closed"):
            first.write(b"2")
        with staged.file("b"), pytest.raises(Conflict, match="this file is closed"):
            first.write(b"2")
        assert staged.paths["a"].read_bytes() == b"1"


def test_the_number_of_files_is_limited(store: Store) -> None:
    with store.stage() as staged:
        for number in range(MAX_FILES):
            staged.write(str(number), [b""])
        with pytest.raises(Invalid, match=f"at most {MAX_FILES} files per upload, got {MAX_FILES + 1}"):
            staged.write("one more", [b""])


def test_an_upload_needs_a_file(store: Store) -> None:
    with store.stage() as staged, pytest.raises(Invalid, match="at least one file"):
        staged.seal("acme")


def test_a_failing_disk_is_unavailable(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/secret/path")

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(Unavailable, match="disk failed: No space left on device") as failed, store.stage() as staged:
        staged.write("a", [b"1"])
    assert "secret" not in str(failed.value)
    assert staged_files(root) == []


def test_discarding_never_hides_the_result(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with store.stage() as staged:
        staged.write("a", [b"1"])
        monkeypatch.setattr(disk, "remove", stuck)


def test_staged_needs_no_store(tmp_path: Path) -> None:
    from adapters_store.drafts import Draft

    with Staged(lambda: Draft(tmp_path / "draft")) as staged:
        staged.write("a", [b"1"])
        assert [entry.size for entry in staged.entries.values()] == [1]
