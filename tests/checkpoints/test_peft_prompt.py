"""Prompt learning in PEFT's dialect, and discrete prompts: which tensors and lengths a config promises."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.checkpoints import read_checkpoints
from server.checkpoints.peft import read_peft
from server.errors import AdapterError
from tests.methods.test_discrete_prompt import BASE

EMBEDDINGS = {"prompt_embeddings": torch.ones(3, 6)}
TASKS = {"prefix_task_cols": torch.ones(2, 3, 1), "prefix_task_rows": torch.ones(2, 1, 6)}
SIZES = {"num_virtual_tokens": 3, "token_dim": 6}


def config(kind: str, **fields: Any) -> dict[str, Any]:
    return {"peft_type": kind, "task_type": "CAUSAL_LM", **fields}


CPT = config(
    "CPT", **SIZES, cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4], opt_projection_epsilon=9
)


@pytest.mark.parametrize(
    ("given", "tensors", "method"),
    [
        (config("PREFIX_TUNING", **SIZES), EMBEDDINGS, "prefix_tuning"),
        (config("PROMPT_TUNING", **SIZES, num_transformer_submodules=1), EMBEDDINGS, "prompt_tuning"),
        (config("P_TUNING", **SIZES), EMBEDDINGS, "p_tuning"),
        (config("MULTITASK_PROMPT_TUNING", **SIZES, num_tasks=2), EMBEDDINGS | TASKS, "multitask_prompt_tuning"),
        (CPT, EMBEDDINGS, "cpt"),
        (config("DISCRETE_PROMPT", template="a {input}", verbalizer={"x": ["y"]}), {}, "discrete_prompt"),
    ],
)
def test_each_kind_is_read_into_its_method(given, tensors, method):
    (checkpoint,) = read_peft(given, tensors)
    assert checkpoint.method == method
    assert checkpoint.loose == tensors
    assert (
        checkpoint.config.items()
        >= {
            name: value for name, value in given.items() if name not in ("peft_type", "task_type", "opt_projection_epsilon")
        }.items()
    )


def test_what_a_training_started_from_is_not_opened():
    named = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "/etc/passwd"}
    given = config("MULTITASK_PROMPT_TUNING", **SIZES, num_tasks=2, prompt_tuning_init_task=7, **named)
    (checkpoint,) = read_peft(given, EMBEDDINGS | TASKS)
    assert set(checkpoint.config).isdisjoint(named)


@pytest.mark.parametrize(
    ("given", "tensors", "message"),
    [
        (config("PROMPT_TUNING", **SIZES), EMBEDDINGS | TASKS, "prefix_task_cols: matches nothing that prompt_tuning stores"),
        (config("MULTITASK_PROMPT_TUNING", **SIZES, num_tasks=0), EMBEDDINGS, "num_tasks: .*greater than or equal to 1"),
        (config("MULTITASK_PROMPT_TUNING", **SIZES, num_ranks="1"), EMBEDDINGS, "num_ranks: .*integer"),
        (config("PREFIX_TUNING", **SIZES, num_transformer_submodules=2), EMBEDDINGS, "num_transformer_submodules: 2 is not"),
        (CPT | {"num_transformer_submodules": 2}, EMBEDDINGS, "num_transformer_submodules: 2 is not served"),
        (CPT | {"task_type": None}, EMBEDDINGS, "task_type: None is not served; served: 'CAUSAL_LM'"),
        (CPT | {"num_virtual_tokens": 4}, EMBEDDINGS, "num_virtual_tokens: is 4, but cpt_token_ids has 3 entries"),
        (CPT | {"cpt_token_ids": None}, EMBEDDINGS, "cpt_mask: has 3 entries, cpt_token_ids has 1"),
        (CPT | {"cpt_tokens_type_mask": [1]}, EMBEDDINGS, "cpt_tokens_type_mask: has 1 entries, cpt_token_ids has 3"),
        (CPT | {"cpt_mask": ["1"]}, EMBEDDINGS, "cpt_mask: .*integer"),
        (config("DISCRETE_PROMPT"), {}, "template: Field required"),
        (config("DISCRETE_PROMPT", template=["{input}"]), {}, "template: .*string"),
        (config("DISCRETE_PROMPT", template="{input}", verbalizer=["a"]), {}, "verbalizer: .*dictionary"),
        (config("DISCRETE_PROMPT", template="{input}", verbalizer={"a": "b"}), {}, "verbalizer: .*list"),
        (config("DISCRETE_PROMPT", template="{input}", verbalizer={"a": [1]}), {}, "verbalizer: .*string"),
        (config("DISCRETE_PROMPT", template="{input}"), EMBEDDINGS, "prompt_embeddings: matches nothing .* no tensors"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_by_name(given, tensors, message):
    with pytest.raises(AdapterError, match=f"^{message}"):
        read_peft(given, tensors)


def test_only_a_discrete_prompt_may_come_without_a_file_of_tensors(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config("DISCRETE_PROMPT", template="{input}")))
    (checkpoint,) = read_checkpoints({path.name: path}, BASE)
    assert checkpoint.method == "discrete_prompt"
    path.write_text(json.dumps(CPT))
    with pytest.raises(AdapterError, match=r"^adapter_model.safetensors: is missing"):
        read_checkpoints({path.name: path}, BASE)


def test_the_tensors_of_a_discrete_prompt_are_read_if_there_are_any(tmp_path):
    path, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    path.write_text(json.dumps(config("DISCRETE_PROMPT", template="{input}")))
    save_file(EMBEDDINGS, weights)
    with pytest.raises(AdapterError, match=r"^prompt_embeddings: matches nothing"):
        read_checkpoints({path.name: path, weights.name: weights}, BASE)
