"""PEFT's dialect: adapter_config.json with a `peft_type` and adapter_model.safetensors, into neutral checkpoints.

Owns the names PEFT gives tensors. Never constructs a PEFT object: its configs import modules and open files by name.
Knows nothing of the base model: shapes are the methods' business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from ..errors import AdapterError
from ..methods.base import Checkpoint, Tensors
from .peft_fields import refuse_unserved, shown_value
from .peft_folded import read_adalora, read_vera
from .peft_head import read_head, split_head
from .peft_lora import read_lora
from .peft_prompt import read_cpt, read_discrete, read_multitask, read_prefix, read_prompt
from .peft_saved import split_saved
from .peft_small import read_beft, read_bitfit, read_ia3, read_ln_tuning, read_trainable_tokens

WEIGHTS: Final = "adapter_model.safetensors"
TENSORLESS: Final = ("DISCRETE_PROMPT",)  # these peft_types may come without a file of tensors


def read_peft(config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    """The checkpoints of one upload: several when it trained biases, whole modules or a classifier beside its LoRA.

    Raises: AdapterError naming the config field or the tensor at fault.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise AdapterError("peft_type", f"{shown_value(kind)} is not served; served: {', '.join(READERS)}")
    config, tensors, heads = split_head(config, tensors)
    refuse_unserved(kind, config)
    tensors, saved = split_saved(config, tensors)
    method, read = READERS[kind]
    return (*read(method, config, tensors), *saved, *heads)


_Reader = Callable[[str, Mapping[str, object], Tensors], tuple[Checkpoint, ...]]
READERS: Final[Mapping[str, tuple[str, _Reader]]] = MappingProxyType(
    {
        "LORA": ("lora", read_lora),
        "ADALORA": ("lora", read_adalora),
        "VERA": ("lora", read_vera),
        "IA3": ("ia3", read_ia3),
        "BITFIT": ("bitfit", read_bitfit),
        "BEFT": ("bitfit", read_beft),
        "LN_TUNING": ("ln_tuning", read_ln_tuning),
        "TRAINABLE_TOKENS": ("trainable_tokens", read_trainable_tokens),
        "HEAD": ("head", read_head),
        "PREFIX_TUNING": ("prefix_tuning", read_prefix),
        "PROMPT_TUNING": ("prompt_tuning", read_prompt),
        "P_TUNING": ("p_tuning", read_prompt),
        "MULTITASK_PROMPT_TUNING": ("multitask_prompt_tuning", read_multitask),
        "CPT": ("cpt", read_cpt),
        "DISCRETE_PROMPT": ("discrete_prompt", read_discrete),
    }
)
