from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from server.bench.options import BenchError, BenchOptions


def test_the_defaults_are_valid() -> None:
    BenchOptions().check()


def test_every_field_has_help() -> None:
    assert list(BenchOptions.help()) == [field.name for field in fields(BenchOptions)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", "localhost:8080"),
        ("url", "http://"),
        ("scenario", "soak"),
        ("popularity", "normal"),
        ("concurrency", 0),
        ("requests", -1),
        ("prompt_tokens", 1),
        ("max_new_tokens", 0),
        ("adapters", -1),
        ("families", ()),
        ("families", ("lora", "dora")),
        ("rank", 5000),
        ("virtual_tokens", 0),
        ("repeats", 0),
        ("registered", 0),
        ("seconds", 0.0),
        ("timeout", float("nan")),
    ],
)
def test_a_wrong_value_is_named(field: str, value: object) -> None:
    wrong: dict[str, Any] = {field: value}
    with pytest.raises(BenchError, match=f"`{field}`"):
        BenchOptions(**wrong).check()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (BenchOptions(adapters=0, scenario="base-vs-adapters"), "adapters"),
        (BenchOptions(adapters=0, versus_peft=True), "adapters"),
        (BenchOptions(versus_peft=True, families=("lora", "ia3")), "families"),
        (BenchOptions(versus_peft=True, scenario="many-adapters"), "versus_peft"),
        (BenchOptions(scenario="noisy-neighbour"), "api_keys"),
        (BenchOptions(scenario="weights", api_keys=("a", "b")), "api_keys"),
        (BenchOptions(api_keys=("a", "b")), "api_keys"),
        (BenchOptions(scenario="cold-start", adapters=0), "adapters"),
    ],
)
def test_fields_that_exclude_each_other_are_named(options: BenchOptions, field: str) -> None:
    with pytest.raises(BenchError, match=f"`{field}`"):
        options.check()
