"""Promise 3: keys and values are reused only within one tenant, adapter content and base; nothing a client sends is a boundary.

By random walk: `tests/security/test_isolation.py`; the salt of CVE-2025-46570: `tests/security/test_requests.py`.
"""

from __future__ import annotations

from tests.e2e.uploads import lora
from tests.house import Caller, House

TEXT = "the cat sat on the mat and the mat sat on the cat: hello world, how are you today?"


def cached(caller: Caller, adapter: str | None = None) -> int:
    return int(caller.generate(TEXT, adapter, max_new_tokens=1).headers["x-cached-tokens"])


def test_a_prefix_is_reused_within_a_tenant_and_adapter_and_nowhere_else(house: House) -> None:
    one, two = house.tenant("reuse-one"), house.tenant("reuse-two")
    for tenant in (one, two):
        assert tenant.upload("a", lora(31)).status_code == 201
        assert tenant.upload("same-as-a", lora(31)).status_code == 201
        assert tenant.upload("b", lora(32)).status_code == 201
    assert [cached(one, "a"), cached(one, "b"), cached(one)] == [0, 0, 0]
    assert cached(one, "a") > 0
    assert cached(one, "same-as-a") > 0, "it is the content that counts"
    assert [cached(two, "a"), cached(two, "b"), cached(two)] == [0, 0, 0]
    assert one.upload("a", lora(33)).status_code == 201
    assert cached(one, "a") == 0, "a new version is another adapter"
