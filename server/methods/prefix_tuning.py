"""Prefix tuning (Li and Liang, 2021; P-tuning v2): trained keys and values in front of the text, per layer.

Owns the decoding of PEFT's flat tensor. Has no sites: the engine writes the prefix into KV pages once per adapter.

    Checkpoint.loose = {"prompt_embeddings": [N, layers * 2 * kv_heads * head_dim]}
    Checkpoint.config = {"num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads"}: int, or absent
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..errors import AdapterError
from .base import BaseShape, Checkpoint, Limits, Method, Part, Prefix, check_shape


class PrefixTuning(Method):
    """Keys are used as stored, without RoPE, and the text starts at position N, as PEFT does."""

    name: ClassVar[str] = "prefix_tuning"

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        width = base.num_kv_heads * base.head_dim
        expect(checkpoint, "num_layers", base.num_layers)
        # PEFT 0.21 recomputes both from the base's key/value heads: a file of full attention width does not load there.
        expect(checkpoint, "token_dim", width, "key/value heads * head size")
        expect(checkpoint, "num_attention_heads", base.num_kv_heads, "key/value heads")
        stored = virtual_tokens(checkpoint, base, limits)
        check_shape("prompt_embeddings", stored, (len(stored), base.num_layers * 2 * width))
        return Part(self.name, prefix=_decode(stored, base))


def _decode(stored: Tensor, base: BaseShape) -> Prefix:
    """[N, 2 layers, heads, d]: layer l's keys are index 2l, its values 2l + 1."""
    pairs = stored.view(len(stored), base.num_layers, 2, base.num_kv_heads, base.head_dim)
    keys, values = pairs.permute(2, 1, 0, 3, 4).contiguous()
    return Prefix(len(stored), keys=keys, values=values)


def virtual_tokens(checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Tensor:
    """The stored [N, width], with N checked against the config, the server's limit and the base's context."""
    stored = checkpoint.loose.get("prompt_embeddings")
    if stored is None:
        raise AdapterError("prompt_embeddings", "is missing from the upload")
    if stored.ndim != 2:
        raise AdapterError("prompt_embeddings", f"has {stored.ndim} dimensions, {checkpoint.method} needs 2")
    length = len(stored)
    expect(checkpoint, "num_virtual_tokens", length, "rows of prompt_embeddings")
    if length > limits.max_virtual_tokens:
        limit = limits.max_virtual_tokens
        raise AdapterError("num_virtual_tokens", f"{length} is over this server's limit of {limit}")
    if length >= base.max_positions:
        raise AdapterError("num_virtual_tokens", f"{length} leaves no room in {base.max_positions} positions")
    return stored


def expect(checkpoint: Checkpoint, field: str, want: int, what: str = "the base model") -> None:
    """Raises: AdapterError when the config names another size; a field that is absent names none."""
    got = checkpoint.config.get(field)
    if got is not None and got != want:
        raise AdapterError(field, f"is {got}, but {want} is needed here ({what})")
