"""The container of an export: a plain tar file, so that people can look inside. Owns its blocks; knows no store.

    index.json         first: what is where (snapshot.py), and the size of every blob
    blobs/<sha256>     every file and manifest, once

Of tar only regular files under ustar headers are written and read: no link, directory, device, sparse file or extension. A
name is compared with names that are due, never used as a path. Nothing is compressed, so an archive takes what it weighs.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from .digest import Digest
from .errors import Corrupt, Invalid, disk_errors

INDEX = "index.json"
MAX_INDEX = 256 << 20  # bytes; some 100,000 versions
MAX_MEMBER = 8**11 - 1  # bytes; a ustar header holds no larger number

_BLOCK = 512  # bytes; tar's unit, to which every member is padded
_CHUNK = 1 << 20  # bytes read at once
_FOLDER = "blobs/"


class Member(NamedTuple):
    """One file of an archive that is being read. `chunks` are gone when the next member is asked for."""

    name: str
    size: int  # bytes
    chunks: Iterator[bytes]


def blob_name(blob: Digest) -> str:
    return _FOLDER + blob


def blob_of(name: str) -> Digest:
    """The inverse of `blob_name`. Raises: Invalid."""
    try:
        return Digest(name.removeprefix(_FOLDER) if name.startswith(_FOLDER) else "")
    except ValueError:
        raise Invalid("archive", f"may hold {INDEX} and {_FOLDER}<sha256> only", name) from None


def write_member(target: BinaryIO, name: str, size: int, chunks: Iterable[bytes]) -> None:
    """Raises: Invalid for a size that no header can hold; Corrupt when `chunks` are not `size` bytes; Unavailable."""
    if size > MAX_MEMBER:
        raise Invalid("archive", f"a file may have at most {MAX_MEMBER} bytes", size)
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o600
    written = 0
    with disk_errors():
        target.write(header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        for chunk in chunks:
            written += target.write(chunk)
        target.write(bytes(-size % _BLOCK))
    if written != size:
        raise Corrupt(f"export: {name} should have {size} bytes and has {written}")


def write_end(target: BinaryIO) -> None:
    with disk_errors():
        target.write(bytes(2 * _BLOCK))


def read_members(source: BinaryIO) -> Iterator[Member]:
    """Every file in turn, streamed, in memory that no archive can raise. Raises: Invalid; Unavailable."""
    while any(block := _exactly(source, _BLOCK)):
        name, size = _header(block)
        chunks = _chunks(source, size)
        yield Member(name, size, chunks)
        for _ in chunks:
            pass
        _exactly(source, -size % _BLOCK)
    if any(_exactly(source, _BLOCK)):
        raise Invalid("archive", "must end in two blocks of zeros", "one")


def _header(block: bytes) -> tuple[str, int]:
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise Invalid("archive", "must be a tar file that export wrote", str(error)) from None
    if info.type != tarfile.REGTYPE or not 0 <= info.size <= MAX_MEMBER:
        raise Invalid("archive", f"may hold plain files of up to {MAX_MEMBER} bytes only", f"{info.name} type {info.type!r}")
    return info.name, info.size


def _chunks(source: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        chunk = _exactly(source, min(size, _CHUNK))
        size -= len(chunk)
        yield chunk


def _exactly(source: BinaryIO, size: int) -> bytes:
    """A pipe may give less at a time than was asked for."""
    found = bytearray()
    with disk_errors():
        while len(found) < size and (piece := source.read(size - len(found))):
            found += piece
    if len(found) < size:
        raise Invalid("archive", "is cut short", f"{len(found)} of {size} bytes")
    return bytes(found)
