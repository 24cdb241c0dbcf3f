"""What `adapterd adapters check` shows a person."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from adapters_store.digest import Digest
from adapters_store.records import JSON
from server.check import Verdict
from server.errors import AdapterError
from server.report import render_verdict

DIGEST = Digest("a" * 64)
DETAILS: Mapping[str, JSON] = {
    "methods": ["lora", "head"],
    "parameters": 1234567,
    "bytes": 4938268,
    "virtual_tokens": 0,
    "head": {"task_type": "SEQ_CLS", "labels": ["good", "[bad]"]},
    "parts": [
        {
            "method": "lora",
            "pool": "lora:8",
            "sites": 60,
            "modules": {"model.layers.*.self_attn.q_proj": 60},
            "parameters": 1234000,
            "bytes": 4936000,
            "virtual_tokens": 0,
        },
        {"method": "head", "pool": "head", "sites": 0, "modules": {}, "parameters": 567, "bytes": 2268, "virtual_tokens": 0},
    ],
}


def shown(verdict: Verdict) -> str:
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        console.print(render_verdict(Path("my[dir]"), verdict))
    return capture.get()


def test_an_accepted_upload_is_shown_part_by_part() -> None:
    text = shown(Verdict("base", "not read", DIGEST, ("adapter_config.json",), ("tokenizer.json",), DETAILS))
    assert "my[dir] would be lora+head against base (base weights: not read)" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["lora", "lora:8", "60", "1,234,000", "4,936,000", "0"] in rows
    assert ["all", "60", "1,234,567", "4,938,268", "0"] in rows
    assert "lora at: model.layers.*.self_attn.q_proj x60" in text
    assert "head labels: good, [bad]" in text
    assert "left out: tokenizer.json" in text
    assert f"digest: {DIGEST}" in text


def test_a_refused_upload_says_why() -> None:
    text = shown(Verdict("base", "loaded", DIGEST, (), (), refusal=AdapterError("r", "is [odd]")))
    assert "my[dir] would be refused against base (base weights: loaded)" in text
    assert "r: is [odd]" in text
    assert "files: none" in text
