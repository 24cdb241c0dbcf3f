"""Configurations of real checkpoints, one entry each: what PEFT is asked to train and save.

Data only. Every entry names the places it needs, so that it can be made for any architecture that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch

from tests.parity.places import PLACES, Places

LAYERS = 2


def _anywhere(places: Places) -> bool:
    return True


def _modules(places: Places) -> bool:
    """PEFT's "all-linear" means every weight a module holds; of experts it would ask for parameters, which is refused."""
    return not places.experts


def _conv1d(places: Places) -> bool:
    """GPT-2's layers are transposed, which PEFT wants to be told; where they are not it corrects the flag."""
    return places.conv1d or (places.biases and places.tied)


def _untied(places: Places) -> bool:
    return not places.tied


@dataclass(frozen=True)
class Config:
    """`make` builds PEFT's config for an architecture; `on` says which architectures have what it needs."""

    make: Callable[[Places], peft.PeftConfig]
    on: Callable[[Places], bool] = _anywhere
    dtype: torch.dtype = torch.float32  # of the tensors in the file
    task: int | None = None  # of a multitask prompt

    def architectures(self) -> list[str]:
        return [name for name, places in PLACES.items() if self.on(places)]


def _lora(places: Places, **fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": [places.query, places.down], **fields})


LORA: Mapping[str, Config] = {
    "rank_1": Config(lambda p: _lora(p, r=1, lora_alpha=1)),
    "rank_3": Config(lambda p: _lora(p, r=3, lora_alpha=5)),
    "rank_9_all_linear": Config(lambda p: _lora(p, r=9, lora_alpha=9, target_modules="all-linear"), on=_modules),
    "rank_24": Config(lambda p: _lora(p, r=24, lora_alpha=24, target_modules=[p.value, p.up])),
    "rank_40_is_over_the_width": Config(lambda p: _lora(p, r=40, lora_alpha=10, target_modules=[p.out])),
    "saved_in_bf16": Config(lambda p: _lora(p, r=8, lora_alpha=16, target_modules=p.linear), dtype=torch.bfloat16),
    "saved_in_fp16": Config(lambda p: _lora(p), dtype=torch.float16),
    "rslora": Config(lambda p: _lora(p, r=6, use_rslora=True)),
    "rslora_wide": Config(lambda p: _lora(p, r=18, use_rslora=True, target_modules="all-linear"), on=_modules),
    "gaussian": Config(lambda p: _lora(p, init_lora_weights="gaussian")),
    "orthogonal": Config(lambda p: _lora(p, init_lora_weights="orthogonal")),
    "fan_in_fan_out": Config(lambda p: _lora(p, fan_in_fan_out=True), on=_conv1d),
    "dropout": Config(lambda p: _lora(p, lora_dropout=0.5)),
    # patterns
    "rank_pattern_by_suffix": Config(lambda p: _lora(p, rank_pattern={p.down: 7})),
    "rank_pattern_by_layer": Config(lambda p: _lora(p, rank_pattern={f"{p.layers}.1.{p.query}": 2})),
    "rank_pattern_regex": Config(lambda p: _lora(p, target_modules=p.linear, rank_pattern={rf".*\.[1-9]\.{p.out}": 10})),
    "alpha_pattern_by_suffix": Config(lambda p: _lora(p, alpha_pattern={p.query: 11})),
    "alpha_pattern_regex": Config(lambda p: _lora(p, alpha_pattern={rf"{p.layers}\.(0|7)\..*": 1, p.down: 12})),
    "both_patterns_anchored": Config(
        lambda p: _lora(p, rank_pattern={rf"^.*{p.layers}\.0\.{p.down}": 2}, alpha_pattern={rf"^.*{p.layers}\.0\..*": 3})
    ),
    "rslora_with_patterns": Config(
        lambda p: _lora(p, use_rslora=True, rank_pattern={p.query: 9}, alpha_pattern={f"{p.layers}.0.{p.query}": 2})
    ),
    # targets
    "targets_regex": Config(lambda p: _lora(p, target_modules=rf".*{p.layers}\.1\.({p.query}|{p.up})")),
    "targets_full_name": Config(lambda p: _lora(p, target_modules=[f"{p.layers}.0.{p.out}", p.query])),
    "targets_exclude_list": Config(lambda p: _lora(p, target_modules=p.linear, exclude_modules=[p.query])),
    "targets_exclude_regex": Config(
        lambda p: _lora(p, target_modules="all-linear", exclude_modules=rf".*\.0\.{p.out}"), on=_modules
    ),
    "layers_to_transform_int": Config(lambda p: _lora(p, layers_to_transform=1)),
    "layers_to_transform_list": Config(lambda p: _lora(p, layers_to_transform=[0], target_modules=p.linear)),
    "layers_pattern": Config(lambda p: _lora(p, layers_to_transform=[1], layers_pattern=p.layers)),
    "layers_pattern_list": Config(lambda p: _lora(p, layers_to_transform=[0, 1], layers_pattern=[p.layers])),
    # biases
    "bias_all": Config(lambda p: _lora(p, bias="all"), on=lambda p: p.biases),
    "bias_lora_only": Config(lambda p: _lora(p, bias="lora_only", target_modules=p.linear), on=lambda p: p.biases),
    "lora_bias": Config(lambda p: _lora(p, lora_bias=True, target_modules=[p.query, p.up])),
    "lora_bias_rslora": Config(lambda p: _lora(p, lora_bias=True, use_rslora=True)),
    "lora_bias_and_bias_all": Config(lambda p: _lora(p, lora_bias=True, bias="all"), on=lambda p: p.biases),
    # DoRA
    "dora": Config(lambda p: _lora(p, use_dora=True)),
    "dora_all_linear": Config(lambda p: _lora(p, use_dora=True, target_modules="all-linear", r=10), on=_modules),
    "dora_rslora": Config(lambda p: _lora(p, use_dora=True, use_rslora=True, target_modules=[p.value])),
    "dora_with_patterns": Config(lambda p: _lora(p, use_dora=True, rank_pattern={p.down: 2}, alpha_pattern={p.query: 9})),
    "dora_bias_all": Config(lambda p: _lora(p, use_dora=True, bias="all"), on=lambda p: p.biases),
    # embeddings and the output head
    "embedding": Config(lambda p: _lora(p, target_modules=[p.embedding])),
    "embedding_and_linear": Config(lambda p: _lora(p, target_modules=[p.embedding, p.query], use_rslora=True)),
    "dora_embedding": Config(lambda p: _lora(p, target_modules=[p.embedding], use_dora=True)),
    "head": Config(lambda p: _lora(p, target_modules=[p.head, p.query]), on=_untied),
    "head_lora_bias": Config(lambda p: _lora(p, target_modules=[p.head], lora_bias=True), on=_untied),
    "dora_head": Config(lambda p: _lora(p, target_modules=[p.head], use_dora=True), on=_untied),
    "embedding_and_head": Config(lambda p: _lora(p, target_modules=[p.embedding, p.head]), on=_untied),
    # whole modules and tokens
    "saves_head": Config(lambda p: _lora(p, modules_to_save=[p.head]), on=_untied),
    "saves_embedding": Config(lambda p: _lora(p, modules_to_save=[p.embedding]), on=_untied),
    "saves_linear": Config(lambda p: _lora(p, target_modules=[p.query], modules_to_save=[p.down])),
    "saves_norms": Config(lambda p: _lora(p, modules_to_save=[p.norm, p.final_norm])),
    "saves_embedding_and_head": Config(lambda p: _lora(p, modules_to_save=[p.embedding, p.head]), on=_untied),
    "trainable_tokens": Config(lambda p: _lora(p, trainable_token_indices=[3, 5, 90]), on=_untied),
    "trainable_tokens_tied": Config(lambda p: _lora(p, trainable_token_indices=[3, 5, 90]), on=lambda p: p.tied),
    "trainable_tokens_by_module": Config(
        lambda p: _lora(p, trainable_token_indices={p.embedding: [3, 7], p.head: [8, 5]}),
        on=lambda p: not p.tied and not p.head_bias,  # PEFT forgets the bias of the head there, and is not followed
    ),
}

OTHERS: Mapping[str, Config] = {
    # IA3: keys and values, and the feed-forward's input
    "ia3": Config(lambda p: peft.IA3Config(target_modules=[p.value, p.down], feedforward_modules=[p.down])),
    "ia3_outputs_only": Config(lambda p: peft.IA3Config(target_modules=[p.query, p.up], feedforward_modules=[])),
    "ia3_inputs_only": Config(lambda p: peft.IA3Config(target_modules=[p.down], feedforward_modules=[p.down])),
    "ia3_regex": Config(
        lambda p: peft.IA3Config(target_modules=rf".*{p.layers}\.0\.({p.query}|{p.down})", feedforward_modules=rf".*\.{p.down}")
    ),
    "ia3_exclude": Config(
        lambda p: peft.IA3Config(
            target_modules=p.linear, feedforward_modules=[p.down], exclude_modules=[f"{p.layers}.1.{p.out}"]
        )
    ),
    "ia3_fan_in_fan_out": Config(
        lambda p: peft.IA3Config(target_modules=[p.query, p.down], feedforward_modules=[p.down], fan_in_fan_out=True),
        on=_conv1d,
    ),
    "ia3_saves_norms": Config(
        lambda p: peft.IA3Config(target_modules=[p.value], feedforward_modules=[], modules_to_save=[p.norm])
    ),
    # prompts
    "prefix": Config(lambda p: peft.PrefixTuningConfig(num_virtual_tokens=5)),
    "prefix_of_one": Config(lambda p: peft.PrefixTuningConfig(num_virtual_tokens=1)),
    "prefix_of_whole_blocks": Config(lambda p: peft.PrefixTuningConfig(num_virtual_tokens=8)),
    "prefix_projection": Config(
        lambda p: peft.PrefixTuningConfig(num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=24)
    ),
    "prompt": Config(lambda p: peft.PromptTuningConfig(num_virtual_tokens=6)),
    "prompt_of_one": Config(lambda p: peft.PromptTuningConfig(num_virtual_tokens=1)),
    "prompt_over_a_chunk": Config(lambda p: peft.PromptTuningConfig(num_virtual_tokens=30)),
    "prompt_from_the_vocabulary": Config(
        lambda p: peft.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")
    ),
    "p_tuning_mlp": Config(lambda p: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16)),
    "p_tuning_lstm": Config(
        lambda p: peft.PromptEncoderConfig(
            num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=16, encoder_num_layers=1
        )
    ),
    "p_tuning_lstm_deep": Config(
        lambda p: peft.PromptEncoderConfig(
            num_virtual_tokens=5,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=8,
            encoder_num_layers=3,
            encoder_dropout=0.3,
        )
    ),
    "multitask": Config(lambda p: peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3, num_ranks=2), task=1),
    "multitask_first_task": Config(
        lambda p: peft.MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=2, num_ranks=1), task=0
    ),
    "cpt": Config(
        lambda p: peft.CPTConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            cpt_token_ids=[5, 6, 7, 8, 9],
            cpt_mask=[1, 1, 1, 1, 1],
            cpt_tokens_type_mask=[1, 2, 2, 3, 4],
        )
    ),
    # norms, biases, rows of the embedding
    "ln_tuning": Config(lambda p: peft.LNTuningConfig(target_modules=[p.norm])),
    "ln_tuning_final": Config(lambda p: peft.LNTuningConfig(target_modules=[p.norm, p.final_norm])),
    "ln_tuning_regex": Config(lambda p: peft.LNTuningConfig(target_modules=rf".*\.1\.{p.norm}")),
    "ln_tuning_exclude": Config(
        lambda p: peft.LNTuningConfig(target_modules=[p.norm], exclude_modules=[f"{p.layers}.0.{p.norm}"])
    ),
    "beft": Config(lambda p: peft.BeftConfig(target_modules=[p.value]), on=lambda p: not p.conv1d),
    "beft_everywhere": Config(lambda p: peft.BeftConfig(target_modules=p.linear), on=lambda p: not p.conv1d),
    "tokens": Config(lambda p: peft.TrainableTokensConfig(token_indices=[3, 4, 5, 50], target_modules=[p.embedding])),
    # LoRA's relatives
    "adalora": Config(lambda p: peft.AdaLoraConfig(target_modules=[p.query, p.down], init_r=6, total_step=10)),
    "adalora_alpha": Config(
        lambda p: peft.AdaLoraConfig(target_modules=p.linear, init_r=3, target_r=2, lora_alpha=5, total_step=10)
    ),
    "adalora_bias_all": Config(
        lambda p: peft.AdaLoraConfig(target_modules=[p.query], init_r=2, bias="all", total_step=10), on=lambda p: p.biases
    ),
    "adalora_layers": Config(
        lambda p: peft.AdaLoraConfig(
            target_modules=[p.down], init_r=4, layers_to_transform=[1], layers_pattern=p.layers, total_step=10
        )
    ),
    "adalora_saves_embedding": Config(
        lambda p: peft.AdaLoraConfig(target_modules=[p.query], modules_to_save=[p.embedding], total_step=10), on=_untied
    ),
    "vera": Config(lambda p: peft.VeraConfig(target_modules=[p.out], r=8)),
    "vera_bias_all": Config(lambda p: peft.VeraConfig(target_modules=[p.out], r=4, bias="all"), on=lambda p: p.biases),
    "vera_layers": Config(
        lambda p: peft.VeraConfig(target_modules=[p.up], r=6, layers_to_transform=[1], layers_pattern=p.layers)
    ),
    "vera_two_shapes": Config(lambda p: peft.VeraConfig(target_modules=[p.query, p.up], r=12, d_initial=0.3)),
}

CONFIGS: Mapping[str, Config] = {**LORA, **OTHERS}

#: A configuration is made on every fourth architecture that has what it needs, on two at least.
STRIDE = 4


def covering(configs: Mapping[str, Config] = CONFIGS) -> dict[str, list[str]]:
    """architecture -> the configurations that are tried on it."""
    found: dict[str, list[str]] = {architecture: [] for architecture in PLACES}
    for index, (name, config) in enumerate(configs.items()):
        for architecture in _spread(config.architectures(), index):
            found[architecture].append(name)
    return found


def _spread(architectures: list[str], start: int) -> Iterable[str]:
    stride = min(STRIDE, max(1, len(architectures) // 2))
    return architectures[start % stride :: stride]
