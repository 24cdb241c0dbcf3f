"""Activations an adapter's config may name, by the names transformers gives them.

Owns the table. Imports nothing by name and accepts none that has parameters of its own (prelu, xielu).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError

ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_10": lambda x: F.gelu(x).clamp(-10.0, 10.0),
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "hardswish": F.hardswish,
        "laplace": lambda x: 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * 2.0**0.5))),
        "leaky_relu": F.leaky_relu,
        "linear": lambda x: x,
        "mish": F.mish,
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
        "relu6": F.relu6,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "tanh": torch.tanh,
    }
)
#: Other names of the same functions, so that equal adapters share a pool; "leakyrelu" is AdapterHub's.
ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "gelu_accurate": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu_python": "gelu",
        "gelu_python_tanh": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "leakyrelu": "leaky_relu",
        "swish": "silu",
    }
)


def activation_of(field: str, name: str) -> str:
    """The name in ACTIVATIONS. Raises: AdapterError naming the config field of an activation that is not served."""
    lowered = name.lower()
    found = ALIASES.get(lowered, lowered)
    if found not in ACTIVATIONS:
        known = ", ".join(sorted({*ACTIVATIONS, *ALIASES}))
        raise AdapterError(field, f"activation {name[:40]!r} is not supported; supported: {known}")
    return found
