"""Promise 15: a step's exception, an adapter that cannot be read, a full disk fail only what they touch.

Step exceptions by bisection: `tests/engine/test_failures.py`; every call of the disk in turn: `tests/adapters_store`.
"""

from __future__ import annotations

import errno
from typing import Any

import pytest

from adapters_store import disk
from tests.e2e.uploads import lora
from tests.house import House


def test_an_adapter_whose_files_are_gone_fails_its_own_requests_only(house: House) -> None:
    caller = house.tenant("bit-rot")
    assert caller.upload("rotten", lora(151)).status_code == 201
    assert caller.upload("sound", lora(152)).status_code == 201
    sound = caller.tokens("sound")
    for adapter in ("rotten", "sound"):
        caller.post(f"/adapters/{adapter}/unload")
    digest = caller.get("/adapters/rotten").json()["digest"]
    house.server.store.files(digest)["adapter_model.safetensors"].unlink()
    assert caller.generate(adapter="rotten").status_code in (424, 503)
    assert caller.tokens("sound") == sound
    assert caller.upload("rotten", lora(151)).status_code in (200, 201), "uploading it again repairs it"
    assert caller.generate(adapter="rotten").status_code == 200


def test_a_step_that_raises_fails_the_request_that_made_it_raise(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = house.tenant("step-breaker")
    sound = caller.tokens(max_new_tokens=4)
    runner: Any = house.server.engine._runner
    real = runner.run

    def run(rows: Any) -> Any:
        if any(row.sequence.request is not None and row.sequence.request.sampling.seed == 666 for row in rows):
            raise RuntimeError("a defect")
        return real(rows)

    monkeypatch.setattr(runner, "run", run)
    assert caller.generate(seed=666, max_new_tokens=4).status_code in (424, 500)
    assert caller.tokens(max_new_tokens=4) == sound


def test_a_full_disk_fails_the_upload_that_meets_it_and_nothing_else(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = house.tenant("full-disk")
    assert caller.upload("before", lora(153)).status_code == 201
    stored = house.stored()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(disk, "write", full)
        refused = caller.upload("during", lora(154))
        assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
        assert str(house.store_root) not in refused.text
        assert caller.generate(adapter="before").status_code == 200
    assert caller.get("/adapters/during").status_code == 404
    assert house.stored() == stored
    assert caller.upload("during", lora(154)).status_code == 201
