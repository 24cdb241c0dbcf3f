"""Prefix tuning (Li and Liang, 2021; P-tuning v2): trained keys and values in front of the text, per layer.

Owns the decoding of the flat tensor. Has no sites: the engine writes the prefix into KV pages once per adapter.

    Checkpoint.loose = {"prompt_embeddings": [N, layers * 2 * kv_heads * head_dim]}, or what `prefix_mlp` evaluates
    Checkpoint.config = {"num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads"}: int, or absent;
                        "positions": how many positions the text is moved by, absent: N
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import AdapterError
from .base import BaseShape, Checkpoint, Limits, Method, Part, Prefix, check_shape
from .prefix_mlp import evaluate


class PrefixTuning(Method):
    """Keys are used as stored, without RoPE. The text starts at position N, as in PEFT, or at 0, as in AdapterHub."""

    name: ClassVar[str] = "prefix_tuning"
    served: ClassVar[str] = "K/V written once into read-only pages that all its requests share"

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        width = base.num_kv_heads * base.head_dim
        expect(checkpoint, "num_layers", base.num_layers)
        # PEFT recomputes both from the base's key/value heads: a file of full attention width (0.11 and before, with grouped
        # queries) does not load there, and never ran: attention cannot put keys of all heads before those of a few.
        expect(checkpoint, "token_dim", width, "key/value heads * head size")
        expect(checkpoint, "num_attention_heads", base.num_kv_heads, "key/value heads")
        stored = _table(checkpoint, base, limits) if "table" in checkpoint.loose else virtual_tokens(checkpoint, base, limits)
        check_shape("prompt_embeddings", stored, (len(stored), base.num_layers * 2 * width))
        return Part(self.name, prefix=_decode(stored, base, checkpoint.config.get("positions")))


def _table(checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Tensor:
    """[N, width] of the form that `prefix_mlp` evaluates; N is checked first, the network multiplies what it costs."""
    check_length("prefix_length", len(checkpoint.loose["table"]), base, limits)
    stored = evaluate(checkpoint)
    if not bool(torch.isfinite(stored).all()):
        raise AdapterError("prefix_length", "the network that makes the prefix overflows")
    return stored


def _decode(stored: Tensor, base: BaseShape, positions: object) -> Prefix:
    """[N, 2 layers, heads, d]: layer l's keys are index 2l, its values 2l + 1."""
    pairs = stored.view(len(stored), base.num_layers, 2, base.num_kv_heads, base.head_dim)
    keys, values = pairs.permute(2, 1, 0, 3, 4).contiguous()
    return Prefix(len(stored), keys=keys, values=values, positions=positions if isinstance(positions, int) else None)


def virtual_tokens(checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Tensor:
    """The stored [N, width], with N checked against the config, the server's limit and the base's context."""
    stored = checkpoint.loose.get("prompt_embeddings")
    if stored is None:
        raise AdapterError("prompt_embeddings", "is missing from the upload")
    if stored.ndim != 2:
        raise AdapterError("prompt_embeddings", f"has {stored.ndim} dimensions, {checkpoint.method} needs 2")
    copies = _submodules(checkpoint)
    if len(stored) % copies:
        raise AdapterError("num_transformer_submodules", f"is {copies}, but prompt_embeddings has {len(stored)} rows")
    expect(checkpoint, "num_virtual_tokens", len(stored) // copies, "rows of prompt_embeddings per submodule")
    check_length("num_virtual_tokens", len(stored), base, limits)
    return stored


def check_length(field: str, length: int, base: BaseShape, limits: Limits) -> None:
    """Raises: AdapterError naming the field for a prefix longer than the server allows or the base can hold."""
    if length > limits.max_virtual_tokens:
        limit = limits.max_virtual_tokens
        raise AdapterError(field, f"{length} is over this server's limit of {limit} virtual tokens")
    if length >= base.max_positions:
        raise AdapterError(field, f"{length} leaves no room in {base.max_positions} positions")


def _submodules(checkpoint: Checkpoint) -> int:
    """PEFT stores `num_virtual_tokens` rows per submodule, and a decoder is given all of them, one after the other."""
    count = checkpoint.config.get("num_transformer_submodules")
    return count if isinstance(count, int) else 1


def expect(checkpoint: Checkpoint, field: str, want: int, what: str = "the base model") -> None:
    """Raises: AdapterError when the config names another size; a field that is absent names none."""
    got = checkpoint.config.get(field)
    if got is not None and got != want:
        raise AdapterError(field, f"is {got}, but {want} is needed here ({what})")
