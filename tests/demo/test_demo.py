"""The bundled demo: what the list says is what lies beside it."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from server.demo import BASE, DEMO, DemoAdapter
from server.methods import METHODS
from server.model.pull import KNOWN

MEGABYTE = 1_000_000
each = pytest.mark.parametrize("adapter", DEMO, ids=lambda adapter: adapter.name)


def test_six_users_have_six_families() -> None:
    bound = [adapter for adapter in DEMO if adapter.user_id]
    assert [adapter.user_id for adapter in bound] == ["ann", "bob", "cleo", "dan", "eve", "fay"]
    assert len({adapter.method for adapter in bound}) == 6
    assert {adapter.method for adapter in DEMO} <= set(METHODS)


def test_the_list_and_the_folder_agree() -> None:
    folder = DEMO[0].directory.parent
    assert {path.name for path in folder.iterdir() if (path / "adapter_config.json").exists()} == {a.name for a in DEMO}


def test_the_whole_demo_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for adapter in DEMO for file in adapter.directory.iterdir()) < 6 * MEGABYTE


@each
def test_an_adapter_is_a_config_and_one_safetensors_file(adapter: DemoAdapter) -> None:
    names = sorted(file.name for file in adapter.directory.iterdir())
    assert names in (["adapter.safetensors", "adapter_config.json"], ["adapter_config.json", "adapter_model.safetensors"])


@each
def test_an_adapter_was_trained_on_the_demos_base(adapter: DemoAdapter) -> None:
    config = json.loads((adapter.directory / "adapter_config.json").read_text())
    assert config.get("base_model_name_or_path", config.get("model_name")) == KNOWN[BASE].hub_id


@each
def test_an_adapter_moved_away_from_its_start(adapter: DemoAdapter) -> None:
    (weights,) = adapter.directory.glob("*.safetensors")
    with safe_open(weights, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  not a mapping
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert any(tensor.std() > 1e-3 for tensor in tensors)
