import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store import disk
from adapters_store.blobs import FileBlobs
from adapters_store.digest import Digest
from adapters_store.drafts import Draft
from adapters_store.errors import Corrupt, Unavailable


@pytest.fixture
def blobs(root: Path) -> Iterator[FileBlobs]:
    root.mkdir()
    opened = FileBlobs(root)
    yield opened
    opened.close()


def written(blobs: FileBlobs, *chunks: bytes) -> Draft:
    draft = blobs.draft()
    for chunk in chunks:
        draft.write(chunk)
    return draft


def kept(blobs: FileBlobs, data: bytes) -> Digest:
    draft = written(blobs, data)
    blobs.keep([draft])
    draft.discard()
    return draft.digest


def test_a_kept_draft_lies_under_its_digest(blobs: FileBlobs, root: Path) -> None:
    draft = written(blobs, b"one", b"", b"two")
    assert (draft.digest, draft.size) == (Digest.of(b"onetwo"), 6)
    blobs.keep([draft])
    draft.discard()
    path = root / "blobs" / "sha256" / draft.digest[:2] / draft.digest[2:]
    assert blobs.path(draft.digest) == path
    assert path.read_bytes() == b"onetwo"
    assert (blobs.size(draft.digest), blobs.intact(draft.digest), list(blobs)) == (6, True, [draft.digest])


def test_a_draft_is_readable_while_it_is_written_and_invisible(blobs: FileBlobs) -> None:
    draft = written(blobs, b"half")
    assert draft.path.read_bytes() == b"half"
    assert list(blobs) == []
    assert (blobs.size(draft.digest), blobs.modified(draft.digest)) == (None, None)
    draft.discard()


def test_a_discarded_draft_leaves_nothing(blobs: FileBlobs) -> None:
    draft = written(blobs, b"x")
    draft.discard()
    draft.discard()
    assert not draft.path.exists()


def test_a_draft_that_lost_bytes_is_not_kept(blobs: FileBlobs) -> None:
    draft = written(blobs, b"four")
    os.truncate(draft.path, 3)
    with pytest.raises(Corrupt, match="4 bytes were written, 3 are on disk"):
        blobs.keep([draft])
    draft.discard()
    assert list(blobs) == []


def test_writing_loops_until_a_chunk_is_out(blobs: FileBlobs, tmp_path: Path) -> None:
    class OneByteAtATime(disk.FileIO):
        def write(self, data: memoryview) -> int:  # type: ignore[override]
            return super().write(data[:1])

    with OneByteAtATime(tmp_path / "file", "xb") as file:
        disk.write(file, b"adapter")
    assert (tmp_path / "file").read_bytes() == b"adapter"


def test_keeping_equal_bytes_again_repairs_the_blob_and_spares_its_readers(blobs: FileBlobs) -> None:
    digest = kept(blobs, b"weights")
    blobs.path(digest).write_bytes(b"damaged")
    with blobs.path(digest).open("rb") as reader:
        assert not blobs.intact(digest)
        kept(blobs, b"weights")
        assert blobs.intact(digest)
        assert reader.read() == b"damaged"


def test_delete_is_idempotent(blobs: FileBlobs) -> None:
    digest = kept(blobs, b"x")
    blobs.delete(digest)
    blobs.delete(digest)
    assert list(blobs) == []


def test_foreign_files_in_the_directory_are_left_alone(blobs: FileBlobs, root: Path) -> None:
    kept(blobs, b"x")
    (shelf,) = (root / "blobs" / "sha256").iterdir()
    stray = shelf / "notes.txt"
    stray.write_text("mine")
    assert list(blobs) == [Digest.of(b"x")]
    assert stray.exists()


def test_bytes_are_durable_before_their_name_is(blobs: FileBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("sync", "move", "sync_directory"):
        real = getattr(disk, name)
        monkeypatch.setattr(disk, name, lambda *a, name=name, real=real: (done.append(name), real(*a)))
    drafts = [written(blobs, b"a"), written(blobs, b"b")]
    blobs.keep(drafts)
    assert done == ["sync", "move", "sync", "move", "sync_directory", "sync_directory", "sync_directory"]
    for draft in drafts:
        draft.discard()


def test_the_drafts_of_the_living_are_kept_and_those_of_the_dead_swept(blobs: FileBlobs, root: Path) -> None:
    dead = root / "staging" / "dead"
    dead.mkdir()
    (dead / "0").write_bytes(b"half an upload")
    draft = written(blobs, b"x")
    (root / "staging" / "notes.txt").write_text("mine")
    neighbour = FileBlobs(root)
    assert not dead.exists()
    assert draft.path.exists()
    dead.mkdir()
    assert (neighbour.sweep(), neighbour.sweep()) == (1, 0)
    neighbour.close()
    neighbour.close()
    assert draft.path.exists()
    draft.discard()


def test_close_removes_the_drafts(root: Path) -> None:
    root.mkdir()
    blobs = FileBlobs(root)
    draft = written(blobs, b"x")
    blobs.close()
    draft.discard()
    assert list((root / "staging").iterdir()) == []


def test_collecting_excludes_publishing_and_publishers_do_not_exclude_each_other(blobs: FileBlobs, root: Path) -> None:
    home = root / "blobs" / "sha256"
    with blobs.publishing(), blobs.publishing():
        assert disk.hold(home) is None
    with blobs.collecting():
        assert disk.hold(home) is None
    held = disk.hold(home)
    assert held is not None
    os.close(held)


def test_a_directory_that_cannot_be_used_is_unavailable_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a file")
    with pytest.raises(Unavailable, match="Not a directory") as failed:
        FileBlobs(tmp_path / "secret")
    assert "secret" not in str(failed.value)
