"""Linear layers packed for the CPU, and embeddings kept in the checkpoint's dtype: the base's weights as they are held.

A weight whose values are all exact in bf16 is stored in bf16 and multiplied in fp32: half the bytes of a step, the same
numbers. Replaces modules of a loaded model once; knows no adapters.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .native import NativeKernels
from .sites import Extension


class PackedModule(nn.Module):
    """A frozen Linear or Conv1D over packed weights. Invariant: the same arithmetic as the module it replaced, in fp32."""

    def __init__(self, native: NativeKernels, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in]."""
        super().__init__()
        self.extension: Extension | None = None  # what adapters do here
        self.packed = native.packed_linear(_compact(weight), None if bias is None else bias.float())
        self.in_features, self.out_features = self.packed.in_features, self.packed.out_features

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] fp32 -> [..., out]."""
        extension = self.extension
        if extension is not None:
            x = extension.before(x)
        y = self.packed(x if x.is_contiguous() else x.contiguous())
        return y if extension is None else extension(x, y)


class WideningEmbedding(nn.Module):
    """An embedding table held in its own dtype, read as fp32."""

    def __init__(self, weight: Tensor) -> None:
        """weight [V, hidden]."""
        super().__init__()
        # A copy of its own: a view into the checkpoint would keep the whole file mapped.
        self.weight = nn.Parameter(_compact(weight).clone(), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., hidden] fp32."""
        return F.embedding(ids, self.weight).float()


def pack_model(model: nn.Module, native: NativeKernels) -> None:
    """Replace every Linear, Conv1D and plain embedding in place; whatever else holds weights becomes fp32.

    Shapes and biases must have been read before: the replaced modules have no `weight` any more.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            replacement = _packed(child, native)
            if replacement is not None:
                setattr(module, name, replacement)
    for module in model.modules():
        if not isinstance(module, WideningEmbedding):
            _widen(module)


def _packed(module: nn.Module, native: NativeKernels) -> nn.Module | None:
    """Subclasses do something of their own (a scaled embedding, say) and are left alone."""
    if type(module) is nn.Linear:
        return PackedModule(native, module.weight, module.bias)
    if type(module) is Conv1D:
        return PackedModule(native, cast("Tensor", module.weight).T, cast("Tensor", module.bias))
    if type(module) is nn.Embedding:
        return WideningEmbedding(module.weight)
    return None


def _widen(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.float()
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(module, name, buffer.float())


def _compact(weight: Tensor) -> Tensor:
    """The weight in bf16 where that loses nothing, else in fp32."""
    weight = weight.detach()
    narrow = weight.to(torch.bfloat16)
    exact = weight.dtype is torch.bfloat16 or torch.equal(narrow.float(), weight.float())
    return (narrow if exact else weight.float()).contiguous()
