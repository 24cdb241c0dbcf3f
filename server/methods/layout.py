"""Where each sublayer of an architecture starts and ends: the one per-architecture table the bottleneck family needs.

Owns module names as data. Imports no model; an architecture that is not listed, or listed under other options than the
base has (post-norm blocks), is unknown, and adapters that need its layout are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .base import Sublayer

Kind = Literal["attention", "feed_forward"]


@dataclass(frozen=True)
class Span:
    """One sublayer, as module names relative to its layer; the fields are those of `Sublayer`."""

    residual: str
    inlet: str
    exit: str


@dataclass(frozen=True)
class Layout:
    """One architecture. `requires` are fields of its Hugging Face config that must have exactly these values."""

    model_types: tuple[str, ...]
    layer: str  # the layer's module name, {} is its index
    attention: Span
    feed_forward: Span
    requires: Mapping[str, object] = field(default_factory=dict)

    def spans(self) -> tuple[tuple[Kind, Span], ...]:
        """In the order they run; a parallel block runs attention first, too."""
        return (("attention", self.attention), ("feed_forward", self.feed_forward))


#: Pre-norm blocks:   h + exit(attention(norm(h))), then the same with the feed-forward.
#: Parallel blocks:   h + exit(attention(norm(h))) + exit(feed_forward(norm'(h))): both residuals are the block's input.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3", "olmo"),
        "model.layers.{}",
        Span("input_layernorm", "self_attn.q_proj", "self_attn.o_proj"),
        Span("post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj"),
    ),
    Layout(
        ("stablelm",),
        "model.layers.{}",
        Span("input_layernorm", "self_attn.q_proj", "self_attn.o_proj"),
        Span("post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj"),
        requires={"use_parallel_residual": False},
    ),
    Layout(
        ("stablelm",),
        "model.layers.{}",
        Span("input_layernorm", "self_attn.q_proj", "self_attn.o_proj"),
        Span("input_layernorm", "mlp.gate_proj", "mlp.down_proj"),
        requires={"use_parallel_residual": True},
    ),
    Layout(
        ("cohere",),
        "model.layers.{}",
        Span("input_layernorm", "self_attn.q_proj", "self_attn.o_proj"),
        Span("input_layernorm", "mlp.gate_proj", "mlp.down_proj"),
    ),
    Layout(
        ("phi3",),
        "model.layers.{}",
        Span("input_layernorm", "self_attn.qkv_proj", "self_attn.o_proj"),
        Span("post_attention_layernorm", "mlp.gate_up_proj", "mlp.down_proj"),
    ),
    Layout(
        ("phi",),
        "model.layers.{}",
        Span("input_layernorm", "self_attn.q_proj", "self_attn.dense"),
        Span("input_layernorm", "mlp.fc1", "mlp.fc2"),
    ),
    Layout(
        ("starcoder2",),
        "model.layers.{}",
        Span("input_layernorm", "self_attn.q_proj", "self_attn.o_proj"),
        Span("post_attention_layernorm", "mlp.c_fc", "mlp.c_proj"),
    ),
    Layout(
        ("gpt2",),
        "transformer.h.{}",
        Span("ln_1", "attn.c_attn", "attn.c_proj"),
        Span("ln_2", "mlp.c_fc", "mlp.c_proj"),
    ),
    Layout(
        ("opt",),
        "model.decoder.layers.{}",
        Span("self_attn_layer_norm", "self_attn.q_proj", "self_attn.out_proj"),
        Span("final_layer_norm", "fc1", "fc2"),
        requires={"do_layer_norm_before": True},
    ),
    Layout(
        ("gpt_neox",),  # with or without use_parallel_residual, this norm's input is the feed-forward's residual
        "gpt_neox.layers.{}",
        Span("input_layernorm", "attention.query_key_value", "attention.dense"),
        Span("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
)


def sublayers(model_type: str, num_layers: int, config: Mapping[str, object] | None = None) -> tuple[Sublayer, ...]:
    """Every sublayer of the base in the order they run; () where its layout is not known.

    `config` is the base's Hugging Face config as a dict. A few architectures (opt, stablelm) have options that move
    the norms: without it they count as unknown.
    """
    given = config or {}
    for layout in LAYOUTS:
        if model_type in layout.model_types and all(
            key in given and given[key] == value for key, value in layout.requires.items()
        ):
            return _named(layout, num_layers)
    return ()


def _named(layout: Layout, num_layers: int) -> tuple[Sublayer, ...]:
    return tuple(
        Sublayer(
            index,
            kind,
            residual=f"{layout.layer.format(index)}.{span.residual}",
            inlet=f"{layout.layer.format(index)}.{span.inlet}",
            exit=f"{layout.layer.format(index)}.{span.exit}",
        )
        for index in range(num_layers)
        for kind, span in layout.spans()
    )
