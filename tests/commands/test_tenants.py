"""`adapterd tenants`: policies set flag by flag, on a store that no server need serve."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from adapters_store.store import Store
from server.tenancy.policy import TenantPolicy
from tests.commands.invoke import done, invoke


@pytest.fixture
def where(tmp_path: Path) -> tuple[str, str]:
    return "--store", str(tmp_path / "store")


def test_every_field_of_a_policy_is_a_flag() -> None:
    said = re.sub(r"[\s│]+", " ", done("tenants", "set", "--help"))
    for name, field in TenantPolicy.model_fields.items():
        assert f"--{name.replace('_', '-')} " in said
        assert str(field.description) in said


def test_set_changes_what_is_named_and_none_goes_back(where: tuple[str, str]) -> None:
    said = json.loads(done("tenants", "set", "acme", "--weight", "2", "--max-slots", "4", *where))
    assert (said["name"], said["policy"]) == ("acme", {"weight": 2.0, "max_slots": 4})
    done("tenants", "set", "acme", "--max-slots", "5", "--max-n", "1", *where)
    shown = json.loads(done("tenants", "show", "acme", *where))
    assert shown["policy"] == {"weight": 2.0, "max_slots": 5, "max_n": 1}
    assert shown["keeps"] == {"adapters": 0, "adapter_bytes": 0}
    done("tenants", "set", "acme", "--weight", "none", *where)
    assert json.loads(done("tenants", "show", "acme", *where))["policy"] == {"max_slots": 5, "max_n": 1}
    assert re.search(r"^ *acme .* max_slots=5 max_n=1 *$", done("tenants", "list", *where), re.M)


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("--weight", "0", "--weight Input should be greater than or equal to 0.001"),
        ("--max-slots", "-1", "--max-slots Input should be greater than or equal to 0"),
        ("--max-slots", "many", "--max-slots Input should be a valid integer"),
    ],
)
def test_a_value_that_is_wrong_is_named(where: tuple[str, str], flag: str, value: str, complaint: str) -> None:
    result = invoke("tenants", "set", "acme", flag, value, *where)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert "acme" not in done("tenants", "list", *where)


def test_deleting_a_tenant_with_adapters_takes_a_word(where: tuple[str, str]) -> None:
    done("tenants", "set", "acme", *where)
    with Store.open(Path(where[1])) as store, store.stage() as staged:
        staged.write("f", [b"1"])
        store.publish(staged, tenant="acme", name="support", method="lora", parts=("lora",), details={})
    refused = invoke("tenants", "delete", "acme", *where)
    assert (refused.exit_code, "has adapters" in str(refused.exception)) == (1, True)
    assert done("tenants", "delete", "acme", "--adapters", *where) == "tenant acme is gone, and 1 adapters with it\n"
    assert invoke("tenants", "show", "acme", *where).exit_code == 1
