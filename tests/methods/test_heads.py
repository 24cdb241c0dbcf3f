"""Heads: what a checkpoint may say and hold, each refusal by name, and the arithmetic of one position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import BaseShape, Checkpoint, Head, Limits
from server.methods.heads import head_scores

H = 32


@pytest.fixture
def base(base_of: Callable[[str], BaseShape]) -> BaseShape:
    return base_of("llama")


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    given = {"score_weight": (3, H), **shapes}
    return {name.replace("_", "."): torch.ones(shape) for name, shape in given.items()}


def read(base: BaseShape, loose: dict[str, Tensor] | None = None, **config: Any) -> Head:
    checkpoint = Checkpoint("head", {"task_type": "SEQ_CLS", **config}, loose=tensors() if loose is None else loose)
    part = METHODS["head"].read(checkpoint, base, Limits())
    assert part.head is not None
    assert part.told["head"] == {
        "task_type": part.head.task,
        "pooling": part.head.pooling,
        "labels": list(part.head.labels),
    }
    assert part.nbytes == part.head.nbytes > 0
    return part.head


def test_defaults(base: BaseShape) -> None:
    head = read(base)
    assert (head.task, head.pooling, head.activation, head.every_position) == ("SEQ_CLS", "last", None, False)
    assert head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_everything_that_can_be_said(base: BaseShape) -> None:
    loose = tensors(dense_weight=(8, H), dense_bias=(8,), score_weight=(2, 8), score_bias=(2,))
    head = read(base, loose, pooling="mean", num_labels=2, id2label={1: "bad", 0: "good"}, activation="swish")
    assert (head.labels, head.pooling, head.activation, head.every_position) == (("good", "bad"), "mean", "silu", True)
    assert read(base, task_type="TOKEN_CLS").every_position


def test_tensors_are_kept_in_fp32(base: BaseShape) -> None:
    head = read(base, {"score.weight": torch.ones(3, H, dtype=torch.bfloat16)})
    assert head.tensors["score.weight"].dtype is torch.float32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"task_type": "CAUSAL_LM"}, "task_type: 'CAUSAL_LM' is not a task of a head; supported: SEQ_CLS, TOKEN_CLS"),
        ({"task_type": None}, "task_type: None"),
        ({"pooling": "cls"}, "pooling: 'cls' needs a first token that sees the whole text; a causal base has none"),
        ({"pooling": "max"}, "pooling: 'max' is not supported; supported: last, mean"),
        ({"pooling": "mean", "task_type": "TOKEN_CLS"}, "pooling: 'mean' has no meaning for TOKEN_CLS"),
        ({"num_labels": 4}, "num_labels: is 4, but score.weight has 3 rows"),
        ({"id2label": {0: "a"}}, "id2label: must name the labels 0 to 2, as score.weight has 3 rows"),
        ({"id2label": {0: "a", 1: "b", 3: "c"}}, "id2label: must name the labels 0 to 2"),
        ({"id2label": {0: "a", 1: "b", 2: ""}}, "id2label: the name of label 2 must have 1 to 256 characters"),
        ({"id2label": {0: "a", 1: "b", 2: "c" * 257}}, "id2label: the name of label 2"),
        ({"id2label": {0: "a", 1: "b", 2: "a"}}, "id2label: gives one name to two labels"),
        ({"activation": "prelu"}, "activation: activation 'prelu' is not supported"),
    ],
)
def test_a_config_is_refused_by_field(base: BaseShape, config: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError) as refused:
        read(base, **config)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"score_weight": (3, H + 1)}, "score.weight: has shape [3, 33], the base model needs [3, 32]"),
        ({"score_weight": (3,)}, "score.weight: has shape [3], a head needs [out, 32]"),
        ({"score_weight": (0, H)}, "score.weight: has shape [0, 32]"),
        ({"score_bias": (2,)}, "score.bias: has shape [2], the base model needs [3]"),
        ({"dense_weight": (8, H)}, "score.weight: has shape [3, 32], the base model needs [3, 8]"),
        ({"dense_bias": (8,)}, "dense.weight: is missing"),
        ({"dense_weight": (8, 5)}, "dense.weight: has shape [8, 5], the base model needs [8, 32]"),
        ({"other_weight": (8, 5)}, "other.weight: belongs to no head; expected: score.weight, score.bias, dense.weight"),
    ],
)
def test_a_tensor_is_refused_by_name(base: BaseShape, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(AdapterError) as refused:
        read(base, tensors(**shapes))
    assert str(refused.value).startswith(message)


def test_a_head_without_a_last_layer_is_refused(base: BaseShape) -> None:
    with pytest.raises(AdapterError, match=r"score\.weight: is missing"):
        read(base, {})


def test_scores_of_one_position() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"dense.weight": (8, H), "dense.bias": (8,), "score.weight": (3, 8), "score.bias": (3,)}
    held = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    hidden = torch.randn(H, generator=generator)
    inner = held["dense.weight"] @ hidden + held["dense.bias"]
    for activation, value in (("relu", inner.relu()), (None, inner)):
        want = held["score.weight"] @ value + held["score.bias"]
        head = Head("SEQ_CLS", "last", ("a", "b", "c"), held, activation)
        torch.testing.assert_close(head_scores(head, hidden), want)
