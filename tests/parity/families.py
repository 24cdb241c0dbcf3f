"""The configurations that stand for a family where every family is to meet every other in one batch."""

from __future__ import annotations

from typing import Final

#: One per family, more where a family is served in several ways; the names are those of `configs.CONFIGS`.
FAMILIES: Final = (
    *("rank_9_all_linear", "rslora_wide", "layers_to_transform_int", "lora_bias", "dora", "embedding_and_linear"),
    *("saves_linear", "saves_norms", "trainable_tokens_tied", "tokens"),
    *("ia3", "ln_tuning_final", "beft", "adalora", "vera"),
    *("prefix", "prefix_of_whole_blocks", "prompt", "prompt_over_a_chunk", "p_tuning_lstm", "cpt"),
)
