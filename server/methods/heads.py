"""Heads: linear and MLP classifiers over the final hidden states (probing; sequence and token classification).

Owns the checks of a head and its arithmetic for one position. Has no sites: the runner reads the inner model's output
(after the final norm) and asks for each row's scores here, so a classified text costs no product with the vocabulary.

    Checkpoint.config = {"task_type": "SEQ_CLS" | "TOKEN_CLS", "pooling": "last" | "mean" (None = last),
                         "num_labels": int | None, "id2label": {int: str} | None, "activation": str | None}
    Checkpoint.loose  = {"score.weight": [k, H'], "score.bias": [k], "dense.weight": [H', H], "dense.bias": [H']}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor

from ..errors import AdapterError
from .activations import ACTIVATIONS, activation_of
from .base import BaseShape, Checkpoint, Head, Limits, Method, Part, Tensors, check_shape

_TENSORS: Final = ("score.weight", "score.bias", "dense.weight", "dense.bias")
_LONGEST_LABEL: Final = 256  # characters


class Heads(Method):
    """One head per adapter; two adapters with heads cannot be composed, as they share the pool."""

    name: ClassVar[str] = "head"
    also: ClassVar[str] = "`score` or `classifier` of any PEFT file with `task_type` SEQ_CLS or TOKEN_CLS"
    served: ClassVar[str] = "one matrix-vector product per row on the final hidden state, for `/classify`"

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        config, tensors = checkpoint.config, checkpoint.loose
        task = _task(config.get("task_type"))
        pooling = _pooling(config.get("pooling"), task)
        _check_tensors(tensors, _features(base))
        labels = _labels(config, len(tensors["score.weight"]))
        activation = config.get("activation")
        name = None if activation is None else activation_of("activation", str(activation))
        stored = {key: tensor.float().contiguous() for key, tensor in tensors.items()}
        told = {"task_type": task, "pooling": pooling, "labels": list(labels)}
        return Part(self.name, pool="head", head=Head(task, pooling, labels, stored, name), told={"head": told})


def head_scores(head: Head, hidden: Tensor) -> Tensor:
    """Logits [k] of one position's final hidden state, hidden [H] fp32.

    One matrix-vector product per position: a product over several would let the number of rows that happen to be in a
    step choose the order of summation, and so the last bits.
    """
    tensors = head.tensors
    if "dense.weight" in tensors:
        hidden = _linear(tensors["dense.weight"], tensors.get("dense.bias"), hidden)
        if head.activation is not None:
            hidden = ACTIVATIONS[head.activation](hidden)
    return _linear(tensors["score.weight"], tensors.get("score.bias"), hidden)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """weight [out, in], bias [out], x [in] -> [out]."""
    product = torch.mv(weight, x)
    return product if bias is None else product + bias


def _task(value: object) -> Literal["SEQ_CLS", "TOKEN_CLS"]:
    if value == "SEQ_CLS":
        return "SEQ_CLS"
    if value == "TOKEN_CLS":
        return "TOKEN_CLS"
    raise AdapterError("task_type", f"{value!r:.80} is not a task of a head; supported: SEQ_CLS, TOKEN_CLS")


def _pooling(value: object, task: str) -> Literal["last", "mean"]:
    if value in (None, "last"):
        return "last"
    if value == "cls":
        raise AdapterError("pooling", "'cls' needs a first token that sees the whole text; a causal base has none")
    if value != "mean":
        raise AdapterError("pooling", f"{value!r:.80} is not supported; supported: last, mean")
    if task == "TOKEN_CLS":
        raise AdapterError("pooling", "'mean' has no meaning for TOKEN_CLS, which scores every token")
    return "mean"


def _features(base: BaseShape) -> int:
    """Width of the final hidden state. It is what the output head takes: OPT may project it to another width."""
    head = base.modules.get(base.head)
    return head.in_features if head is not None else base.hidden_size


def _check_tensors(tensors: Tensors, features: int) -> None:
    for name in tensors:
        if name not in _TENSORS:
            raise AdapterError(name, f"belongs to no head; expected: {', '.join(_TENSORS)}")
    for layer in ("dense", "score"):
        weight, bias = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.bias")
        if weight is None:
            if layer == "score" or bias is not None:
                raise AdapterError(f"{layer}.weight", "is missing")
            continue
        if weight.ndim != 2 or not len(weight):
            raise AdapterError(f"{layer}.weight", f"has shape {list(weight.shape)}, a head needs [out, {features}]")
        check_shape(f"{layer}.weight", weight, (len(weight), features))
        if bias is not None:
            check_shape(f"{layer}.bias", bias, (len(weight),))
        features = len(weight)


def _labels(config: Mapping[str, object], count: int) -> tuple[str, ...]:
    """A name per class; transformers' own LABEL_0, LABEL_1 ... where the upload has none (PEFT stores none)."""
    declared = config.get("num_labels")
    if declared not in (None, count):
        raise AdapterError("num_labels", f"is {declared!r:.80}, but score.weight has {count} rows")
    names = config.get("id2label")
    if names is None:
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(names, Mapping) or set(names) != set(range(count)):
        raise AdapterError("id2label", f"must name the labels 0 to {count - 1}, as score.weight has {count} rows")
    for index, name in names.items():
        if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_LABEL:
            raise AdapterError("id2label", f"the name of label {index} must have 1 to {_LONGEST_LABEL} characters")
    labels = tuple(names[index] for index in range(count))
    if len(set(labels)) != count:
        raise AdapterError("id2label", "gives one name to two labels")
    return labels
