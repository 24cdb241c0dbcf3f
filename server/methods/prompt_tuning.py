"""Soft prompts: prompt tuning (Lester et al., 2021), P-tuning (Liu et al., 2021), CPT (Blau et al., 2024) and multitask
prompt tuning (Wang et al., 2023).

All are trained embeddings in front of the text; P-tuning stores the output of its encoder, CPT its tokens' embeddings
with the trained change added. Has no sites: the engine runs the embeddings through the base once per adapter (once per
task of a multitask prompt) and keeps their keys and values as its prefix.

    Checkpoint.loose = {"prompt_embeddings": [N, hidden]}, and for a multitask prompt also
                       {"prefix_task_cols": [tasks, N, k], "prefix_task_rows": [tasks, k, hidden]}
    Checkpoint.config = {"num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads",
                         "num_transformer_submodules", "num_tasks", "num_ranks"}: int, or absent
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..errors import AdapterError
from .base import BaseShape, Checkpoint, Limits, Method, Part, Prefix, check_shape
from .prefix_tuning import expect, virtual_tokens


class PromptTuning(Method):
    """Soft prompt: positions 0..N-1 hold the embeddings, the text starts at N."""

    name: ClassVar[str] = "prompt_tuning"
    served: ClassVar[str] = "run once through the base, its K/V kept as shared pages"

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        embeddings = _embeddings(checkpoint, base, limits)
        return Part(self.name, prefix=Prefix(len(embeddings), embeddings=embeddings))


class PTuning(PromptTuning):
    """P-tuning: its MLP or LSTM has been applied when the file was saved."""

    name: ClassVar[str] = "p_tuning"
    served: ClassVar[str] = "as prompt tuning"


class CPT(PromptTuning):
    """Context-aware prompt tuning: what was trained, a bounded change of known tokens, is in the stored sum."""

    name: ClassVar[str] = "cpt"
    served: ClassVar[str] = "as prompt tuning"


class MultitaskPromptTuning(Method):
    """A soft prompt per task, the shared one times the task's low-rank matrix; every request names its task."""

    name: ClassVar[str] = "multitask_prompt_tuning"
    served: ClassVar[str] = "as prompt tuning, one prompt per `task_id` a request names"

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        embeddings = _embeddings(checkpoint, base, limits)
        columns, rows = (_factor(checkpoint, name) for name in ("prefix_task_cols", "prefix_task_rows"))
        tasks, rank = len(columns), columns.shape[-1]
        expect(checkpoint, "num_tasks", tasks, "prefix_task_cols")
        expect(checkpoint, "num_ranks", rank, "prefix_task_cols")
        check_shape("prefix_task_cols", columns, (tasks, len(embeddings), rank))
        check_shape("prefix_task_rows", rows, (tasks, rank, base.hidden_size))
        prefix = Prefix(len(embeddings), embeddings=embeddings, factors=(columns, rows))
        return Part(self.name, prefix=prefix, told={"tasks": tasks})


def _embeddings(checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Tensor:
    """[N, hidden], checked against the base."""
    expect(checkpoint, "num_layers", base.num_layers)
    expect(checkpoint, "token_dim", base.hidden_size, "hidden size")
    expect(checkpoint, "num_attention_heads", base.num_heads)
    embeddings = virtual_tokens(checkpoint, base, limits)
    check_shape("prompt_embeddings", embeddings, (len(embeddings), base.hidden_size))
    return embeddings


def _factor(checkpoint: Checkpoint, name: str) -> Tensor:
    factor = checkpoint.loose.get(name)
    if factor is None:
        raise AdapterError(name, "is missing from the upload")
    if factor.ndim != 3:
        raise AdapterError(name, f"has {factor.ndim} dimensions, multitask prompt tuning needs 3")
    return factor
