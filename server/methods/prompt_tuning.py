"""Prompt tuning (Lester et al., 2021) and P-tuning (Liu et al., 2021): trained embeddings in front of the text.

Both store the same thing, P-tuning the output of its encoder. Has no sites: the engine runs the embeddings through the
base once per adapter and keeps their keys and values as its prefix.

    Checkpoint.loose = {"prompt_embeddings": [N, hidden]}
    Checkpoint.config = {"num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads"}: int, or absent
"""

from __future__ import annotations

from typing import ClassVar

from .base import BaseShape, Checkpoint, Limits, Method, Part, Prefix, check_shape
from .prefix_tuning import expect, virtual_tokens


class PromptTuning(Method):
    """Soft prompt: positions 0..N-1 hold the embeddings, the text starts at N."""

    name: ClassVar[str] = "prompt_tuning"

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        expect(checkpoint, "num_layers", base.num_layers)
        expect(checkpoint, "token_dim", base.hidden_size, "hidden size")
        expect(checkpoint, "num_attention_heads", base.num_heads)
        embeddings = virtual_tokens(checkpoint, base, limits)
        check_shape("prompt_embeddings", embeddings, (len(embeddings), base.hidden_size))
        return Part(self.name, prefix=Prefix(len(embeddings), embeddings=embeddings))


class PTuning(PromptTuning):
    """P-tuning: its MLP or LSTM has been applied when the file was saved."""

    name: ClassVar[str] = "p_tuning"
