"""Classifiers in PEFT's files and the own HEAD format: where they are found, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from server.checkpoints.peft import read_peft
from server.errors import AdapterError

WEIGHT, BIAS = torch.ones(3, 4), torch.zeros(3)
LORA = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(4, 2),
}
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "target_modules": ["q_proj"],
    "task_type": "SEQ_CLS",
    "modules_to_save": ["classifier", "score"],
}


@pytest.mark.parametrize("module", ["score", "classifier"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_classifier_beside_a_lora(module: str, task: str) -> None:
    stored = {**LORA, f"base_model.model.{module}.weight": WEIGHT, f"base_model.model.{module}.bias": BIAS}
    lora, head = read_peft({**CONFIG, "task_type": task}, stored)
    assert (lora.method, head.method) == ("lora", "head")
    assert head.loose == {"score.weight": WEIGHT, "score.bias": BIAS}
    assert head.config == {
        "task_type": task,
        "pooling": "last",
        "num_labels": None,
        "id2label": None,
        "activation": None,
    }


def test_the_classifier_beside_a_prompt() -> None:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "task_type": "SEQ_CLS"}
    stored = {"prompt_embeddings": torch.ones(2, 4), "base_model.score.weight": WEIGHT}
    prompt, head = read_peft({**config, "modules_to_save": ["classifier", "score"] * 2}, stored)
    assert prompt.loose.keys() == {"prompt_embeddings"}
    assert head.loose.keys() == {"score.weight"}


def test_labels_given_to_the_config_by_hand() -> None:
    stored = {**LORA, "base_model.model.score.weight": WEIGHT}
    *_, head = read_peft({**CONFIG, "num_labels": 3, "id2label": {"0": "a", "2": "c", "1": "b"}}, stored)
    assert (head.config["num_labels"], head.config["id2label"]) == (3, {0: "a", 2: "c", 1: "b"})


@pytest.mark.parametrize(
    ("stored", "config", "message"),
    [
        ({}, {}, "task_type: is SEQ_CLS, but no score or classifier is stored"),
        ({"base_model.model.classifier.weight": WEIGHT}, {}, "base_model.model.score.weight: is a second classifier"),
        ({"base_model.score.bias": BIAS}, {}, "base_model.score.bias: is a second classifier, beside base_model.model.score"),
        ({"base_model.model.score.dense.weight": WEIGHT}, {}, "base_model.model.score.dense.weight: "),
        ({}, {"task_type": "CAUSAL_LM", "modules_to_save": None}, "base_model.model.score.weight: "),
        ({}, {"task_type": "QUESTION_ANS"}, "task_type: 'QUESTION_ANS' is not served; served: None, 'CAUSAL_LM', 'SEQ_CLS'"),
        ({}, {"id2label": {"a": "x"}}, "id2label: key 'a' is no class index"),
        ({}, {"id2label": {"-1": "x"}}, "id2label: key '-1' is no class index"),
        ({}, {"id2label": ["x"]}, "id2label: Input should be a valid dictionary"),
        ({}, {"num_labels": "3"}, "num_labels: Input should be a valid integer"),
    ],
)
def test_what_is_wrong_is_said_by_name(stored: dict[str, Tensor], config: dict[str, Any], message: str) -> None:
    own = {} if message.startswith("task_type: is SEQ_CLS") else {"base_model.model.score.weight": WEIGHT}
    with pytest.raises(AdapterError) as refused:
        read_peft({**CONFIG, **config}, {**LORA, **own, **stored})
    assert str(refused.value).startswith(message)


OWN = {"peft_type": "HEAD", "task_type": "SEQ_CLS"}


def test_the_own_format() -> None:
    stored = {"dense.weight": torch.ones(8, 4), "dense.bias": torch.ones(8), "score.weight": torch.ones(2, 8)}
    config = {"pooling": "mean", "num_labels": 2, "id2label": {"0": "a", "1": "b"}, "hidden": 8, "activation": "tanh"}
    (head,) = read_peft({**OWN, **config}, stored)
    assert head.loose == stored
    assert head.config == {
        "task_type": "SEQ_CLS",
        "pooling": "mean",
        "num_labels": 2,
        "id2label": {0: "a", 1: "b"},
        "activation": "tanh",
    }


def test_the_least_of_the_own_format() -> None:
    (head,) = read_peft({**OWN, "hidden": None}, {"score.weight": WEIGHT})
    assert (head.method, head.config["pooling"]) == ("head", None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden": 8}, "hidden: is 8, dense.weight has none rows"),
        ({"activation": "relu"}, "activation: stands behind the dense layer, and there is none"),
        ({"task_type": "CAUSAL_LM"}, "task_type: Input should be 'SEQ_CLS' or 'TOKEN_CLS', got 'CAUSAL_LM'"),
        ({"task_type": None}, "task_type: "),
        ({"pooling": 3}, "pooling: "),
        ({"modules_to_save": ["score"]}, "modules_to_save: "),
    ],
)
def test_the_own_format_is_refused_by_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError) as refused:
        read_peft({**OWN, **config}, {"score.weight": WEIGHT})
    assert str(refused.value).startswith(message)


def test_a_dense_layer_must_be_announced() -> None:
    with pytest.raises(AdapterError, match=r"hidden: is None, dense\.weight has 8 rows"):
        read_peft(OWN, {"dense.weight": torch.ones(8, 4), "score.weight": torch.ones(2, 8)})
