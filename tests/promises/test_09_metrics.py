"""Promise 9: /metrics has bounded label cardinality, and can be bound to a port of its own.

Numbers: `tests/test_metrics.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.settings import Settings
from tests.e2e.uploads import lora
from tests.house import House

TOP = 3


@pytest.fixture
def narrow(tiny_base: Path, tmp_path: Path) -> Iterator[House]:
    with House(tiny_base, tmp_path, metrics_top_k=TOP) as opened:
        yield opened


def series(house: House) -> dict[str, int]:
    """Samples per metric, but for the resident adapters' one line."""
    body, _ = house.server.metrics.render()
    found: dict[str, int] = {}
    for family in text_string_to_metric_families(body.decode()):
        found[family.name] = len({tuple(sorted(sample.labels.items())) for sample in family.samples})
    return found


def test_label_cardinality_is_bounded_however_many_tenants_adapters_and_errors_there_are(narrow: House) -> None:
    files = lora(1)
    for number in range(TOP):
        caller = narrow.tenant(f"first-{number}")
        caller.upload(f"a-{number}", files)
        caller.generate(adapter=f"a-{number}", max_new_tokens=1)
        caller.generate(max_new_tokens=1)
    narrow.tenant("one-more").generate(max_new_tokens=1)
    caller = narrow.tenant("strangers")
    hostile(narrow)
    before = series(narrow)
    for number in range(8):
        caller = narrow.tenant(f"tenant-{number}")
        caller.upload(f"adapter-{number}", files)
        caller.generate(adapter=f"adapter-{number}", max_new_tokens=1)
        caller.generate(max_new_tokens=1)
        caller.generate(adapter=f"missing-{number}")
        caller.get(f"/nowhere-{number}")
        caller.ask(f"VERB{number}", "/generate")
        hostile(narrow, number)
    after = series(narrow)
    grown = {name: (before.get(name), count) for name, count in after.items() if count > before.get(name, 0) + 2}
    assert grown == {}, "two more: what `other` adds"


def hostile(house: House, number: int = 0) -> None:
    """One request of each kind that fails."""
    caller = house.tenant("hostile")
    caller.post("/generate", {"inputs": "", "user_id": f"u{number}"})
    caller.upload(f"bad {number}", {"x": b""})
    house.anyone.get("/info")
    caller.generate(adapter=f"../{number}")


def test_metrics_can_have_a_port_of_their_own() -> None:
    """That it answers /metrics and nothing else there: `tests/test_serving.py` and its neighbours."""
    assert Settings(metrics_port=0).metrics_host == "127.0.0.1"
