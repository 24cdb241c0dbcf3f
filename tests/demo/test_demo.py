"""The bundled demo: what the list says is what lies beside it."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from server.checkpoints.folder import Folder
from server.demo import BASE, DEMO, DemoAdapter
from server.methods import METHODS
from server.model.pull import KNOWN

MEGABYTE = 1_000_000
each = pytest.mark.parametrize("adapter", DEMO, ids=lambda adapter: adapter.name)


def test_six_users_have_six_families() -> None:
    bound = [adapter for adapter in DEMO if adapter.user_id]
    assert [adapter.user_id for adapter in bound] == ["ann", "bob", "cleo", "dan", "eve", "fay"]
    assert len({adapter.method for adapter in bound}) == 6
    assert {part for adapter in DEMO for part in adapter.parts} <= set(METHODS)


def test_the_list_and_the_folder_agree() -> None:
    folder = DEMO[0].directory.parent
    assert {config.relative_to(folder).parts[0] for config in folder.rglob("adapter_config.json")} == {a.name for a in DEMO}


def test_the_whole_demo_is_small_enough_to_ship() -> None:
    files = [file for adapter in DEMO for file in Folder.of(adapter.directory).files.values()]
    assert sum(file.stat().st_size for file in files) < 6 * MEGABYTE


@each
def test_a_part_is_a_config_and_one_safetensors_file_or_none_for_a_text(adapter: DemoAdapter) -> None:
    assert Folder.of(adapter.directory).left_out == ()
    configs = list(adapter.directory.rglob("adapter_config.json"))
    assert len(configs) == len(adapter.parts)
    for config in configs:
        text = json.loads(config.read_text()).get("peft_type") == "DISCRETE_PROMPT"
        others = [path.name for path in config.parent.iterdir() if path != config]
        assert others in ([[]] if text else [["adapter.safetensors"], ["adapter_model.safetensors"]])


@each
def test_an_adapter_was_trained_on_the_demos_base(adapter: DemoAdapter) -> None:
    for path in adapter.directory.rglob("adapter_config.json"):
        config = json.loads(path.read_text())
        assert config.get("base_model_name_or_path", config.get("model_name")) == KNOWN[BASE].hub_id


@each
def test_an_adapter_moved_away_from_its_start(adapter: DemoAdapter) -> None:
    for weights in adapter.directory.rglob("*.safetensors"):
        with safe_open(weights, framework="pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  not a mapping
        assert all(tensor.isfinite().all() for tensor in tensors)
        assert any(tensor.std() > 1e-3 for tensor in tensors)
