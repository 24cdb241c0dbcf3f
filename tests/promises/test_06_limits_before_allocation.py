"""Promise 6: limits hold before memory is taken: sizes, header, tensor count, rank, dtypes, shapes, depth, finite values.
What is over a limit is refused with 413 or 422 and nothing of it is kept.

Lie by lie: `tests/security/test_safetensors_headers.py`, `tests/checkpoints/test_files.py`.
"""

from __future__ import annotations

import torch

from tests.e2e.uploads import HIDDEN, RANK, lora, packed, tensors
from tests.house import Caller, House
from tests.process import until
from tests.security.contents import CONFIG, WEIGHTS, prefix

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SOUND = lora(1)

OVER = {
    "header length": {CONFIG: SOUND[CONFIG], WEIGHTS: (1 << 40).to_bytes(8, "little") + b"{}"},
    "rank": packed({name: torch.zeros((300, HIDDEN) if "_A" in name else (HIDDEN, 300)) for name in tensors(1)}, r=300),
    "dtype": packed({**tensors(1), A: torch.zeros(RANK, HIDDEN, dtype=torch.float64)}),
    "shape": packed({**tensors(1), A: torch.zeros(RANK, HIDDEN + 1)}),
    "bytes": {CONFIG: SOUND[CONFIG], WEIGHTS: SOUND[WEIGHTS] + b"\0"},
    "depth": {CONFIG: b'{"a":' * 20 + b"1" + b"}" * 20, WEIGHTS: SOUND[WEIGHTS]},
    "finite": packed({**tensors(1), A: torch.full((RANK, HIDDEN), torch.nan)}),
    "virtual tokens": prefix(1, length=600),
}


def test_what_is_over_a_limit_is_refused_by_name_and_nothing_of_it_is_kept(house: House, acme: Caller) -> None:
    stored = house.stored()
    for limit, files in OVER.items():
        response = acme.upload("over", files)
        assert (response.status_code, response.json()["error_type"]) == (422, "adapter"), limit
    assert acme.get("/adapters/over").status_code == 404
    until(lambda: house.stored() == stored)


def test_an_upload_over_the_size_limit_is_refused_from_its_announced_length(acme: Caller) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x", "content-length": str(1 << 40)}
    assert acme.ask("POST", "/adapters", content=b"", headers=headers).status_code == 413
