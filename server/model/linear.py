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

from ..host_memory import Room
from .native import NativeKernels
from .native.int8 import Int8Weight
from .sites import Extension


class PackedModule(nn.Module):
    """A frozen Linear or Conv1D over packed weights. Invariant: the same arithmetic as the module it replaced, in fp32."""

    def __init__(self, native: NativeKernels, weight: Tensor, bias: Tensor | None, room: Room, int8: bool = False) -> None:
        """weight [out, in]; `int8`: rounded to eight bits, in place of keeping every value."""
        super().__init__()
        self.extension: Extension | None = None  # what adapters do here
        held = Int8Weight.of(weight) if int8 else _compact(weight)
        self.packed = native.packed_linear(held, None if bias is None else bias.float(), place=room.place, tiles=True)
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


def pack_model(model: nn.Module, native: NativeKernels, int8: bool = False) -> None:
    """Replace every Linear, Conv1D and plain embedding in place; whatever else holds weights becomes fp32.

    `int8` rounds the matrices of Linears and Conv1Ds to eight bits, but for the output head's: every logit would feel it,
    and adapters bring copies of it to be compared.

    Shapes and biases must have been read before: the replaced modules have no `weight` any more.
    """
    head, room = output_head(model), Room()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            replacement = _packed(child, native, room, int8 and child is not head)
            if replacement is not None:
                setattr(module, name, replacement)
    for module in model.modules():
        if not isinstance(module, WideningEmbedding):
            hold_in(module, torch.float32)


def _packed(module: nn.Module, native: NativeKernels, room: Room, int8: bool) -> nn.Module | None:
    """Subclasses do something of their own (a scaled embedding, say) and are left alone."""
    if (weight := matrix_of(module)) is not None:
        return PackedModule(native, weight, cast("Tensor | None", module.bias), room, int8)
    if type(module) is nn.Embedding:
        return WideningEmbedding(module.weight)
    return None


def output_head(model: nn.Module) -> nn.Module | None:
    """What gives a language model's logits; None of anything else."""
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else cast("nn.Module | None", get())


def matrix_of(module: nn.Module) -> Tensor | None:
    """The weight [out, in] of a plain Linear or Conv1D, None of anything else."""
    if type(module) is nn.Linear:
        return module.weight
    return cast("Tensor", module.weight).T if type(module) is Conv1D else None


def hold_in(module: nn.Module, dtype: torch.dtype) -> None:
    """A module's own parameters in `dtype`, and its floating-point buffers in no less than that."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(module, name, buffer.to(torch.promote_types(buffer.dtype, dtype)))


def _compact(weight: Tensor) -> Tensor:
    """The weight in bf16 where that loses nothing, else in fp32."""
    weight = weight.detach()
    narrow = weight.to(torch.bfloat16)
    exact = weight.dtype is torch.bfloat16 or torch.equal(narrow.float(), weight.float())
    return (narrow if exact else weight.float()).contiguous()
