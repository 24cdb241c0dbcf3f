"""Promise 2: inside, everything is content-addressed; only a `Digest` becomes a path; de-duplication cannot be observed.

More: `tests/adapters_store/test_publishing.py`, `test_manifest.py`; hostile names in `tests/security/test_names.py`.
"""

from __future__ import annotations

import pytest

from adapters_store.digest import Digest
from tests.e2e.uploads import lora
from tests.house import Caller, House


@pytest.mark.parametrize("text", ["", "../" * 21 + "x", "A" * 64, "g" * 64, "0" * 63, "0" * 65, "0" * 63 + "\n", "/" * 64])
def test_nothing_but_a_lower_case_sha256_is_a_digest(text: str) -> None:
    with pytest.raises(ValueError, match="not a sha256 digest"):
        Digest(text)


def test_equal_files_of_two_tenants_cannot_be_told_from_different_ones(house: House) -> None:
    """One copy on disk, and yet: other digests, both 201, and neither's state shows in the other's."""
    one, two = house.tenant("twin-one"), house.tenant("twin-two")
    before = house.stored()
    first = one.upload("same", lora(21))
    blobs = house.stored() - before
    second = two.upload("same", lora(21))
    assert len(house.stored() - before) == len(blobs) + 1, "the second tenant's manifest alone"
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["digest"] != second.json()["digest"]
    assert one.post("/adapters/same/load").json()["state"] == "resident"
    assert two.post("/adapters/same/unload").json()["state"] != "resident"
    assert one.get("/adapters/same").json()["state"] == "resident"
    assert two.delete("/adapters/same").status_code == 204
    assert one.get("/adapters/same").json()["state"] == "resident"
    assert one.generate(adapter="same").status_code == 200


def test_equal_files_of_one_tenant_have_one_digest_under_any_name(acme: Caller) -> None:
    digests = {acme.upload(name, lora(22)).json()["digest"] for name in ("alias-1", "alias-2", "org/alias-3")}
    assert len(digests) == 1
