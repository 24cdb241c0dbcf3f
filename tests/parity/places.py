"""What the same few places of a decoder are called in each tiny architecture: module name suffixes for PEFT's configs.

Data only; the names are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Places:
    """Suffixes that name a module in every layer, and full names of those that exist once."""

    query: str = "self_attn.q_proj"
    value: str = "self_attn.v_proj"  # the same module as `query` where the projection is fused
    out: str = "self_attn.o_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norm: str = "input_layernorm"  # one norm of each layer
    final_norm: str = "model.norm"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    layers: str = "layers"  # the last part of the module list's name
    biases: bool = False  # the base has biases
    tied: bool = False  # head and embedding are one tensor
    head_bias: bool = False  # the output head, too
    conv1d: bool = False  # linear modules hold their weight transposed
    experts: bool = False  # feed-forwards are parameters of a mixture of experts, which no module holds

    @property
    def linear(self) -> list[str]:
        return list(dict.fromkeys([self.query, self.value, self.out, self.up, self.down]))


_LLAMA = Places()
_GPT2 = Places(
    query="attn.c_attn",
    value="attn.c_attn",
    out="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    norm="ln_1",
    final_norm="transformer.ln_f",
    embedding="transformer.wte",
    layers="h",
    biases=True,
    tied=True,
    conv1d=True,
)
_OPT = Places(
    out="self_attn.out_proj",
    up="fc1",
    down="fc2",
    norm="self_attn_layer_norm",
    final_norm="model.decoder.final_layer_norm",
    embedding="model.decoder.embed_tokens",
    biases=True,
    tied=True,
)
_NEOX = Places(
    query="attention.query_key_value",
    value="attention.query_key_value",
    out="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    embedding="gpt_neox.embed_in",
    biases=True,
)

_PHI = replace(
    _LLAMA, out="self_attn.dense", up="mlp.fc1", down="mlp.fc2", final_norm="model.final_layernorm", biases=True, head_bias=True
)

PLACES: Mapping[str, Places] = {
    "llama": _LLAMA,
    "qwen2": replace(_LLAMA, biases=True),
    "gemma": replace(_LLAMA, tied=True),
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_neox": _NEOX,
    "mistral": _LLAMA,
    "mixtral": replace(_LLAMA, up="self_attn.k_proj", down="self_attn.o_proj", experts=True),
    "qwen3": _LLAMA,
    "gemma2": replace(_LLAMA, tied=True),
    "gemma3_text": replace(_LLAMA, tied=True),
    "phi": replace(
        _LLAMA,
        out="self_attn.dense",
        up="mlp.fc1",
        down="mlp.fc2",
        final_norm="model.final_layernorm",
        biases=True,
        head_bias=True,
    ),
    "phi3": replace(_LLAMA, query="self_attn.qkv_proj", value="self_attn.qkv_proj", up="mlp.gate_up_proj"),
    "olmo2": replace(_LLAMA, norm="post_attention_layernorm"),
    "granite": _LLAMA,
    "cohere": replace(_LLAMA, tied=True),
    "starcoder2": replace(_LLAMA, up="mlp.c_fc", down="mlp.c_proj", biases=True, tied=True),
    "smollm3": replace(_LLAMA, tied=True),
}
