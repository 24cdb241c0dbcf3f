"""Prompt tuning and P-tuning: the embeddings in front of the text's, through the untouched base, give PEFT's logits."""

from __future__ import annotations

import pytest
import torch
from peft import PromptEncoderConfig, PromptTuningConfig

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import BaseShape, Checkpoint, Limits

CONFIGS = {
    "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "p_tuning, LSTM": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma", "opt"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_soft_prompt_gives_pefts_logits(name, kind, trained, models, ids):
    adapter = trained(name, CONFIGS[kind])
    (part,) = adapter.parts()
    assert part.method == kind.partition(",")[0]

    soft = part.prefix.embeddings.expand(len(ids), -1, -1)
    with torch.no_grad():
        text = models[name].get_input_embeddings()(ids)
        logits = models[name](inputs_embeds=torch.cat([soft, text], dim=1)).logits
        alone = models[name](ids).logits

    expected = adapter.logits(ids)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (expected[:, 4:] - alone).abs().max() > 0.01


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
@pytest.mark.parametrize(
    ("shape", "config", "message"),
    [
        ((4, 13), {}, r"prompt_embeddings: has shape \[4, 13\], the base model needs \[4, 12\]"),
        ((4, 12), {"token_dim": 13}, "token_dim: is 13, but 12 is needed"),
        ((4, 12), {"num_layers": 3}, "num_layers: is 3, but 2 is needed"),
        ((4, 12), {"num_attention_heads": 2}, "num_attention_heads: is 2, but 4 is needed"),
        ((4, 12), {"num_virtual_tokens": 5}, "num_virtual_tokens: is 5, but 4 is needed"),
        ((21, 12), {}, "num_virtual_tokens: 21 is over this server's limit of 20"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(method, shape, config, message):
    base = BaseShape(Digest("0" * 64), "tiny", 12, 2, 4, 2, 3, 9, 32, {})
    checkpoint = Checkpoint(method, config, loose={"prompt_embeddings": torch.ones(shape)})
    with pytest.raises(AdapterError, match=message):
        METHODS[method].read(checkpoint, base, Limits(max_virtual_tokens=20))
