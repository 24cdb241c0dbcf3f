from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.digest import Digest
from server.bench.adapters import make_adapter
from server.bench.dimensions import Dimensions
from server.bench.options import FAMILIES, BenchError, Family
from server.methods import METHODS
from server.methods.base import Adapter, BaseShape, Limits, ModuleShape
from server.methods.layout import sublayers
from server.methods.read import read_adapter

from .fake import HIDDEN, INFO, LAYERS

DIMENSIONS = Dimensions.of(INFO)
DIGEST = Digest.of(b"")
BASE = BaseShape(
    digest=DIGEST,
    model_type="llama",
    hidden_size=HIDDEN,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=100,
    max_positions=64,
    modules={name: ModuleShape(kind, i, o) for name, (kind, i, o) in INFO["base"]["modules"].items()},
    sublayers=sublayers("llama", LAYERS),
)


def _read(family: Family, directory: Path, seed: int = 0) -> Adapter:
    files = make_adapter(family, DIMENSIONS, np.random.default_rng(seed), rank=4, virtual_tokens=6)
    for name, body in files.items():
        (directory / name).write_bytes(body)
    return read_adapter({name: directory / name for name in files}, BASE, Limits(), DIGEST)


def test_every_family_is_one_that_is_served() -> None:
    assert set(FAMILIES) <= set(METHODS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_servers_own_reader_takes_it(family: Family, tmp_path: Path) -> None:
    (part,) = _read(family, tmp_path).parts
    assert part.method == family


def test_lora_is_on_every_linear_but_the_output_head(tmp_path: Path) -> None:
    (part,) = _read("lora", tmp_path).parts
    kinds = {name for name, (kind, _, _) in INFO["base"]["modules"].items() if kind == "linear"}
    assert set(part.sites) == kinds - {"lm_head"}
    assert all(site["A"].shape[0] == 4 for site in part.sites.values())


def test_ia3_scales_keys_and_values_and_the_feed_forwards_input(tmp_path: Path) -> None:
    (part,) = _read("ia3", tmp_path).parts
    sides = {name.split(".", 3)[3]: set(site) for name, site in part.sites.items()}
    assert sides == {"self_attn.k_proj": {"out"}, "self_attn.v_proj": {"out"}, "mlp.down_proj": {"in"}}


def test_bottlenecks_sit_behind_both_sublayers(tmp_path: Path) -> None:
    (part,) = _read("bottleneck", tmp_path).parts
    assert set(part.sites) == {sublayer.exit for sublayer in BASE.sublayers}


@pytest.mark.parametrize("family", ["prefix_tuning", "prompt_tuning", "p_tuning"])
def test_prompts_have_the_length_asked_for(family: Family, tmp_path: Path) -> None:
    prefix = _read(family, tmp_path).prefix
    assert prefix is not None
    assert prefix.length == 6


def test_values_move_the_output_but_stay_small(tmp_path: Path) -> None:
    (part,) = _read("lora", tmp_path).parts
    for site in part.sites.values():
        assert all(0 < float(tensor.float().abs().max()) < 1 for tensor in site.values() if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_seeds_give_two_adapters_and_one_seed_one(family: Family) -> None:
    made = [make_adapter(family, DIMENSIONS, np.random.default_rng((seed, 1))) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("family", ["bottleneck"])
def test_an_unknown_layout_is_refused_by_name(family: Family) -> None:
    info = {**INFO, "model_type": "novel", "base": {**INFO["base"], "sublayers": []}}
    with pytest.raises(BenchError, match="novel"):
        make_adapter(family, Dimensions.of(info), np.random.default_rng(0))


def test_gpt2s_module_names_are_told_apart() -> None:
    """attn.c_proj and mlp.c_proj end alike: target_modules must say which."""
    modules = {f"transformer.h.0.{name}": ["conv1d", 8, 8] for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")}
    base = {**INFO["base"], "modules": modules, "sublayers": [[0, "feed_forward", "transformer.h.0.mlp.c_proj"]]}
    files = make_adapter("ia3", Dimensions.of({**INFO, "base": base}), np.random.default_rng(0))
    config = json.loads(files["adapter_config.json"])
    assert config["target_modules"] == ["attn.c_attn", "mlp.c_proj"]
    assert config["feedforward_modules"] == ["mlp.c_proj"]


@pytest.mark.parametrize("info", [{}, {"base": None}, {**INFO, "base": {**INFO["base"], "modules": {"a.b": 3}}}])
def test_an_info_that_says_nothing_of_the_base_is_refused(info: dict[str, object]) -> None:
    with pytest.raises(BenchError, match="/info"):
        Dimensions.of(info)
