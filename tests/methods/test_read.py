"""From files to the adapter the engine serves."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import BaseShape, Checkpoint, Limits, Part, Prefix
from server.methods.read import describe, read_adapter, read_parts


def test_an_upload_becomes_an_adapter_under_its_digest(trained):
    saved = trained("gpt2", LoraConfig(r=4, bias="lora_only", target_modules=["c_attn"]))
    adapter = read_adapter(saved.paths, saved.base, Limits(), Digest("a" * 64))
    assert adapter.digest == "a" * 64
    assert [part.method for part in adapter.parts] == ["lora", "bitfit"]
    assert adapter.pools == ("lora:8", "bitfit")
    assert adapter.prefix is None


def test_the_report_of_an_upload_is_json_and_counts_everything(trained):
    lora = describe(trained("gpt2", LoraConfig(r=4, bias="lora_only", target_modules=["c_attn"])).parts())
    prefix = describe(trained("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).parts())

    assert json.loads(json.dumps(lora)) == lora
    assert lora["methods"] == ["lora", "bitfit"]
    assert lora["parts"][0] == {
        "method": "lora",
        "pool": "lora:8",
        "sites": 2,
        "modules": {"transformer.h.*.attn.c_attn": 2},
        "parameters": 2 * 4 * (32 + 96),
        "bytes": 2 * 4 * (32 + 96) * 4,
        "virtual_tokens": 0,
    }
    assert lora["parameters"] == 2 * 4 * (32 + 96) + 2 * 96
    assert (prefix["virtual_tokens"], prefix["parameters"]) == (3, 3 * 2 * 2 * 16)
    assert prefix["bytes"] == prefix["parameters"] * 4


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda config: config.peft_type,
)
def test_an_adapter_of_another_base_is_refused(config, trained, base_of):
    saved = trained("llama", config)
    with pytest.raises(AdapterError, match=r"the base model|is needed here"):
        read_adapter(saved.paths, _wider(base_of("llama")), Limits(), Digest("a" * 64))


def _wider(base):
    modules = {n: replace(m, in_features=2 * m.in_features) for n, m in base.modules.items()}
    modules = {n: replace(m, out_features=2 * m.out_features) for n, m in modules.items()}
    return replace(base, hidden_size=2 * base.hidden_size, head_dim=2 * base.head_dim, modules=modules)


def test_every_method_is_listed_under_its_own_name():
    assert all(method.name == name for name, method in METHODS.items())
    assert {"lora", "ia3", "bitfit", "prefix_tuning", "prompt_tuning", "p_tuning"} <= set(METHODS)


def test_families_mix_in_one_batch(trained, hooked, ids):
    configs = {
        "lora:8": LoraConfig(r=4, target_modules=["c_attn", "mlp.c_proj"]),
        "ia3": IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        "lora:16": LoraConfig(r=12, target_modules=["c_attn"]),
    }
    served, batch = hooked("gpt2"), torch.cat([ids, ids[:1]])
    saved = {pool: trained("gpt2", config) for pool, config in configs.items()}
    for adapter in saved.values():
        served.put(adapter.parts()[0], 1)

    logits = served.logits(batch, {pool: [int(row == at) for row in range(4)] for at, pool in enumerate(saved)})

    for row, adapter in enumerate(saved.values()):
        torch.testing.assert_close(logits[row], adapter.logits(batch)[row], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[3], served.logits(batch, {})[3], atol=1e-6, rtol=0)


@dataclass
class _Reader:
    """A method that answers with a part made beforehand."""

    part: Part

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        return self.part


def test_an_upload_has_one_part_per_pool_and_one_prefix(trained):
    saved = trained("gpt2", LoraConfig(r=4, bias="lora_only", target_modules=["c_attn"]))  # two checkpoints

    def read(lora: Part, other: Part) -> tuple[Part, ...]:
        return read_parts(saved.paths, saved.base, Limits(), {"lora": _Reader(lora), "bitfit": _Reader(other)})

    one, two = (Part("ia3", "ia3", {module: {"out": torch.ones(2)}}) for module in ("a", "b"))
    assert read(one, two) == (Part("ia3", "ia3", {**one.sites, **two.sites}),)
    with pytest.raises(AdapterError, match="a: is adapted twice by ia3"):
        read(one, one)
    prefix = Part("prompt_tuning", prefix=Prefix(1, embeddings=torch.ones(1, 2)))
    assert read(one, prefix) == (one, prefix)
    with pytest.raises(AdapterError, match="already has a prefix"):
        read(prefix, prefix)


def test_an_upload_of_several_directories_is_one_adapter(trained):
    """Two libraries' or two runs' adapters, each in a directory of its own."""
    lora = trained("llama", LoraConfig(r=4, target_modules=["q_proj"]))
    prefix = trained("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    paths = _in_parts(lora=lora, prefix=prefix)
    parts = read_parts(paths, lora.base, Limits())
    assert [(part.method, part.pool) for part in parts] == [("lora", "lora:8"), ("prefix_tuning", None)]
    assert describe(parts)["methods"] == ["lora", "prefix_tuning"]
    assert describe(parts)["virtual_tokens"] == 3


def _in_parts(**saved):
    paths = ((part, name, path) for part, each in saved.items() for name, path in each.paths.items())
    return {f"{part}/{name}": path for part, name, path in paths}


def test_parts_of_one_pool_are_joined_unless_they_meet_at_a_module(trained):
    one = trained("llama", LoraConfig(r=4, target_modules=["q_proj"]))
    other = trained("llama", LoraConfig(r=4, target_modules=["v_proj"]))
    (part,) = read_parts(_in_parts(a=one, b=other), one.base, Limits())
    assert {name.rpartition(".")[2] for name in part.sites} == {"q_proj", "v_proj"}
    with pytest.raises(AdapterError, match=r"^b/model.layers.0.self_attn.q_proj: is adapted twice by lora in one upload"):
        read_parts(_in_parts(a=one, b=one), one.base, Limits())


def test_two_prefixes_in_one_upload_are_refused_by_part_and_name(trained):
    prefix = trained("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    soft = trained("llama", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(AdapterError, match=r"^b/prompt_tuning: the upload already has a prefix \(prefix_tuning\)"):
        read_parts(_in_parts(a=prefix, b=soft), prefix.base, Limits())


def test_a_field_is_named_with_its_part(trained):
    lora = trained("llama", LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"^a/model.layers.0.self_attn.q_proj.lora_A: rank 4 is over") as refused:
        read_parts(_in_parts(a=lora), lora.base, Limits(max_rank=2))
    assert refused.value.field == "a/model.layers.0.self_attn.q_proj.lora_A"
