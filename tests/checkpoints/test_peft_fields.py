"""Classification: every field PEFT writes is honoured, cosmetic or refused, and refusals name field and value."""

from __future__ import annotations

import dataclasses

import peft
import pytest

from server.checkpoints.peft_fields import (
    CLASSES,
    SEMANTIC,
    IA3Fields,
    LoraFields,
    PromptFields,
    parse_fields,
    refuse_unserved,
)
from server.errors import AdapterError

PEFT_CONFIGS = {
    "LORA": peft.LoraConfig,
    "ADALORA": peft.AdaLoraConfig,
    "VERA": peft.VeraConfig,
    "IA3": peft.IA3Config,
    "LN_TUNING": peft.LNTuningConfig,
    "BEFT": peft.BeftConfig,
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig,
    "BITFIT": peft.PeftConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
    "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig,
    "CPT": peft.CPTConfig,
    "HEAD": peft.PeftConfig,
    "DISCRETE_PROMPT": peft.PeftConfig,
}
#: What this server's own formats have beside PEFT's common fields, with values that are accepted.
OWN_FIELDS = {
    "HEAD": {"pooling": "last", "num_labels": 2, "id2label": {"0": "a", "1": "b"}, "hidden": 4, "activation": "relu"},
    "DISCRETE_PROMPT": {"template": "{input}", "verbalizer": {"a": ["b"]}},
}
#: What PEFT's classes do not do without, and what no PEFT file is without.
NEEDED = {"ADALORA": {"total_step": 10}, "CPT": {"task_type": "CAUSAL_LM"}, "HEAD": {"task_type": "SEQ_CLS"}}


OWN_FORMATS = {"HEAD"}  # this server's, which PEFT knows nothing of


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_every_field_of_pefts_config_is_in_exactly_one_class(kind):
    classes = CLASSES[kind]
    listed = [*classes.honoured, *classes.cosmetic, *classes.refused]
    names = [field.name for field in dataclasses.fields(PEFT_CONFIGS[kind])]
    assert sorted(listed) == sorted([*names, *OWN_FIELDS.get(kind, ())])


def test_every_served_peft_type_is_classified():
    assert CLASSES.keys() == PEFT_CONFIGS.keys() | OWN_FORMATS


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_pefts_own_defaults_are_accepted(kind):
    config = dataclasses.asdict(PEFT_CONFIGS[kind](**NEEDED.get(kind, {}))) | OWN_FIELDS.get(kind, {})
    refuse_unserved(kind, config)
    parse_fields(
        CLASSES[kind].model,
        {"num_virtual_tokens": 3} | {k: v for k, v in config.items() if v is not None} | {"peft_type": kind},
    )


ASKED = {
    "task_type": "QUESTION_ANS",
    "modules_to_save": ["lm_head"],
    "use_dora": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "layer_replication": [[0, 4], [2, 5]],
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": {"embed_tokens": [1]},
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {},
    "velora_config": {},
    "monteclora_config": {},
    "kasa_config": {},
    "megatron_config": {},
    "init_lora_weights": "pissa_niter_16",
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {},
    "lora_ga_config": {},
    "enable_lora": [True, False, True],
}


def test_every_semantic_field_has_a_refused_value_here():
    assert ASKED.keys() == SEMANTIC.keys()


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
@pytest.mark.parametrize("field", ASKED)
def test_a_semantic_field_is_refused_by_name_in_every_config(kind, field):
    if field in CLASSES[kind].honoured:
        return
    with pytest.raises(AdapterError, match=f"^{field}: .* is not served; served: (None|'CAUSAL_LM')") as refused:
        refuse_unserved(kind, {"peft_type": kind, **NEEDED.get(kind, {}), field: ASKED[field]})
    assert refused.value.field == field


@pytest.mark.parametrize("value", ["pissa", "olora", "corda", "loftq", "lora_ga", "unheard_of", 1])
def test_initialisations_that_change_the_base_are_refused(value):
    with pytest.raises(AdapterError, match="init_lora_weights"):
        refuse_unserved("LORA", {"init_lora_weights": value})


@pytest.mark.parametrize("value", [None, True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_accepted(value):
    refuse_unserved("LORA", {"init_lora_weights": value, "some_new_cosmetic_field": {"x": 1}})


def test_an_encoder_decoder_prompt_is_refused():
    with pytest.raises(AdapterError, match="num_transformer_submodules: 2 is not served; served: None, 1"):
        refuse_unserved("PREFIX_TUNING", {"num_transformer_submodules": 2})


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (LoraFields, {"r": "8"}, "r: .*integer.*got '8'"),
        (LoraFields, {"r": 8.5}, "r: .*integer"),
        (LoraFields, {"r": True}, "r: .*integer"),
        (LoraFields, {"r": 0}, "r: .*greater than or equal to 1"),
        (LoraFields, {"r": None}, "r: .*integer"),
        (LoraFields, {"lora_alpha": "x" * 500}, "lora_alpha: "),
        (LoraFields, {"lora_alpha": True}, "lora_alpha: "),
        (LoraFields, {"lora_alpha": float("inf")}, "lora_alpha: .*finite"),
        (LoraFields, {"use_rslora": "yes"}, "use_rslora: "),
        (LoraFields, {"bias": "some"}, "bias: "),
        (LoraFields, {"rank_pattern": {"q_proj": "4"}}, "rank_pattern: .*integer"),
        (LoraFields, {"alpha_pattern": ["q_proj"]}, "alpha_pattern: .*dictionary"),
        (LoraFields, {"target_modules": [1]}, "target_modules: .*string"),
        (LoraFields, {"target_modules": {"q": 1}}, "target_modules: "),
        (LoraFields, {"target_modules": [str(i) for i in range(4097)]}, "target_modules: "),
        (LoraFields, {"layers_to_transform": ["1"]}, "layers_to_transform: "),
        (IA3Fields, {"feedforward_modules": 3}, "feedforward_modules: "),
        (PromptFields, {}, "num_virtual_tokens: Field required$"),
        (PromptFields, {"num_virtual_tokens": -1}, "num_virtual_tokens: "),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_name(model, config, message):
    with pytest.raises(AdapterError, match=f"^{message}") as refused:
        parse_fields(model, {"peft_type": "X", **config})
    assert len(str(refused.value)) < 300


def test_module_lists_are_sets_and_patterns_stay_text():
    fields = parse_fields(LoraFields, {"peft_type": "LORA", "target_modules": ["a", "b", "a"], "exclude_modules": ".*c"})
    assert fields.target_modules == {"a", "b"}
    assert fields.exclude_modules == ".*c"
