"""Promise 4: what a request answers does not depend on its batch mates: broken, cancelled, evicted or without any adapter.

To the bit, for every family: `tests/parity/test_batch_mates.py`, `tests/model/test_bit_identity.py`; by random walk:
`tests/security/test_isolation.py`.
"""

from __future__ import annotations

import threading

import pytest

from tests.e2e.uploads import lora
from tests.house import Caller, House
from tests.process import until
from tests.security.contents import BROKEN, CONTENTS

LONG = 60


@pytest.mark.parametrize("broken", sorted(BROKEN))
def test_an_adapter_that_gives_nan_fails_its_own_requests_and_changes_nobody_elses(
    house: House, acme: Caller, zeta: Caller, broken: str
) -> None:
    assert acme.upload("mate", lora(41)).status_code in (200, 201)
    assert zeta.upload("broken", CONTENTS[broken]).status_code == 201
    alone = {adapter: acme.tokens(adapter, max_new_tokens=LONG) for adapter in (None, "mate")}
    found: dict[str | None, list[int]] = {}
    mates = [
        threading.Thread(target=lambda adapter=adapter: found.update({adapter: acme.tokens(adapter, max_new_tokens=LONG)}))
        for adapter in alone
    ]
    for mate in mates:
        mate.start()
    for _ in range(4):
        response = zeta.generate(adapter="broken")
        assert (response.status_code, response.json()["error_type"]) == (424, "generation")
    for mate in mates:
        mate.join()
    assert found == alone
    assert {adapter: acme.tokens(adapter, max_new_tokens=LONG) for adapter in alone} == alone, "nothing of it is left behind"
    until(house.idle)
    zeta.delete("/adapters/broken")
