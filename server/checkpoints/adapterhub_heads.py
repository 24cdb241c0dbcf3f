"""AdapterHub's prediction heads (head_config.json and model_head.safetensors) into neutral checkpoints.

Owns where a head's layers lie in its file: heads.<name>.<index> for the library's own, transformers' names for the rest.
A decoder's classification reads the last token's state, a tagging head every token's (its models' own forward).

    own, 2 layers    0 dropout · 1 dense · 2 activation · 3 dropout · 4 last          (without an activation: last is 3)
    transformers'    score | classifier (one layer);  lm_head
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import torch

from ..errors import AdapterError
from ..methods.activations import activation_of
from ..methods.base import BaseShape, Checkpoint, Tensors
from .adapterhub_fields import HeadFields, HeadUploadFields, head_of, parse, shown
from .adapterhub_sites import Site

HEAD: Final = "head_config.json"
HEAD_WEIGHTS: Final = "model_head.safetensors"
_WHERE: Final = f"{HEAD}: "
_STATIC: Final[Mapping[str, Literal["SEQ_CLS", "TOKEN_CLS", "LM"]]] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "LM",
    "LMHeadModel": "LM",
}


def read_adapterhub_head(config: Mapping[str, object], tensors: Tensors, base: BaseShape) -> tuple[Checkpoint, ...]:
    """A head's checkpoints: none where it is the base's own output head, which the library saves with every adapter.

    Raises: AdapterError naming the config field or the tensor at fault.
    """
    upload = parse(HeadUploadFields, config, _WHERE)
    for field, have, want in (
        ("model_type", upload.model_type, base.model_type),
        ("hidden_size", upload.hidden_size, base.hidden_size),
    ):
        if have != want:
            raise AdapterError(_WHERE + field, f"{shown(have)} is not the base model's, {want!r}")
    if upload.config is None:
        return _static(upload, tensors, base)
    fields = head_of(upload.config, f"{_WHERE}config.")
    if upload.name is None:
        raise AdapterError(f"{_WHERE}name", "is missing")
    site = _site(tensors, f"heads.{upload.name}.")
    return _layers(fields, site, base) if isinstance(fields, HeadFields) else _output_head(site, "0.", fields.bias, base)


def _site(tensors: Tensors, prefix: str) -> Site:
    for key in tensors:
        if not key.startswith(prefix):
            raise AdapterError(key, f"is not under {shown(prefix)}, where the config's head is")
    return Site(prefix, "", {key.removeprefix(prefix): tensor for key, tensor in tensors.items()})


def _layers(fields: HeadFields, site: Site, base: BaseShape) -> tuple[Checkpoint, ...]:
    where, hidden = f"{_WHERE}config.", base.hidden_size
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    last, activation = 1, None
    if fields.layers == 2:
        shapes = {"dense.weight": ("1.weight", (hidden, hidden)), "dense.bias": ("1.bias", (hidden,))}
        last = 3
        if fields.activation_function:
            last, activation = 4, activation_of(f"{where}activation_function", fields.activation_function)
    shapes["score.weight"] = (f"{last}.weight", (fields.num_labels, hidden))
    if fields.bias:
        shapes["score.bias"] = (f"{last}.bias", (fields.num_labels,))
    site.check_only([name for name, _ in shapes.values()])
    found = {neutral: site.take(name, shape) for neutral, (name, shape) in shapes.items()}
    task = "SEQ_CLS" if fields.head_type == "classification" else "TOKEN_CLS"
    labels = _labels(fields.label2id, fields.num_labels, f"{where}label2id")
    return (_head(task, fields.num_labels, labels, found, activation),)


def _static(upload: HeadUploadFields, tensors: Tensors, base: BaseShape) -> tuple[Checkpoint, ...]:
    task = next((task for suffix, task in _STATIC.items() if upload.model_class.endswith(suffix)), None)
    if task is None:
        served = ", ".join(f"*{suffix}" for suffix in _STATIC)
        raise AdapterError(
            f"{_WHERE}model_class", f"{shown(upload.model_class)} has a head that is not served; served: {served}"
        )
    if task == "LM":
        return _output_head(_site(tensors, f"{base.head}."), "", f"{base.head}.bias" in tensors, base)
    prefix = "classifier." if "classifier.weight" in tensors else "score."
    site = _site(tensors, prefix)
    if upload.num_labels is None:
        raise AdapterError(f"{_WHERE}num_labels", "is missing")
    site.check_only(("weight", "bias"))
    found = {"score.weight": site.take("weight", (upload.num_labels, base.hidden_size))}
    if "bias" in site.tensors:
        found["score.bias"] = site.take("bias", (upload.num_labels,))
    return (_head(task, upload.num_labels, _labels(upload.label2id, upload.num_labels, f"{_WHERE}label2id"), found),)


def _head(task: str, count: int, labels: Mapping[int, str] | None, found: Tensors, activation: str | None = None) -> Checkpoint:
    config = {"task_type": task, "pooling": "last", "num_labels": count, "id2label": labels, "activation": activation}
    return Checkpoint("head", config, loose=found)


def _labels(label2id: Mapping[str, int] | None, count: int, field: str) -> Mapping[int, str] | None:
    """Names by class. Raises: AdapterError unless each class has exactly one."""
    if label2id is None:
        return None
    if sorted(label2id.values()) != list(range(count)):
        raise AdapterError(field, f"must give each of 0 to {count - 1} one label, got {shown(label2id)}")
    return {index: label for label, index in label2id.items()}


def _output_head(site: Site, index: str, bias: bool, base: BaseShape) -> tuple[Checkpoint, ...]:
    """The output head of a causal LM, weight and bias each only where they differ from the base's."""
    shape = base.modules.get(base.head)
    if shape is None:
        raise AdapterError(
            site.prefix[:-1], f"is an output head; the base model ({base.model_type}) has none that can be named"
        )
    site.check_only([f"{index}weight", *([f"{index}bias"] if bias else [])])
    weight = site.take(f"{index}weight", (shape.out_features, shape.in_features))
    none = torch.zeros(shape.out_features)
    stored, own = site.take(f"{index}bias", (shape.out_features,)).float() if bias else none, shape.bias
    moved = stored if own is None else stored - own
    found: list[Checkpoint] = []
    if not torch.equal(weight.float(), base.weight(base.head)):
        whole = {"weight": weight} if own is None else {"weight": weight, "bias": stored}
        found, moved = [Checkpoint("full", {}, {base.head: whole})], stored if own is None else none
    if moved.any():
        found.append(Checkpoint("bitfit", {}, {base.head: {"delta": moved}}))
    return tuple(found)
