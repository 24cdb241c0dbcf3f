"""Heads in PEFT's dialect: the classifier that a SEQ_CLS or TOKEN_CLS file holds beside its adapter, and the own HEAD format.

Owns the names under which a classifier is stored. Checks no shape: that is the method's business.

    base_model.model.score.weight     LoRA, IA3 ... of llama's kind    (modules_to_save: score, classifier)
    base_model.classifier.weight      prompt learning
    score.weight, dense.weight        own format, {"peft_type": "HEAD", "task_type", "pooling", "hidden", ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..errors import AdapterError
from ..methods.base import Checkpoint, Tensors
from .peft_fields import HEAD_TASKS, HeadFields, LabelFields, parse_fields

CLASSIFIERS: Final = ("score", "classifier")  # what PEFT saves whole for these two tasks
_PREFIXES: Final = ("base_model.model.", "base_model.")
#: Key of the file -> (module of the file, neutral name).
_KEYS: Final[Mapping[str, tuple[str, str]]] = {
    f"{prefix}{module}.{name}": (prefix + module, f"score.{name}")
    for prefix in _PREFIXES
    for module in CLASSIFIERS
    for name in ("weight", "bias")
}


def split_head(config: Mapping[str, object], tensors: Tensors) -> tuple[Mapping[str, object], Tensors, tuple[Checkpoint, ...]]:
    """(config, tensors, heads): the upload without its classifier, and the classifier, for a task that has one.

    Raises: AdapterError naming the classifier's tensor when it is missing or stored twice.
    """
    if config.get("task_type") not in HEAD_TASKS or config.get("peft_type") == "HEAD":
        return config, tensors, ()
    stored = sorted(tensors.keys() & _KEYS.keys())
    if not stored:
        raise AdapterError("task_type", f"is {config['task_type']}, but no {' or '.join(CLASSIFIERS)} is stored")
    second = next((key for key in stored if _KEYS[key][0] != _KEYS[stored[0]][0]), None)
    if second is not None:
        raise AdapterError(second, f"is a second classifier, beside {stored[0]}")
    found = {_KEYS[key][1]: tensors[key] for key in stored}
    rest = {key: tensor for key, tensor in tensors.items() if key not in _KEYS}
    return _without_classifier(config), rest, (_peft_head(config, found),)


def read_head(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    """The own format. Raises: AdapterError naming the field or tensor at fault."""
    fields = parse_fields(HeadFields, config)
    dense = tensors.get("dense.weight")
    width = None if dense is None else dense.shape[0] if dense.ndim else 0
    if fields.hidden != width:
        raise AdapterError("hidden", f"is {fields.hidden}, dense.weight has {'none' if width is None else width} rows")
    if fields.activation is not None and dense is None:
        raise AdapterError("activation", "stands behind the dense layer, and there is none")
    neutral = {
        "task_type": fields.task_type,
        "pooling": fields.pooling,
        "num_labels": fields.num_labels,
        "id2label": _by_index(fields.id2label),
        "activation": fields.activation,
    }
    return (Checkpoint(method, neutral, loose=tensors),)


def _peft_head(config: Mapping[str, object], tensors: Tensors) -> Checkpoint:
    """transformers' classifier of a decoder: one layer on the text's last token, or on each. PEFT stores no label names,
    so the config may be given them by hand."""
    labels = parse_fields(LabelFields, config)
    neutral = {
        "task_type": config["task_type"],
        "pooling": "last",
        "num_labels": labels.num_labels,
        "id2label": _by_index(labels.id2label),
        "activation": None,
    }
    return Checkpoint("head", neutral, loose=tensors)


def _without_classifier(config: Mapping[str, object]) -> Mapping[str, object]:
    """The config with the classifier taken out of `modules_to_save`, where PEFT puts it unasked."""
    saved = config.get("modules_to_save")
    if not isinstance(saved, list):
        return config
    return {**config, "modules_to_save": [name for name in saved if name not in CLASSIFIERS] or None}


def _by_index(names: Mapping[str, str] | None) -> Mapping[int, str] | None:
    """JSON's keys are strings. Raises: AdapterError naming id2label for one that is no class index."""
    if names is None:
        return None
    for key in names:
        if not key.isdecimal() or not key.isascii() or len(key) > 9:
            raise AdapterError("id2label", f"key {key!r:.40} is no class index")
    return {int(key): name for key, name in names.items()}
