import pytest

from adapters_store import manifest
from adapters_store.digest import Digest
from adapters_store.errors import Corrupt
from adapters_store.manifest import Entry

A, B = Entry(Digest.of(b"a"), 1), Entry(Digest.of(b"bb"), 2)


def test_equal_files_give_equal_bytes_in_any_order() -> None:
    data = manifest.encode({"y": B, "größe": A})
    assert data == manifest.encode({"größe": A, "y": B})
    assert data == b'{"gr\\u00f6\\u00dfe":["%s",1],"y":["%s",2]}' % (A.blob.encode(), B.blob.encode())
    assert manifest.decode(data, Digest.of(data)) == {"größe": A, "y": B}


def test_files_of_parts_are_told_apart_by_their_part() -> None:
    data = manifest.encode({"lora/x": A, "prefix/x": B})
    assert manifest.decode(data, Digest.of(data)) == {"lora/x": A, "prefix/x": B}
    assert data != manifest.encode({"lora/x": B, "prefix/x": A})


def test_other_bytes_than_the_digest_names_are_corrupt() -> None:
    with pytest.raises(Corrupt, match="its sha256 is"):
        manifest.decode(manifest.encode({"x": A}), Digest.of(b"another"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"7",
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
