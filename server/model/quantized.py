"""The base's linear layers in int8 where there is no native kernel for it: torch widens a matrix each time it multiplies.

The pure-torch twin of a packed int8 linear: the same rounding, the same order (sums first, then the channel's scale), a
quarter of fp32's memory, no speed. Replaces modules of a loaded model once; knows no adapters.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import hold_in, matrix_of, output_head
from .native.int8 import Int8Weight


class QuantizedModule(nn.Module):
    """A frozen Linear or Conv1D over an int8 weight, in the activations' dtype but for the scaling, which is fp32."""

    values: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        """weight [out, in]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = F.linear(x, self.values.to(x.dtype)).float() * self.scales
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def unpack(self) -> Tensor:
        """The matrix [out, in] that it multiplies with, in fp32."""
        return Int8Weight(self.values, self.scales).widened()


def quantize_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace plain Linears and Conv1Ds, but the output head, by their int8 form; what else holds weights goes to `dtype`."""
    head = output_head(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is not head and (weight := matrix_of(child)) is not None:
                setattr(module, name, QuantizedModule(Int8Weight.of(weight), cast("Tensor | None", child.bias)))
    for module in model.modules():
        if not isinstance(module, QuantizedModule):
            hold_in(module, dtype)
