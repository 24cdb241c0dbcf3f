"""AdapterHub's prediction heads: what is read of their files, and every refusal by the field, tensor or file it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.checkpoints import read_checkpoints
from server.checkpoints.adapterhub_heads import read_adapterhub_head
from server.errors import AdapterError
from server.methods.base import Checkpoint
from tests.checkpoints.golden import GOLDEN, base_of, upload


def stored(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = GOLDEN / "heads" / case
    return json.loads((folder / "head_config.json").read_text()), load_file(folder / "model_head.safetensors")


def read(
    case: str, tensors: dict[str, Tensor | None] | None = None, config: dict[str, Any] | None = None, **file: Any
) -> tuple[Checkpoint, ...]:
    """The case with tensors added, changed or (None) taken away, fields of its config set, fields of the file set."""
    told, found = stored(case)
    told = {**told, **file}
    if config is not None:
        told["config"] = {**told["config"], **config}
    changed = {key: value for key, value in {**found, **(tensors or {})}.items() if value is not None}
    return read_adapterhub_head(told, changed, base_of(case.partition("/")[0]))


def refused(case: str, tensors: dict[str, Tensor | None] | None = None, **changes: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read(case, tensors, **changes)
    return caught.value


def test_a_classification_is_two_layers_over_the_last_token() -> None:
    (head,) = read("llama/classification")
    labels = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert head.config == {
        "task_type": "SEQ_CLS",
        "pooling": "last",
        "num_labels": 3,
        "id2label": labels,
        "activation": "tanh",
    }
    _, tensors = stored("llama/classification")
    names = {"dense.weight": "1.weight", "dense.bias": "1.bias", "score.weight": "4.weight", "score.bias": "4.bias"}
    assert {name: tensor.tolist() for name, tensor in head.loose.items()} == {
        name: tensors[f"heads.golden.{key}"].tolist() for name, key in names.items()
    }


def test_a_tagging_has_a_label_per_token() -> None:
    (head,) = read("gpt2/tagging")
    assert (head.config["task_type"], head.config["id2label"]) == ("TOKEN_CLS", {0: "no", 1: "yes"})
    assert head.loose.keys() == {"score.weight", "score.bias"}


def test_without_an_activation_the_last_layer_is_one_place_earlier() -> None:
    _, tensors = stored("llama/no_activation")
    assert tensors.keys() == {f"heads.golden.{i}.{name}" for i in (1, 3) for name in ("weight", "bias")}
    assert read("llama/no_activation")[0].config["activation"] is None


@pytest.mark.parametrize("case", ["llama/static_classification", "qwen2/static_tagging", "gpt2/static_tagging"])
def test_a_head_of_transformers_is_one_layer(case: str) -> None:
    (head,) = read(case)
    assert head.loose["score.weight"].shape == (3, 32)
    assert ("score.bias" in head.loose) is case.endswith("tagging")
    assert head.config["task_type"] == ("TOKEN_CLS" if case.endswith("tagging") else "SEQ_CLS")


def test_fields_that_change_nothing_on_a_decoder() -> None:
    (one,), (other,) = read("llama/linear"), read("llama/linear", config={"use_pooler": True, "dropout_prob": 0.5})
    assert one.config == other.config


@pytest.mark.parametrize(
    ("case", "config", "field"),
    [
        ("llama/classification", {"head_type": "multilabel_classification"}, "config.head_type"),
        ("llama/classification", {"head_type": None}, "config.head_type"),
        ("llama/classification", {"head_type": ["classification"]}, "config.head_type"),
        ("llama/classification", {"layers": 3}, "config.layers"),
        ("llama/classification", {"layers": True}, "config.layers"),
        ("llama/classification", {"activation_function": "prelu"}, "config.activation_function"),
        ("llama/classification", {"num_labels": 0}, "config.num_labels"),
        ("llama/classification", {"label2id": {"a": 0, "b": 0, "c": 1}}, "config.label2id"),
        ("llama/classification", {"label2id": {"a": 0}}, "config.label2id"),
        ("llama/classification", {"pooling": "mean"}, "config.pooling"),
        ("llama/causal_lm", {"layers": 2}, "config.layers"),
        ("llama/causal_lm", {"tied": True}, "config.tied"),
    ],
)
def test_a_field_of_the_head_that_is_not_served_is_named(case: str, config: dict[str, Any], field: str) -> None:
    assert refused(case, config=config).field == f"head_config.json: {field}"


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", "gpt2"), ("hidden_size", 64), ("name", None), ("model_class", 3)],
)
def test_a_field_of_the_file_that_does_not_fit_is_named(field: str, value: Any) -> None:
    assert refused("llama/classification", **{field: value}).field == f"head_config.json: {field}"


@pytest.mark.parametrize("cls", ["LlamaForQuestionAnswering", "BertForMaskedLM", "x"])
def test_another_class_of_transformers_is_named(cls: str) -> None:
    assert refused("llama/static_classification", model_class=cls).field == "head_config.json: model_class"


def test_the_number_of_labels_must_be_said_and_be_that_of_the_tensor() -> None:
    assert refused("llama/static_classification", num_labels=None).field == "head_config.json: num_labels"
    assert refused("llama/static_classification", num_labels=4).field == "score.weight"
    assert refused("llama/classification", config={"num_labels": 4, "label2id": None}).field == "heads.golden.4.weight"


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("llama/classification", "heads.golden.7.weight"),
        ("llama/classification", "heads.other.1.weight"),
        ("llama/classification", "score.weight"),
        ("llama/static_classification", "score.scale"),
        ("llama/static_classification", "lm_head.weight"),
        ("llama/causal_lm", "heads.golden.1.weight"),
        ("mistral/static_causal_lm", "score.weight"),
    ],
)
def test_a_tensor_that_is_no_part_of_the_head_is_named(case: str, key: str) -> None:
    assert refused(case, {key: torch.ones(2)}).field == key


def test_a_missing_tensor_is_named() -> None:
    assert refused("llama/classification", {"heads.golden.1.bias": None}).field == "heads.golden.1.bias"


def test_the_bases_own_output_head_is_no_part_of_an_adapter() -> None:
    assert read("mistral/static_causal_lm") == ()
    weight = stored("mistral/static_causal_lm")[1]["lm_head.weight"]
    (own,) = read("mistral/static_causal_lm", {"lm_head.weight": weight + 1})
    assert (own.method, list(own.sites)) == ("full", ["lm_head"])


def test_a_bias_of_the_output_head_is_held_against_the_bases() -> None:
    weight = stored("mistral/static_causal_lm")[1]["lm_head.weight"]
    full, bias = read("llama/causal_lm")
    assert (full.method, bias.method) == ("full", "bitfit")
    changes: dict[str, Tensor | None] = {"lm_head.weight": weight, "lm_head.bias": torch.arange(64.0)}
    (delta,) = read("mistral/static_causal_lm", changes)
    assert delta.sites["lm_head"]["delta"].tolist() == torch.arange(64.0).tolist()
    assert read("mistral/static_causal_lm", {"lm_head.bias": torch.zeros(64)}) == ()


def phi_head(directory: Path, bias: Tensor | None) -> tuple[Checkpoint, ...]:
    """An output head over phi, whose own has a bias."""
    base = base_of("phi")
    weight = base.weight("lm_head")
    tensors = {"lm_head.weight": weight} | ({} if bias is None else {"lm_head.bias": bias})
    save_file(tensors, directory / "x.safetensors")
    told = {"config": None, "model_class": "PhiForCausalLM", "model_type": "phi", "hidden_size": 32}
    return read_adapterhub_head(told, load_file(directory / "x.safetensors"), base)


def test_a_base_with_a_bias_of_its_own(tmp_path: Path) -> None:
    own = base_of("phi").modules["lm_head"].bias
    assert own is not None
    assert phi_head(tmp_path, own) == ()
    (moved,) = phi_head(tmp_path, own + 2)
    assert torch.allclose(moved.sites["lm_head"]["delta"], torch.full((64,), 2.0), atol=1e-6)
    (gone,) = phi_head(tmp_path, None)
    assert torch.equal(gone.sites["lm_head"]["delta"], -own)


@pytest.mark.parametrize("name", ["head_config.json", "model_head.safetensors"])
def test_half_a_head_is_refused_by_the_file_that_is_missing(name: str) -> None:
    paths = upload("heads", "llama/classification")
    del paths[name]
    with pytest.raises(AdapterError, match=f"^{name}: is missing from the upload"):
        read_checkpoints(paths, base_of("llama"))


def test_an_upload_with_a_head_gives_both() -> None:
    found = read_checkpoints(upload("heads", "llama/classification"), base_of("llama"))
    assert [checkpoint.method for checkpoint in found] == ["bottleneck", "head"]
