import hashlib
from pathlib import Path

import pytest

from adapters_store.digest import Digest


def test_of_is_the_sha256() -> None:
    digest = Digest.of(b"adapter")
    assert digest == hashlib.sha256(b"adapter").hexdigest()
    assert digest.short == digest[:12]
    assert Path(digest).name == digest


@pytest.mark.parametrize("value", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", "../" + "a" * 61])
def test_anything_else_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="not a sha256 digest"):
        Digest(value)
