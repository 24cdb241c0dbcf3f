"""PEFT's tensor names into neutral checkpoints: what is read, and what is refused by the tensor's own name."""

from __future__ import annotations

import math

import pytest
import torch

from server.checkpoints.peft import read_peft
from server.errors import AdapterError

Q, UP = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.mlp.up_proj"
q, up = Q.removeprefix("base_model.model."), UP.removeprefix("base_model.model.")


def lora(*modules: str, rank: int = 4) -> dict[str, torch.Tensor]:
    both = ((f"{m}.lora_{s}.weight", torch.ones((rank, 6) if s == "A" else (5, rank))) for m in modules for s in "AB")
    return dict(both)


def config(kind: str = "LORA", **fields: object) -> dict[str, object]:
    return {"peft_type": kind, "r": 4, "lora_alpha": 8} | fields


def scales(tensors: dict[str, torch.Tensor], **fields: object) -> dict[str, float]:
    return read_peft(config(**fields), tensors)[0].config["scale"]


def test_lora_tensors_are_sorted_by_module():
    (checkpoint,) = read_peft(config(), lora(Q, UP))
    assert checkpoint.method == "lora"
    assert {module: sorted(tensors) for module, tensors in checkpoint.sites.items()} == {q: ["A", "B"], up: ["A", "B"]}


def test_the_scale_is_alpha_over_rank_or_over_its_root():
    assert scales(lora(Q, UP)) == {q: 2.0, up: 2.0}
    assert scales(lora(Q, UP), use_rslora=True) == {q: 4.0, up: 4.0}
    assert scales(lora(Q, UP), lora_alpha=1.5)[q] == 0.375
    assert scales(lora(Q, rank=9), r=9, use_rslora=True, lora_alpha=6)[q] == 6 / math.sqrt(9)


def test_patterns_change_the_scale_of_the_modules_they_name():
    tensors = lora(Q) | lora(UP, rank=2)
    assert scales(tensors, rank_pattern={"up_proj": 2}) == {q: 2.0, up: 4.0}
    assert scales(tensors, rank_pattern={r".*(1|2)\.mlp.*": 2}) == {q: 2.0, up: 4.0}
    alphas = {"q_proj": 16, "layers.0.self_attn.q_proj": 32, "proj": 64}
    assert scales(tensors, rank_pattern={"up_proj": 2}, alpha_pattern=alphas) == {q: 4.0, up: 4.0}


def test_trained_biases_become_a_bitfit_checkpoint_beside_the_lora():
    biases = {f"{Q}.base_layer.bias": torch.ones(5), "base_model.model.model.norm.bias": torch.ones(6)}
    first, second = read_peft(config(bias="all"), lora(Q) | biases)
    assert (first.method, second.method) == ("lora", "bitfit")
    assert {module: list(tensors) for module, tensors in second.sites.items()} == {q: ["bias"], "model.norm": ["bias"]}


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
    assert checkpoint.config == {**sizes, "num_attention_heads": None}
    assert list(checkpoint.loose) == ["prompt_embeddings"]


BIAS = {f"{Q}.base_layer.bias": torch.ones(5)}


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"peft_type": "ADALORA"}, lora(Q), "^peft_type: 'ADALORA' is not served; served: LORA, IA3, BITFIT"),
        ({"peft_type": ["LORA"]}, lora(Q), "^peft_type: .*is not served"),
        ({"peft_type": None}, lora(Q), "^peft_type: None is not served"),
        ({"peft_type": "x" * 9999}, lora(Q), "^peft_type: 'x{79}... is not served"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(4, 6)}, f"^{Q}.lora_B.weight: is missing although lora_A is there"),
        ({}, {f"{Q}.lora_B.weight": torch.ones(5, 4)}, f"^{Q}.lora_A.weight: is missing although lora_B is there"),
        ({}, lora(Q, rank=3), f"^{Q}.lora_A.weight: has rank 3, the config says 4"),
        ({"rank_pattern": {"up_proj": 3}}, lora(Q, rank=3), "has rank 3, the config says 4"),
        ({"rank_pattern": {".*x": 2}}, lora(Q, rank=3), "has rank 3, the config says 2 or 4"),
        ({"alpha_pattern": {"(.|..)+!": 2}}, lora(Q), r"^alpha_pattern: key '\(\.\|\.\.\)\+!' is a regular expression"),
        ({"target_modules": ["k_proj"]}, lora(Q), f"^target_modules: does not name {q}"),
        ({"exclude_modules": ["q_proj"]}, lora(Q), f"^exclude_modules: names {q}"),
        ({"layers_to_transform": [1, 2]}, lora(Q), f"^layers_to_transform: leaves out {q}"),
        ({"layers_to_transform": 1}, lora(Q), f"^layers_to_transform: leaves out {q}"),
        ({"lora_bias": True}, lora(Q), f"^{Q}.lora_B.bias: is missing, but lora_bias is True"),
        ({}, lora(Q) | {f"{Q}.lora_B.bias": torch.ones(5)}, f"^{Q}.lora_B.bias: is stored, but lora_bias is False"),
        ({}, lora(Q) | BIAS, f"^{Q}.base_layer.bias: matches nothing"),
        ({"bias": "all"}, lora(Q) | BIAS | {f"{Q}.bias": torch.ones(5)}, f"^{Q}.bias: is stored twice"),
        ({}, lora(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(5)}, "lora_magnitude_vector: DoRA is not served"),
        ({}, {"base_model.model.e.lora_embedding_A": torch.ones(2, 9)}, "LoRA on embeddings is not served"),
        ({}, {"base_model.model.e.base_layer.weight": torch.ones(2, 9)}, "stored base weights are not served"),
        ({}, {"base_model.model.lm_head.weight": torch.ones(2, 9)}, "^base_model.model.lm_head.weight: matches nothing"),
        ({}, {"model.q_proj.lora_A.weight": torch.ones(2, 9)}, "^model.q_proj.lora_A.weight: matches nothing"),
        ({}, {"base_model.model.lora_A.weight": torch.ones(2, 9)}, "matches nothing"),
        ({}, {f"{Q}.lora_A.default.weight": torch.ones(2, 9)}, "matches nothing"),
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
        ({"peft_type": "BITFIT", "task_type": "TOKEN_CLS"}, {f"{Q}.bias": torch.ones(5)}, "^task_type: 'TOKEN_CLS' is not"),
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
