"""The container: what it writes is tar, and of tar it reads plain files only, in bounded memory."""

from __future__ import annotations

import io
import tarfile

import pytest

from adapters_store import archive
from adapters_store.archive import MAX_MEMBER, blob_of, read_members, write_end, write_member
from adapters_store.digest import Digest
from adapters_store.errors import Corrupt, Invalid, Unavailable


def written(**files: bytes) -> bytes:
    target = io.BytesIO()
    for name, data in files.items():
        write_member(target, name, len(data), [data])
    write_end(target)
    return target.getvalue()


def read(data: bytes) -> dict[str, bytes]:
    return {member.name: b"".join(member.chunks) for member in read_members(io.BytesIO(data))}


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, (1 << 20) + 1])
def test_what_is_written_is_read_here_and_by_tar(size: int) -> None:
    data = written(a=bytes(size), b=b"after it")
    assert read(data) == {"a": bytes(size), "b": b"after it"}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(info.name, info.size) for info in tar] == [("a", size), ("b", 8)]


def test_a_member_that_was_not_read_is_passed_over() -> None:
    assert [member.name for member in read_members(io.BytesIO(written(a=bytes(2000), b=b"1")))] == ["a", "b"]


def test_a_source_that_gives_little_at_a_time() -> None:
    class Pipe(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 7))

    found = {member.name: b"".join(member.chunks) for member in read_members(Pipe(written(a=bytes(2000), b=b"1")))}
    assert found == {"a": bytes(2000), "b": b"1"}


def test_content_of_another_length_than_announced() -> None:
    with pytest.raises(Corrupt, match="a should have 3 bytes and has 2"):
        write_member(io.BytesIO(), "a", 3, [b"1", b"2"])


def test_a_file_that_no_header_can_hold() -> None:
    with pytest.raises(Invalid, match=f"at most {MAX_MEMBER} bytes"):
        write_member(io.BytesIO(), "a", MAX_MEMBER + 1, [])


def test_a_disk_that_is_full() -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device", "/secret/path")

    with pytest.raises(Unavailable, match="No space left on device") as failure:
        write_member(Full(), "a", 1, [b"1"])
    assert "secret" not in str(failure.value)


def entry(name: str = "a", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "data",
    [
        entry(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry(type=tarfile.LNKTYPE, linkname="b"),
        entry(type=tarfile.DIRTYPE),
        entry(type=tarfile.CHRTYPE),
        entry(type=tarfile.GNUTYPE_SPARSE),
        entry("x" * 200),  # a GNU long name
        tarfile.TarInfo("ü" * 80).tobuf(tarfile.PAX_FORMAT),
        entry(size=MAX_MEMBER + 1),
        entry(size=-1),
        entry("ü"),
        b"x" * 512,
        bytes(256) + b"x" * 256,
    ],
)
def test_whatever_is_no_plain_file_is_refused_by_its_header(data: bytes) -> None:
    with pytest.raises(Invalid, match=r"^archive: m"):
        read(data + bytes(10_240))


def test_an_end_that_is_none() -> None:
    with pytest.raises(Invalid, match="two blocks of zeros"):
        read(bytes(512) + entry())


def test_memory_does_not_follow_what_a_header_claims() -> None:
    """The largest member there can be, of which next to nothing comes."""
    asked: list[int] = []

    class Spy(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size or 0)
            return super().read(size)

    member = next(read_members(Spy(entry(size=MAX_MEMBER))))
    with pytest.raises(Invalid, match="is cut short"):
        next(member.chunks)
    assert max(asked) == archive._CHUNK


@pytest.mark.parametrize("name", ["", "blobs/", "blobs/" + "A" * 64, "blobs/" + "a" * 65, "a" * 64, "./blobs/" + "a" * 64])
def test_only_a_digest_names_a_blob(name: str) -> None:
    assert blob_of(archive.blob_name(Digest("a" * 64))) == Digest("a" * 64)
    with pytest.raises(Invalid, match=r"may hold index\.json and blobs/<sha256> only"):
        blob_of(name)
