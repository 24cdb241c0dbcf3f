"""Prefix tuning: the decoded keys and values, put in a cache of the untouched base, give PEFT's own logits."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig
from safetensors.torch import save_file
from transformers import DynamicCache

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import BaseShape, Checkpoint, Limits


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma", "opt"])
@pytest.mark.parametrize("projection", [False, True])
def test_a_saved_prefix_gives_pefts_logits(name, projection, trained, models, ids):
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=6
    )
    adapter = trained(name, config)
    (part,) = adapter.parts()
    prefix, copies = part.prefix, len(ids)

    cache = DynamicCache(
        [(k.transpose(0, 1).expand(copies, -1, -1, -1), v.transpose(0, 1).expand(copies, -1, -1, -1))
         for k, v in zip(prefix.keys, prefix.values, strict=True)]
    )  # fmt: skip
    positions = torch.arange(prefix.length, prefix.length + ids.shape[1]).expand(copies, -1)
    with torch.no_grad():
        logits = models[name](ids, past_key_values=cache, position_ids=positions).logits
        alone = models[name](ids).logits

    expected = adapter.logits(ids)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (expected - alone).abs().max() > 0.01
    assert (part.pool, dict(part.sites), prefix.length) == (None, {}, 5)


def test_layer_l_takes_its_keys_from_index_2l_and_its_values_from_2l_plus_1():
    stored = torch.arange(2 * 2 * 2 * 6, dtype=torch.float32).view(2, 24)

    prefix = METHODS["prefix_tuning"].read(_checkpoint(stored), _base(), Limits()).prefix

    assert prefix.keys.shape == prefix.values.shape == (2, 2, 2, 3)
    assert prefix.keys[1, 0].flatten().tolist() == [12, 13, 14, 15, 16, 17]
    assert prefix.values[1, 1].flatten().tolist() == [42, 43, 44, 45, 46, 47]
    assert prefix.nbytes == stored.nbytes


def test_an_old_file_of_full_attention_width_is_refused_here_because_it_does_not_load_in_peft(trained, models):
    adapter = trained("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    config = json.loads(adapter.paths["adapter_config.json"].read_text()) | {"token_dim": 32, "num_attention_heads": 4}
    adapter.paths["adapter_config.json"].write_text(json.dumps(config))
    save_file({"prompt_embeddings": torch.randn(3, 2 * 2 * 32)}, adapter.paths["adapter_model.safetensors"])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="size mismatch"):
            PeftModel.from_pretrained(copy.deepcopy(models["llama"]), adapter.paths["adapter_config.json"].parent)
    with pytest.raises(AdapterError, match="token_dim: is 32, but 16 is needed here"):
        adapter.parts()
    halves = torch.randn(2, 1, 4, 3, 8)  # what the file would be decoded to: all four heads, where the base keeps two
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        models["llama"](torch.tensor([[5]]), past_key_values=DynamicCache([tuple(halves), tuple(halves)]))


def _base() -> BaseShape:
    return BaseShape(Digest("0" * 64), "tiny", 12, 2, 4, 2, 3, 9, 32, {})


def _checkpoint(stored: torch.Tensor | None, **config: int) -> Checkpoint:
    return Checkpoint("prefix_tuning", config, loose={} if stored is None else {"prompt_embeddings": stored})


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (_checkpoint(torch.ones(2, 24), num_virtual_tokens=3), "num_virtual_tokens: is 3, but 2 is needed"),
        (_checkpoint(torch.ones(2, 24), num_layers=3), "num_layers: is 3, but 2 is needed"),
        (_checkpoint(torch.ones(2, 24), num_attention_heads=4), "num_attention_heads: is 4, but 2 is needed"),
        (_checkpoint(torch.ones(2, 24), token_dim=12), "token_dim: is 12, but 6 is needed"),
        (_checkpoint(torch.ones(2, 48)), r"prompt_embeddings: has shape \[2, 48\], the base model needs \[2, 24\]"),
        (_checkpoint(torch.ones(48)), "prompt_embeddings: has 1 dimensions"),
        (_checkpoint(torch.ones(21, 24)), "num_virtual_tokens: 21 is over this server's limit of 20"),
        (_checkpoint(None), "prompt_embeddings: is missing"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(checkpoint, message):
    with pytest.raises(AdapterError, match=message):
        METHODS["prefix_tuning"].read(checkpoint, _base(), Limits(max_virtual_tokens=20))


def test_a_prefix_must_leave_room_for_text():
    with pytest.raises(AdapterError, match="num_virtual_tokens: 32 leaves no room in 32 positions"):
        METHODS["prefix_tuning"].read(_checkpoint(torch.ones(32, 24)), _base(), Limits())
