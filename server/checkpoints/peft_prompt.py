"""PEFT's prompt learning (prefix tuning, prompt tuning, P-tuning, multitask, CPT) and this server's discrete prompts.

Owns their tensor names and which lengths the config promises. Knows nothing of the base model or its tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..errors import AdapterError
from ..methods.base import Checkpoint, Tensors
from .peft_fields import (
    CptFields,
    DiscreteFields,
    Fields,
    MultitaskFields,
    PrefixFields,
    PromptFields,
    parse_fields,
)

EMBEDDINGS: Final = "prompt_embeddings"
TASKS: Final = ("prefix_task_cols", "prefix_task_rows")


def read_prefix(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    return _checkpoint(method, parse_fields(PrefixFields, config), tensors, EMBEDDINGS)


def read_prompt(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    return _checkpoint(method, parse_fields(PromptFields, config), tensors, EMBEDDINGS)


def read_multitask(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    return _checkpoint(method, parse_fields(MultitaskFields, config), tensors, EMBEDDINGS, *TASKS)


def read_cpt(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    """The stored embeddings are the prompt: the delta and its projection were added when the file was saved.

    PEFT takes the number of virtual tokens from `cpt_token_ids` and loads no file whose three lists differ in length.
    """
    fields = parse_fields(CptFields, config)
    length = len(fields.cpt_token_ids or (0,))
    for name in ("cpt_mask", "cpt_tokens_type_mask"):
        given = getattr(fields, name)
        if given is not None and len(given) != length:
            raise AdapterError(name, f"has {len(given)} entries, cpt_token_ids has {length}")
    if fields.num_virtual_tokens != length:
        raise AdapterError("num_virtual_tokens", f"is {fields.num_virtual_tokens}, but cpt_token_ids has {length} entries")
    return _checkpoint(method, fields, tensors, EMBEDDINGS)


def read_discrete(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    """A discrete prompt is text: it has no tensors."""
    return _checkpoint(method, parse_fields(DiscreteFields, config), tensors)


def _checkpoint(method: str, fields: Fields, tensors: Tensors, *names: str) -> tuple[Checkpoint, ...]:
    for name in tensors:
        if name not in names:
            expected = ", ".join(names) or "no tensors"
            raise AdapterError(name, f"matches nothing that {method} stores; expected: {expected}")
    return (Checkpoint(method, fields.model_dump(exclude={"peft_type", "modules_to_save"}), loose=tensors),)
