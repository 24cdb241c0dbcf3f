"""Prepared calls: a kernel with all that stays the same from step to step given and checked once.

Each can be called, or be an instruction of a layer. Owns what such a call holds on to. A step makes some hundreds of calls, so
one costs microseconds: cached pointers, no views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import LORA_RULES, check
from .int8 import Int8Weight, pack_int8, unpack_int8
from .layouts import Place, pack, pack_tiles, unpack, unpack_tiles
from .opcodes import BOTTLENECK, LINEAR, LORA

_fp32 = torch.float32

#: Of bottlenecks, in the order of `Activation` in bottleneck.cpp; the names are those of `server.methods.activations`.
ACTIVATIONS = (
    "linear", "relu", "relu2", "relu6", "leaky_relu", "sigmoid", "silu", "quick_gelu", "tanh", "gelu_tanh", "gelu",
    "gelu_10", "hardswish", "laplace", "mish",
)  # fmt: skip

#: Storage of a packed weight, in the order of `Form` in kernels.h; behind them bf16 in AMX tiles.
_FORMS = (torch.float32, torch.bfloat16, torch.int8)
_TILES = len(_FORMS)


@dataclass
class Split:
    """Which rows of the step that is computed are a prompt's: those from `first` on, of `rows` in all.

    They may go through the matrix unit, which adds in another order than vectors do. A position's arithmetic must not depend
    on the step it happens to be in, so what decides is what it is, and nothing else: whatever has another number of rows than
    the step (the output head, experts) is left to vectors.
    """

    first: int = 0
    rows: int = -1


class PackedLinear:
    """x W^T + b over a weight repacked for the CPU. Invariant: `panels` and `bias` keep their addresses while it is used."""

    __slots__ = ("_bias_at", "_form", "_panels_at", "_run", "_split", "bias", "in_features", "out_features", "panels")

    def __init__(
        self, run: Callable[..., None], weight: Tensor | Int8Weight, bias: Tensor | None, place: Place, tiles: bool
    ) -> None:
        self._run = run
        self._split: Split | None = None
        tiled = tiles and weight.dtype is torch.bfloat16
        if isinstance(weight, Int8Weight):
            self.panels = place(pack_int8(weight))
        else:
            self.panels = pack_tiles(weight, place) if tiled else pack(weight, place)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach().to(_fp32).contiguous()
        if self.bias is not None:
            check("bias", self.bias, _fp32, (self.out_features,))
        self._form = _TILES if tiled else _FORMS.index(self.panels.dtype)
        self._panels_at = self.panels.data_ptr()
        self._bias_at = None if self.bias is None else self.bias.data_ptr()

    def tile(self, split: Split) -> None:
        """Rows of prompts go through the matrix unit from now on, where the weight lies in tiles; others do not.

        Only for what sees every row of a step, in the step's order.
        """
        if self._form == _TILES:
            self._split = split

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] fp32 contiguous -> [..., N]."""
        *rows, k = x.shape
        if x.dtype is not _fp32 or k != self.in_features or not x.is_contiguous() or not x.is_cpu:
            check("x", x, _fp32, (*rows, self.in_features))
        y = torch.empty((*rows, self.out_features), dtype=_fp32)
        n, m, split = self.out_features, y.numel() // self.out_features, self._split
        prompt = split.first if split is not None and split.rows == m else m
        self._run(self._form, x.data_ptr(), self._panels_at, self._bias_at, y.data_ptr(), m, n, k, prompt)
        return y

    def words(self, x: int, y: int) -> tuple[int, ...]:
        """As an instruction of a layer, which sees every row of a step; addresses of x and y."""
        return (LINEAR, self._form, x, self._panels_at, self._bias_at or 0, y, self.out_features, self.in_features)

    def unpack(self) -> Tensor:
        """The weight [N, K] in its own dtype, bit for bit; one of int8 as the fp32 matrix it stands for."""
        if self.panels.dtype is torch.int8:
            return unpack_int8(self.panels, self.out_features).widened()
        if self._form == _TILES:
            return unpack_tiles(self.panels, self.out_features, self.in_features)
        return unpack(self.panels, self.out_features)

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + (0 if self.bias is None else self.bias.nbytes)


class LoraRun:
    """`NativeKernels.lora` with all but x and y given. Invariant: the pools, index and slot live as long as this does."""

    __slots__ = ("_at", "_call", "_held", "is_bf16", "prompt", "rank", "slots", "tokens", "widths")

    def __init__(self, call: Callable[..., int], a: Tensor, b: Tensor, index: Tensor, slot: Tensor, prompt: int) -> None:
        self.slots, self.rank, out = b.shape
        self.widths, self.tokens = (a.shape[-1], out), index.numel()
        self.is_bf16 = a.dtype is torch.bfloat16
        check("a", a, torch.bfloat16 if self.is_bf16 else _fp32, (self.slots, self.rank, self.widths[0]))
        check("b", b, a.dtype, (self.slots, self.rank, out))
        check("index", index, torch.int64, (self.tokens,))
        check("slot", slot, torch.int64, (self.tokens,))
        self.prompt = prompt
        self._call, self._held = call, (a, b, index, slot)
        self._at = tuple(tensor.data_ptr() for tensor in self._held)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """x [T, in], y [T, out]: adds the rows' products to y."""
        x = x if x.is_contiguous() else x.contiguous()
        tokens, (width, out) = len(x), self.widths
        fits = x.dtype is y.dtype is _fp32 and x.numel() == tokens * width and y.numel() == tokens * out
        if not (fits and y.is_contiguous()):
            check("x", x, _fp32, (tokens, width))
            check("y", y, _fp32, (tokens, out))
        sizes = (self.tokens, tokens, self.slots, width, out, self.rank, self.prompt)
        broken = self._call(self.is_bf16, x.data_ptr(), y.data_ptr(), *self._at, *sizes)
        if broken:
            raise ValueError(LORA_RULES[broken])

    def words(self, x: int, y: int) -> tuple[int, ...]:
        """As an instruction of a layer; addresses of x and y."""
        width, out = self.widths
        return (LORA, int(self.is_bf16), x, y, *self._at, self.tokens, self.slots, width, out, self.rank, self.prompt)


class BottleneckRun:
    """`NativeKernels.bottleneck` with all but x and y given. Invariant: what it was given lives as long as this does."""

    __slots__ = ("_activation", "_at", "_call", "_held", "_own", "_sizes")

    def __init__(
        self, call: Callable[..., int], activation: str, weights: Sequence[Tensor], index: Tensor, slot: Tensor, own: bool
    ) -> None:
        slots, rank, width = weights[0].shape
        shapes = ((slots, rank, width), (slots, rank), (slots, rank, width), (slots, width))
        for name, tensor, shape in zip(("down", "down_bias", "up", "up_bias"), weights, shapes, strict=True):
            check(name, tensor, _fp32, shape)
        check("index", index, torch.int64, (index.numel(),))
        check("slot", slot, torch.int64, (index.numel(),))
        self._activation, self._own = ACTIVATIONS.index(activation), own
        self._call, self._held = call, (*weights, index, slot)
        self._at = tuple(tensor.data_ptr() for tensor in self._held)
        self._sizes = (index.numel(), slots, width, rank)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """x, y [T, H]: adds the rows' branches, of y itself where the run was made for that."""
        given = y if self._own else x
        n, slots, width, rank = self._sizes
        tokens = len(y)
        check("x", given, _fp32, (tokens, width))
        check("y", y, _fp32, (tokens, width))
        broken = self._call(self._activation, given.data_ptr(), y.data_ptr(), *self._at, n, tokens, slots, width, rank)
        if broken:
            raise ValueError(LORA_RULES[broken])

    def words(self, x: int, y: int) -> tuple[int, ...]:
        """As an instruction of a layer; addresses of x and y. Raises: ValueError unless x is y."""
        if not self._own:
            raise ValueError("a bottleneck is an instruction only where it reads the output it adds to")
        return (BOTTLENECK, self._activation, y, *self._at, *self._sizes)
