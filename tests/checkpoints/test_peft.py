"""PEFT's tensor names into neutral checkpoints: what is read, and what is refused by the tensor's own name.

LoRA's files have a test of their own (test_peft_lora.py).
"""

from __future__ import annotations

import pytest
import torch

from server.checkpoints.peft import read_peft
from server.errors import AdapterError

Q, UP = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.mlp.up_proj"
q, up = Q.removeprefix("base_model.model."), UP.removeprefix("base_model.model.")


def lora(module: str) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(4, 6), f"{module}.lora_B.weight": torch.ones(5, 4)}


def config(kind: str = "LORA", **fields: object) -> dict[str, object]:
    return {"peft_type": kind, "r": 4, "lora_alpha": 8} | fields


def test_ia3_vectors_go_to_the_side_their_shape_says():
    tensors = {f"{Q}.ia3_l": torch.ones(5, 1), f"{UP}.ia3_l": torch.ones(1, 6)}
    for feedforward in (["up_proj"], None, ".*up_proj"):
        (checkpoint,) = read_peft(config("IA3", feedforward_modules=feedforward), tensors)
        assert {m: {s: t.shape for s, t in sides.items()} for m, sides in checkpoint.sites.items()} == {
            q: {"out": (5,)},
            up: {"in": (6,)},
        }


@pytest.mark.parametrize(
    ("kind", "method"),
    [("PREFIX_TUNING", "prefix_tuning"), ("PROMPT_TUNING", "prompt_tuning"), ("P_TUNING", "p_tuning")],
)
def test_prompts_keep_their_sizes_and_open_nothing_they_name(kind, method):
    named = {"tokenizer_name_or_path": "/etc/passwd", "auto_mapping": {"parent_library": "os"}, "prompt_tuning_init": "TEXT"}
    sizes = {"num_virtual_tokens": 2, "token_dim": 6, "num_layers": None}
    (checkpoint,) = read_peft(config(kind, **sizes, **named), {"prompt_embeddings": torch.ones(2, 6)})
    assert checkpoint.method == method
    assert checkpoint.config.items() >= {**sizes, "num_attention_heads": None}.items()
    assert set(checkpoint.config).isdisjoint(named)
    assert list(checkpoint.loose) == ["prompt_embeddings"]


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"peft_type": "LOHA"}, lora(Q), "^peft_type: 'LOHA' is not served; served: LORA, "),
        ({"peft_type": ["LORA"]}, lora(Q), "^peft_type: .*is not served"),
        ({"peft_type": None}, lora(Q), "^peft_type: None is not served"),
        ({"peft_type": "x" * 9999}, lora(Q), "^peft_type: 'x{79}... is not served"),
        ({}, {"base_model.model.score.weight": torch.ones(2, 9)}, "^base_model.model.score.weight: matches nothing"),
        ({}, {"model.q_proj.lora_A.weight": torch.ones(2, 9)}, "^model.q_proj.lora_A.weight: matches nothing"),
        ({}, {"base_model.model.lora_A.weight": torch.ones(2, 9)}, "matches nothing"),
        ({"peft_type": "IA3"}, {f"{Q}.ia3_l": torch.ones(5)}, f"^{Q}.ia3_l: has shape"),
        ({"peft_type": "IA3"}, {f"{Q}.ia3_l": torch.ones(5, 2)}, f"^{Q}.ia3_l: has shape"),
        ({"peft_type": "IA3"}, lora(Q), f"^{Q}.lora_A.weight: matches nothing"),
        (
            {"peft_type": "IA3", "feedforward_modules": ["q_proj"]},
            {f"{Q}.ia3_l": torch.ones(5, 1)},
            f"^feedforward_modules: names {q}, whose tensor scales its output",
        ),
        (
            {"peft_type": "IA3", "feedforward_modules": []},
            {f"{Q}.ia3_l": torch.ones(1, 5)},
            f"^feedforward_modules: leaves out {q}, whose tensor scales its input",
        ),
        ({"peft_type": "BITFIT"}, lora(Q), "matches nothing"),
        ({"peft_type": "BITFIT", "task_type": "TOKEN_CLS"}, {f"{Q}.bias": torch.ones(5)}, "^task_type: is TOKEN_CLS, but no"),
        (
            {"peft_type": "P_TUNING", "num_virtual_tokens": 1},
            {"prompt_embeddings": torch.ones(1, 6), "base_model.score.weight": torch.ones(2, 6)},
            "^base_model.score.weight: matches nothing that p_tuning stores",
        ),
        ({"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": torch.ones(1, 6)}, "^num_virtual_tokens: Field required"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_by_name(fields, tensors, message):
    with pytest.raises(AdapterError, match=message):
        read_peft(config() | fields, tensors)
