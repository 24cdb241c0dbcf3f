"""Settings: one table of knobs, from variables or arguments, refused by name when they are wrong, frozen afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings, default_home


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("ADAPTERD_"):
            monkeypatch.delenv(name)


def refusal(**values: object) -> tuple[str, str]:
    """(field, message) of the one thing that is wrong."""
    with pytest.raises(ValidationError) as caught:
        Settings(**values)  # type: ignore[arg-type]
    (error,) = caught.value.errors()
    return str(error["loc"][0]), str(error["msg"])


def test_defaults_stand_without_any_variable() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.device, settings.dtype) == ("127.0.0.1", 8080, "auto", "auto")
    assert (settings.native, settings.kv_cache_gb, settings.store) == (True, None, None)


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("ADAPTERD_PORT", "0", "port", 0),
        ("ADAPTERD_STORE", "/srv/adapters", "store", Path("/srv/adapters")),
        ("ADAPTERD_NATIVE", "false", "native", False),
        ("ADAPTERD_KV_CACHE_GB", "1.5", "kv_cache_gb", 1.5),
        ("ADAPTERD_DEVICE", "cuda", "device", "cuda"),
        ("adapterd_max_running", "7", "max_running", 7),
    ],
)
def test_variables_set_fields(variable: str, text: str, field: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(Settings(), field) == value


def test_an_argument_beats_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERD_PORT", "1234")
    assert Settings(port=99).port == 99


def test_a_bad_variable_names_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERD_BLOCK_SIZE", "many")
    field, message = refusal()
    assert field == "block_size"
    assert "valid integer" in message


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def test_an_unknown_field_is_refused() -> None:
    assert refusal(ports=1)[0] == "ports"


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("port", 65536, "65535"),
        ("port", -1, "0"),
        ("threads", -1, "0"),
        ("kv_cache_gb", 0, "0"),
        ("block_size", 0, "1"),
        ("max_batch_tokens", 0, "1"),
        ("max_running", 0, "1"),
        ("max_waiting", -1, "0"),
        ("max_waiting_per_tenant", -1, "0"),
        ("queue_timeout", -1, "0"),
        ("adapter_slots", 0, "1"),
        ("adapter_memory_mb", 0, "0"),
        ("host_cache_mb", -1, "0"),
        ("max_total_tokens", -1, "0"),
        ("max_request_mb", 0, "0"),
        ("max_rank", 0, "1"),
        ("request_timeout", 0, "0"),
        ("drain_seconds", -0.1, "0"),
        ("device", "tpu", "cuda"),
        ("dtype", "float16", "bfloat16"),
        ("log_level", "loud", "warning"),
        ("log_format", "xml", "console"),
    ],
)
def test_a_value_out_of_range_names_its_field_and_limit(field: str, value: object, limit: str) -> None:
    found, message = refusal(**{field: value})
    assert found == field
    assert limit in message


@pytest.mark.parametrize(
    "field", ["kv_cache_gb", "adapter_memory_mb", "max_request_mb", "max_upload_mb", "request_timeout", "drain_seconds"]
)
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_no_number_may_be_infinite_or_none_at_all(field: str, value: str) -> None:
    assert refusal(**{field: value})[0] == field


def test_every_field_says_what_it_is_and_in_which_unit() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        unit = {"_gb": "GB", "_mb": "MB", "_seconds": "Seconds", "_timeout": "Seconds"}
        assert all(word in field.description for ending, word in unit.items() if name.endswith(ending)), name


def test_home_is_below_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_home() == Path("/home/someone/.cache/adapterd")
