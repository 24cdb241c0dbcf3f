"""What the classification of PEFT's config fields promises, shown on files that PEFT wrote.

honoured   another value makes another adapter, or is refused because it contradicts the tensors
cosmetic   no value changes a bit of what is served, nor of what PEFT computes
refused    a value that is not neutral is refused by the field's name, a neutral one changes nothing

`test_peft_fields.py` holds the classes against PEFT's dataclasses, so a field that PEFT adds is in none of them and fails.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from server.checkpoints.peft_fields import CLASSES, SEMANTIC
from server.errors import AdapterError
from server.methods.base import BaseShape
from server.model.loader import make_base
from tests.checkpoints.saved import ANYTHING, CONFIG, OTHER, SAME, Saved
from tests.lab import BASE
from tests.parity.configs import CONFIGS
from tests.parity.specimens import saved_and_loaded
from tests.tiny import tiny_model

ARCHITECTURE: Final = "qwen2"  # biases in some modules, none in others, an output head of its own
#: peft_type -> one of PEFT's files of it, in which nothing optional is switched on.
PLAIN: Final[Mapping[str, str]] = {
    "LORA": "rank_3",
    "ADALORA": "adalora",
    "VERA": "vera",
    "IA3": "ia3",
    "LN_TUNING": "ln_tuning",
    "BEFT": "beft",
    "TRAINABLE_TOKENS": "tokens",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "P_TUNING": "p_tuning_lstm",
    "CPT": "cpt",
    "MULTITASK_PROMPT_TUNING": "multitask",
}
OWN: Final = ("BITFIT", "HEAD", "DISCRETE_PROMPT")
Open = Callable[..., Saved]


@cache
def base(architecture: str) -> BaseShape:
    shape = make_base(tiny_model(architecture), BASE, torch.device("cpu"), torch.float32).shape
    return replace(shape, tokens=lambda text, first: [3 + byte % 90 for byte in text.encode()])


@pytest.fixture(scope="module")
def open_saved(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """The upload of a name: a configuration of the parity tests, or one of this server's own formats."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("saved")

    @cache
    def opened(name: str, architecture: str) -> Saved:
        directory = home / f"{architecture}-{name}"
        if name in OWN:
            write_own(name, directory)
        else:
            saved_and_loaded(CONFIGS[name], architecture, tiny_model(architecture), directory)
        return Saved({path.name: path for path in directory.iterdir()}, base(architecture), home / "changed.json")

    return lambda name, architecture=ARCHITECTURE: opened(name, architecture)


def write_own(kind: str, directory: Path) -> None:
    tensors = {
        "BITFIT": {"base_model.model.model.layers.0.self_attn.o_proj.bias": torch.arange(32.0)},
        "HEAD": {"score.weight": torch.ones(2, 4), "dense.weight": torch.ones(4, 32)},
        "DISCRETE_PROMPT": {},
    }[kind]
    fields: dict[str, Any] = {
        "BITFIT": {},
        "HEAD": {"task_type": "SEQ_CLS", "hidden": 4, "activation": "relu", "num_labels": 2},
        "DISCRETE_PROMPT": {"template": "ab{input}cd", "verbalizer": {"yes": ["a"], "no": ["b"]}},
    }[kind]
    directory.mkdir()
    (directory / CONFIG).write_text(json.dumps({"peft_type": kind, **fields}))
    if tensors:
        save_file(tensors, directory / "adapter_model.safetensors")


def plain(kind: str) -> str:
    return PLAIN.get(kind, kind)


# ---- cosmetic ----

FIELDS = [(kind, field) for kind in CLASSES for field in sorted(CLASSES[kind].cosmetic)]


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_a_cosmetic_field_changes_nothing_that_is_served(kind: str, field: str, open_saved: Open) -> None:
    saved = open_saved(plain(kind))
    assert {saved.outcome(**{field: value}) for value in ANYTHING} == {SAME}


#: A value that PEFT takes and did not save, for the cosmetic fields that it looks at when it loads a file.
PEFT_VALUES: Final[Mapping[str, object]] = {
    "alpha_pattern": {"q_proj": 3},
    "beta1": 0.5,
    "beta2": 0.5,
    "d_initial": 0.7,
    "deltaT": 3,
    "encoder_dropout": 0.4,
    "encoder_hidden_size": 20,
    "encoder_num_layers": 2,
    "encoder_reparameterization_type": "MLP",
    "fan_in_fan_out": True,
    "inference_mode": False,
    "init_ia3_weights": False,
    "init_weights": False,
    "lora_bias": True,
    "lora_dropout": 0.6,
    "megatron_core": "elsewhere",
    "num_ranks": 2,
    "opt_loss_decay_factor": 0.5,
    "opt_projection_epsilon": 0.9,
    "opt_projection_format_epsilon": 0.9,
    "opt_weighted_loss_type": "decay",
    "orth_reg_weight": 0.1,
    "peft_version": "0.20.0",
    "prefix_projection": True,
    "projection_prng_key": 5,
    "prompt_tuning_init": "SAMPLE_VOCAB",
    "prompt_tuning_init_state_dict_path": "nowhere",
    "prompt_tuning_init_task": 1,
    "prompt_tuning_init_text": "some text",
    "qalora_group_size": 8,
    "r": 5,
    "revision": "other",
    "runtime_config": {"ephemeral_gpu_offload": False},
    "target_r": 3,
    "tfinal": 2,
    "tinit": 1,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": "nowhere",
    "total_step": 20,
    "use_rslora": True,
    "vera_dropout": 0.3,
    "base_model_name_or_path": "elsewhere",
    "auto_mapping": {"base_model_class": "X", "parent_library": "y"},
    "eva_config": {"rho": 2.0},
}


@pytest.mark.parametrize(("kind", "field"), [pair for pair in FIELDS if pair[0] in PLAIN])
def test_pefts_own_output_does_not_depend_on_a_cosmetic_field(kind: str, field: str, open_saved: Open) -> None:
    saved = open_saved(plain(kind))
    assert saved.config.get(field) != PEFT_VALUES[field] or field == "tokenizer_kwargs"
    before, after = (peft_logits(saved, changes) for changes in ({}, {field: PEFT_VALUES[field]}))
    assert torch.equal(before, after)


def peft_logits(saved: Saved, changes: Mapping[str, object]) -> Tensor:
    """What PEFT computes with the file and another config."""
    directory = saved.paths[CONFIG].parent.with_name("changed")
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(saved.paths[CONFIG].parent, directory)
    (directory / CONFIG).write_text(json.dumps({**saved.config, **changes}))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny_model(ARCHITECTURE), directory).eval()
        task = {"task_ids": torch.tensor([1])} if saved.config["peft_type"] == "MULTITASK_PROMPT_TUNING" else {}
        logits: Tensor = model(input_ids=torch.tensor([[3, 5, 60, 7]]), **task).logits
    return logits


# ---- refused ----


def refused(kind: str) -> dict[str, tuple[object, ...]]:
    """field -> its neutral values: PEFT's own fields of that type, and those of other types that would change a LoRA."""
    classes = CLASSES[kind]
    return {f: neutral for f, neutral in {**SEMANTIC, **classes.refused}.items() if f not in classes.honoured}


def is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    return any(type(value) is type(other) and value == other for other in neutral)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_refused_field_is_named_unless_its_value_is_neutral(kind: str, open_saved: Open) -> None:
    saved = open_saved(plain(kind))
    for field, neutral in refused(kind).items():
        for value in (*ANYTHING, *neutral):
            if field == "task_type" and value in ("SEQ_CLS", "TOKEN_CLS"):
                continue  # asks for a classifier in the file: tests/checkpoints/test_peft_head.py
            changes = {field: value}
            if is_neutral(value, neutral):
                assert saved.outcome(**changes) == SAME, changes
                continue
            with pytest.raises(AdapterError, match=f"^{field}: .* is not served; served: ") as error:
                saved.read({**saved.config, **changes})
            assert error.value.field == field


# ---- honoured ----

#: (upload, another value) -> what comes of it: another adapter, or the beginning of the refusal.
Proof = tuple[str, object, str]
_LAYER: Final = "base_model.model.model.layers.0"
_NO_NORM: Final = "modules_to_save: names model.layers.0.post_attention_layernorm, for which the upload holds no tensors"
_NO_HEAD: Final = "modules_to_save: names lm_head, for which the upload holds no tensors"


def targets(name: str, field: str = "target_modules") -> Proof:
    return name, ["gate_proj"], f"{field}: does not name model."


def sizes(name: str, length: int) -> dict[str, Proof]:
    """Of prompt learning: held against the base and the tensor."""
    return {
        "num_virtual_tokens": (name, 7, f"num_virtual_tokens: is 7, but {length} "),
        "num_layers": (name, 3, "num_layers: is 3, but 2 is needed here"),
        "token_dim": (name, 33, "token_dim: is 33, but "),
        "num_attention_heads": (name, 8, "num_attention_heads: is 8, but "),
        "modules_to_save": (name, ["lm_head"], _NO_HEAD),
    }


HONOURED: Final[Mapping[str, Mapping[str, Proof]]] = {
    "LORA": {
        "peft_type": ("rank_3", "IA3", f"{_LAYER}.mlp.down_proj.lora_A.weight: matches nothing"),
        "r": ("rank_3", 5, f"{_LAYER}.mlp.down_proj.lora_A.weight: has rank 3, the config says 5"),
        "lora_alpha": ("rank_3", 7, OTHER),
        "use_rslora": ("rank_3", True, OTHER),
        "lora_bias": ("lora_bias", False, f"{_LAYER}.mlp.up_proj.lora_B.bias: is stored, but lora_bias is False"),
        "bias": ("bias_lora_only", "none", f"{_LAYER}.self_attn.q_proj.base_layer.bias: matches nothing"),
        "rank_pattern": ("rank_pattern_by_suffix", {}, f"{_LAYER}.mlp.down_proj.lora_A.weight: has rank 7, the config says 4"),
        "alpha_pattern": ("alpha_pattern_by_suffix", {"down_proj": 2}, OTHER),
        "target_modules": targets("rank_3"),
        "exclude_modules": ("rank_3", ["q_proj"], "exclude_modules: names model.layers.0.self_attn.q_proj"),
        "layers_to_transform": ("rank_3", [0], "layers_to_transform: leaves out model.layers.1"),
        "layers_pattern": ("layers_pattern", "blocks", "layers_to_transform: leaves out model.layers.1"),
        "ensure_weight_tying": ("saves_embedding", True, "lm_head.weight: is missing although ensure_weight_tying"),
        "use_dora": ("dora", False, f"{_LAYER}.mlp.down_proj.lora_magnitude_vector: is stored, but use_dora is False"),
        "trainable_token_indices": ("trainable_tokens", [3, 5, 91], OTHER),
        "modules_to_save": ("saves_norms", ["norm"], _NO_NORM),
    },
    "ADALORA": {
        "peft_type": ("adalora", "LORA", f"{_LAYER}.mlp.down_proj.lora_A: matches nothing"),
        "init_r": ("adalora", 7, f"{_LAYER}.mlp.down_proj.lora_A: has rank 6, the config says 7"),
        "lora_alpha": ("adalora", 9, OTHER),
        "bias": ("adalora_bias_all", "none", f"{_LAYER}.self_attn."),
        "rank_pattern": (
            "adalora",
            {"model.layers.0.mlp.down_proj.lora_E": [True] * 5 + [False]},
            f"{_LAYER}.mlp.down_proj.lora_A: has rank 6, the config says 5",
        ),
        "target_modules": targets("adalora"),
        "exclude_modules": ("adalora", ["q_proj"], "exclude_modules: names model.layers.0.self_attn.q_proj"),
        "layers_to_transform": ("adalora", 1, "layers_to_transform: leaves out model.layers.0"),
        "layers_pattern": ("adalora_layers", ["blocks"], "layers_to_transform: leaves out model.layers.1"),
        "ensure_weight_tying": ("adalora_saves_embedding", True, "lm_head.weight: is missing although ensure_weight_tying"),
        "trainable_token_indices": ("adalora", [1], "trainable_token_indices: names ids, but the upload holds no rows"),
        "modules_to_save": ("adalora", ["lm_head"], _NO_HEAD),
    },
    "VERA": {
        "peft_type": ("vera", "LORA", f"{_LAYER}.self_attn.o_proj.vera_lambda_b: matches nothing"),
        "r": ("vera", 9, "base_model.vera_A: has shape [8, 32], r is 9"),
        "save_projection": ("vera", False, "save_projection: False draws the projections from a seed"),
        "bias": ("vera_bias_all", "none", f"{_LAYER}.self_attn."),
        "target_modules": targets("vera"),
        "layers_to_transform": ("vera", [0], "layers_to_transform: leaves out model.layers.1"),
        "layers_pattern": ("vera_layers", "blocks", "layers_to_transform: leaves out model.layers.1"),
        "modules_to_save": ("vera", ["lm_head"], _NO_HEAD),
    },
    "IA3": {
        "peft_type": ("ia3", "LORA", f"{_LAYER}.mlp.down_proj.ia3_l: matches nothing"),
        "target_modules": targets("ia3"),
        "exclude_modules": ("ia3", r".*\.1\..*", "exclude_modules: names model.layers.1"),
        "feedforward_modules": ("ia3", ["v_proj"], "feedforward_modules: leaves out model.layers.0.mlp.down_proj"),
        "modules_to_save": ("ia3_saves_norms", ["norm"], _NO_NORM),
    },
    "LN_TUNING": {
        "peft_type": ("ln_tuning", "BEFT", f"{_LAYER}.input_layernorm.ln_tuning_layers.weight: matches nothing"),
        "target_modules": targets("ln_tuning"),
        "exclude_modules": ("ln_tuning", ["input_layernorm"], "exclude_modules: names model.layers.0.input_layernorm"),
        "modules_to_save": ("ln_tuning", ["lm_head"], _NO_HEAD),
    },
    "BEFT": {
        "peft_type": ("beft", "LN_TUNING", f"{_LAYER}.self_attn.v_proj.beft_bias: matches nothing"),
        "target_modules": targets("beft"),
        "modules_to_save": ("beft", ["lm_head"], _NO_HEAD),
    },
    "TRAINABLE_TOKENS": {
        "peft_type": ("tokens", "BEFT", "base_model.model.model.embed_tokens.trainable_tokens_delta: "),
        "token_indices": ("tokens", [3, 4, 5, 51], OTHER),
        "target_modules": targets("tokens"),
    },
    "PREFIX_TUNING": {
        "peft_type": ("prefix", "PROMPT_TUNING", "token_dim: is 16, but 32 is needed here (hidden size)"),
        **sizes("prefix", 5),
    },
    "PROMPT_TUNING": {
        "peft_type": ("prompt", "PREFIX_TUNING", "token_dim: is 32, but 16 is needed here"),
        "num_transformer_submodules": ("prompt", 2, "num_virtual_tokens: is 6, but 3 is needed here"),
        **sizes("prompt", 6),
    },
    "P_TUNING": {
        "peft_type": ("p_tuning_lstm", "PREFIX_TUNING", "token_dim: is 32, but 16 is needed here"),
        "num_transformer_submodules": ("p_tuning_lstm", 2, "num_virtual_tokens: is 4, but 2 is needed here"),
        **sizes("p_tuning_lstm", 4),
    },
    "MULTITASK_PROMPT_TUNING": {
        "peft_type": ("multitask", "PROMPT_TUNING", "prefix_task_cols: matches nothing"),
        "num_transformer_submodules": ("multitask", 2, "num_virtual_tokens: is 4, but 2 is needed here"),
        "num_tasks": ("multitask", 4, "num_tasks: "),
        "num_ranks": ("multitask", 3, "num_ranks: "),
        **sizes("multitask", 4),
    },
    "CPT": {
        "peft_type": ("cpt", "PREFIX_TUNING", "token_dim: is 32, but 16 is needed here"),
        "cpt_token_ids": ("cpt", [5, 6], "cpt_mask: has 5 entries, cpt_token_ids has 2"),
        "cpt_mask": ("cpt", [1], "cpt_mask: has 1 entries, cpt_token_ids has 5"),
        "cpt_tokens_type_mask": ("cpt", [1], "cpt_tokens_type_mask: has 1 entries, cpt_token_ids has 5"),
        **sizes("cpt", 5),
        "num_virtual_tokens": ("cpt", 7, "num_virtual_tokens: is 7, but cpt_token_ids has 5 entries"),
    },
    "BITFIT": {
        "peft_type": ("BITFIT", "BEFT", f"{_LAYER}.self_attn.o_proj.bias: matches nothing"),
    },
    "HEAD": {
        "peft_type": ("HEAD", "BEFT", "task_type: is SEQ_CLS, but no score or classifier is stored"),
        "task_type": ("HEAD", "TOKEN_CLS", OTHER),
        "pooling": ("HEAD", "mean", OTHER),
        "num_labels": ("HEAD", 3, "num_labels: "),
        "id2label": ("HEAD", {"0": "bad", "1": "good"}, OTHER),
        "hidden": ("HEAD", 5, "hidden: is 5, dense.weight has 4 rows"),
        "activation": ("HEAD", "tanh", OTHER),
    },
    "DISCRETE_PROMPT": {
        "peft_type": ("DISCRETE_PROMPT", "BITFIT", "adapter_model.safetensors: is missing"),
        "template": ("DISCRETE_PROMPT", "ef{input}cd", OTHER),
        "verbalizer": ("DISCRETE_PROMPT", {"yes": ["a"], "no": ["c"]}, OTHER),
    },
}
#: Fields that matter only on a base whose embedding is its output head too.
TIED: Final = ("ensure_weight_tying",)


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind in CLASSES for field in sorted(CLASSES[kind].honoured)])
def test_an_honoured_field_makes_another_adapter_or_is_held_against_the_tensors(
    kind: str, field: str, open_saved: Open
) -> None:
    name, value, expected = HONOURED[kind][field]
    outcome = open_saved(name, "gemma" if field in TIED else ARCHITECTURE).outcome(**{field: value})
    assert outcome == expected if expected == OTHER else outcome.startswith(expected), outcome


def test_every_type_and_every_honoured_field_has_a_proof() -> None:
    assert {kind: set(proofs) for kind, proofs in HONOURED.items()} == {k: set(c.honoured) for k, c in CLASSES.items()}
    assert {*PLAIN, *OWN} == set(CLASSES)
