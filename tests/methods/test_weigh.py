"""Weighing: what an adapter is said to take is what its ops hold once it is put; one too large is refused by name."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, TrainableTokensConfig

from server.errors import AdapterError
from server.methods import METHODS
from server.methods.weigh import check_fits, footprint_of
from server.model.sites import Sites
from server.model.step import Step
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
        LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
        LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["v_proj", "norm"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"]),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda config: config.peft_type,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_as_weighed_so_held(config, dtype, trained):
    saved = trained("llama", config)
    parts = saved.parts()
    footprint = footprint_of(parts, saved.base, dtype)
    sites = Sites(tiny_model("llama"), saved.base, Step(), METHODS, CPU, dtype)
    for part in parts:
        sites.put(part, 1)
    loose = sum(part.prefix.nbytes for part in parts if part.prefix)
    assert footprint.alone == sites.nbytes + loose > 0
    for part in parts:
        sites.put(part, 6)
    grown = sum(7 * cost.per_slot + 2 * cost.own for cost in footprint.sites.values())
    assert sites.nbytes == grown


def test_an_adapter_over_the_budget_is_refused_by_its_largest_part(trained):
    saved = trained("llama", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["v_proj"]))
    parts = saved.parts()
    footprint = footprint_of(parts, saved.base, torch.float32)
    check_fits(parts, footprint, footprint.alone)
    check_fits(parts, footprint, None)
    with pytest.raises(AdapterError) as refused:
        check_fits(parts, footprint, footprint.alone - 1)
    needed, limit = footprint.alone, footprint.alone - 1
    assert refused.value.field == max(parts, key=lambda part: part.nbytes).method
    assert refused.value.reason == (
        f"the adapter needs {needed} bytes of device memory, over this server's {limit} (--adapter-memory-mb)"
    )
