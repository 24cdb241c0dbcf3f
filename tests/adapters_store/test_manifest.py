import json

import pytest

from adapters_store import manifest
from adapters_store.digest import Digest
from adapters_store.errors import Corrupt
from adapters_store.manifest import Entry, Manifest

A, B = Entry(Digest.of(b"a"), 1), Entry(Digest.of(b"bb"), 2)


def read(data: bytes) -> Manifest:
    return manifest.decode(data, Digest.of(data))


def test_equal_files_of_a_tenant_give_equal_bytes_in_any_order() -> None:
    data = manifest.encode("acme", {"y": B, "größe": A})
    assert data == manifest.encode("acme", {"größe": A, "y": B})
    table = b'{"gr\\u00f6\\u00dfe":["%s",1],"y":["%s",2]}' % (A.blob.encode(), B.blob.encode())
    assert data == b'{"files":%s,"tenant":"acme"}' % table
    assert read(data) == Manifest("acme", {"größe": A, "y": B})


def test_no_two_tenants_have_the_same_manifest() -> None:
    tenants = ("acme", "zeta", "a", "ac", "default", 'x","tenant":"acme')
    assert len({manifest.encode(tenant, {"x": A}) for tenant in tenants}) == len(tenants)


def test_files_of_parts_are_told_apart_by_their_part() -> None:
    data = manifest.encode("acme", {"lora/x": A, "prefix/x": B})
    assert read(data).files == {"lora/x": A, "prefix/x": B}
    assert data != manifest.encode("acme", {"lora/x": B, "prefix/x": A})


@pytest.mark.parametrize("files", [{"x": A}, {"tenant": A, "files": B}])
def test_a_manifest_that_names_no_owner_is_read(files: dict[str, Entry]) -> None:
    """As releases wrote it that had one tenant; a file's name is never taken for a field."""
    assert read(json.dumps(files).encode()) == Manifest(None, files)


def test_other_bytes_than_the_digest_names_are_corrupt() -> None:
    with pytest.raises(Corrupt, match="its sha256 is"):
        manifest.decode(manifest.encode("acme", {"x": A}), Digest.of(b"another"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"7",
        b"[" * 100_000,
        b'{"tenant":"acme"}',
        b'{"files":[],"tenant":"acme"}',
        b'{"files":{},"tenant":"../acme"}',
        b'{"x":1}',
        b'{"x":["ab",1]}',
        b'{"../x":["%s",1]}' % A.blob.encode(),
        b'{"a/b/x":["%s",1]}' % A.blob.encode(),
        b'{"x":["%s"]}' % A.blob.encode(),
        b'{"x":["%s","y"]}' % A.blob.encode(),
        b'{"x":["%s",null]}' % A.blob.encode(),
    ],
)
def test_bytes_that_are_no_manifest_are_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt, match="not a manifest"):
        manifest.decode(data, Digest.of(data))
