"""The loaded library as typed calls on torch tensors.

Owns the C signatures and the checks that keep a wrong tensor from reaching C: dtype, device, layout and shape here, index
ranges in C. Decides nothing: who uses which kernel is chosen above.

A step makes some hundreds of calls, so a call costs microseconds: bound functions, cached pointers, no views.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .int8 import PANEL, Int8Weight, pack_int8, unpack_int8

_INT = ctypes.c_int
_LONG = ctypes.c_int64
_FLOAT = ctypes.c_float
_POINTER = ctypes.c_void_p
_P = _POINTER
_L = _LONG

#: Run without the GIL, as torch's own operators do: other threads answer clients meanwhile.
_LONG_CALLS: dict[str, tuple[Any, ...]] = {
    "linear": (_INT, _P, _P, _P, _P, _L, _L, _L, _L),
    "lora": (_INT, _P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _L),
    "bottleneck": (_INT, *[_P] * 8, *[_L] * 5),
    "attention": (_P, _L, _L, _P, _P, _L, _L, _L, _L, _P, _L, _P, _P, _L, _L, _L, _FLOAT, _L, _FLOAT, _P),
    "layer": (_P, _L, _P),
    "log_sums": (_P, _P, _L, _L),
    "attend": (*[_P] * 5, _L, _P, _P, *[_L] * 4, _P, _P, _L, _P, _P, _L, _L, _L, _FLOAT, _L, _FLOAT, _P),
}
#: Microseconds each: giving the GIL away could cost a whole switch interval (5 ms) to get it back.
_SHORT_CALLS: dict[str, tuple[Any, ...]] = {
    "set_threads": (_INT,),
    "tiles": (),
    "write_kv": (_P, _L, _L, _P, _L, _L, _P, _P, _P, _L, _L, _L, _L, _L),
    "rms_norm": (_P, _P, _P, _L, _L, _FLOAT),
    "layer_norm": (_P, _P, _P, _P, _L, _L, _FLOAT),
    "silu_mul": (_P, _P, _P, _L, _L),
    "gelu_tanh_mul": (_P, _P, _P, _L, _L),
    "rotary": (_P, _L, _L, _P, _P, _L, _L, _L),
}
#: These return the number of the rule that an argument breaks.
_CHECKED = frozenset({"lora", "bottleneck", "attention", "attend", "write_kv", "layer"})

_ANSWERING = _CHECKED | {"tiles"}

_LORA_RULES = ("", "index names a row outside x", "slot names a slot outside the pool")
_ATTENTION_RULES = (
    "",
    "starts must ascend within the tokens of q",
    "a context is shorter than its row's tokens or longer than its table",
    "tables names a block outside the cache",
    "write names a position outside the cache",
)
_WRITE_RULES = ("", _ATTENTION_RULES[-1])

#: Instructions of a layer, in the order of `Kind` in layer.cpp.
NORM, LINEAR, LORA, WRITE, ATTEND, ADD, SILU_MUL, GELU_TANH_MUL, ADD_ROWS, MUL_ROWS, BOTTLENECK = range(11)
INSTRUCTION_WORDS, FRAME_WORDS = 16, 12
_LAYER_RULES = {LORA: _LORA_RULES, WRITE: _WRITE_RULES, ATTEND: _ATTENTION_RULES}

#: blocks, block_size, kv_heads, head_dim
CacheSize = tuple[int, int, int, int]

_fp32 = torch.float32
_WEIGHTS = (torch.float32, torch.bfloat16)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises: ValueError unless `tensor` is a contiguous CPU tensor of that dtype and shape."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu:
        return
    raise ValueError(
        f"{name} must be contiguous {dtype} {list(shape)} on the CPU, got {tensor.dtype} {list(tensor.shape)} "
        f"with strides {list(tensor.stride())} on {tensor.device}"
    )


def _check_strided(name: str, tensor: Tensor, dims: int) -> None:
    """Raises: ValueError unless `tensor` is an fp32 CPU tensor whose last dimension is dense."""
    if tensor.dtype is _fp32 and tensor.ndim == dims and tensor.stride(-1) == 1 and tensor.is_cpu:
        return
    raise ValueError(
        f"{name} must be fp32 with {dims} dimensions on the CPU, the last one dense, got {tensor.dtype} "
        f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
    )


def make_caches(zeros: Callable[[tuple[int, ...]], Tensor], size: CacheSize) -> tuple[Tensor, Tensor]:
    """Zeroed keys and values of one layer, [blocks, block_size, Hkv, D], in the order of memory that `attention` reads.

    A head's part of a block lies together, of keys with positions innermost: neither is copied or turned on its way.
    """
    blocks, block_size, kv_heads, dim = size
    keys, values = zeros((blocks, kv_heads, dim, block_size)), zeros((blocks, kv_heads, block_size, dim))
    return keys.permute(0, 3, 1, 2), values.permute(0, 2, 1, 3)


def _check_caches(keys: Tensor, values: Tensor, size: CacheSize) -> None:
    """Raises: ValueError unless both are fp32 caches of `make_caches`."""
    for name, cache, order in (("keys", keys, (0, 2, 3, 1)), ("values", values, (0, 2, 1, 3))):
        if cache.dtype is _fp32 and cache.shape == size and cache.permute(order).is_contiguous() and cache.is_cpu:
            continue
        raise ValueError(
            f"{name} must be {_fp32} {list(size)} on the CPU as make_caches lays it out, got {cache.dtype} "
            f"{list(cache.shape)} with strides {list(cache.stride())} on {cache.device}"
        )


#: Makes a tensor, mostly a view in another order, contiguous in memory of its own.
Place = Callable[[Tensor], Tensor]


def pack(weight: Tensor, place: Place = Tensor.contiguous) -> Tensor:
    """weight [N, K] -> panels [ceil(N / 32), K, 32], zero padded.

    fp32: columns in order. bf16: column j and column j + 16 of a panel share one 32-bit word, low half first, so that two
    integer operations widen both.

    Raises: ValueError when the weight is neither fp32 nor bf16.
    """
    if weight.dtype not in (_fp32, torch.bfloat16) or weight.ndim != 2:
        raise ValueError(f"weight must be fp32 or bf16 with 2 dimensions, got {weight.dtype} {list(weight.shape)}")
    n, k = weight.shape
    count = -(-n // PANEL)
    padded = F.pad(weight.detach(), (0, 0, 0, count * PANEL - n)) if n % PANEL else weight.detach()
    if weight.dtype is _fp32:
        return place(padded.reshape(count, PANEL, k).transpose(1, 2))
    return place(padded.reshape(count, 2, PANEL // 2, k).permute(0, 3, 2, 1)).view(count, k, PANEL)


def unpack(panels: Tensor, n: int) -> Tensor:
    """The weight [N, K] that `pack` was given, bit for bit."""
    count, k, _ = panels.shape
    if panels.dtype is _fp32:
        return panels.transpose(1, 2).reshape(count * PANEL, k)[:n]
    return panels.view(count, k, PANEL // 2, 2).permute(0, 3, 2, 1).reshape(count * PANEL, k)[:n]


def pack_tiles(weight: Tensor, place: Place = Tensor.contiguous) -> Tensor:
    """weight [N, K] bf16 -> AMX tiles [ceil(N / 32), ceil(K / 32), 2, 16, 16, 2], zero padded; see tiles.cpp.

    Raises: ValueError when the weight is not bf16.
    """
    if weight.dtype is not torch.bfloat16 or weight.ndim != 2:
        raise ValueError(f"weight must be bf16 with 2 dimensions, got {weight.dtype} {list(weight.shape)}")
    n, k = weight.shape
    panels, steps = -(-n // PANEL), -(-k // PANEL)
    padded = F.pad(weight.detach(), (0, steps * PANEL - k, 0, panels * PANEL - n))
    return place(padded.reshape(panels, 2, 16, steps, 16, 2).permute(0, 3, 1, 4, 2, 5))


def unpack_tiles(tiles: Tensor, n: int, k: int) -> Tensor:
    """The weight [N, K] that `pack_tiles` was given, bit for bit."""
    panels, steps = tiles.shape[:2]
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(panels * PANEL, steps * PANEL)[:n, :k].contiguous()


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
            _check("bias", self.bias, _fp32, (self.out_features,))
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
            _check("x", x, _fp32, (*rows, self.in_features))
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

    __slots__ = ("_at", "_call", "_held", "is_bf16", "rank", "slots", "tokens", "widths")

    def __init__(self, call: Callable[..., int], a: Tensor, b: Tensor, index: Tensor, slot: Tensor) -> None:
        self.slots, self.rank, out = b.shape
        self.widths, self.tokens = (a.shape[-1], out), index.numel()
        self.is_bf16 = a.dtype is torch.bfloat16
        _check("a", a, torch.bfloat16 if self.is_bf16 else _fp32, (self.slots, self.rank, self.widths[0]))
        _check("b", b, a.dtype, (self.slots, self.rank, out))
        _check("index", index, torch.int64, (self.tokens,))
        _check("slot", slot, torch.int64, (self.tokens,))
        self._call, self._held = call, (a, b, index, slot)
        self._at = tuple(tensor.data_ptr() for tensor in self._held)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """x [T, in], y [T, out]: adds the rows' products to y."""
        x = x if x.is_contiguous() else x.contiguous()
        tokens, (width, out) = len(x), self.widths
        fits = x.dtype is y.dtype is _fp32 and x.numel() == tokens * width and y.numel() == tokens * out
        if not (fits and y.is_contiguous()):
            _check("x", x, _fp32, (tokens, width))
            _check("y", y, _fp32, (tokens, out))
        broken = self._call(
            self.is_bf16, x.data_ptr(), y.data_ptr(), *self._at, self.tokens, tokens, self.slots, width, out, self.rank
        )
        if broken:
            raise ValueError(_LORA_RULES[broken])

    @property
    def space(self) -> int:
        """Floats of space that an instruction needs."""
        return self.tokens * self.rank + 1

    def words(self, x: int, y: int, low: int) -> tuple[int, ...]:
        """As an instruction of a layer; addresses of x, y and of its space."""
        width, out = self.widths
        return (LORA, int(self.is_bf16), x, y, *self._at, self.tokens, self.slots, width, out, self.rank, low)


class BottleneckRun:
    """`NativeKernels.bottleneck` with all but x and y given. Invariant: what it was given lives as long as this does."""

    __slots__ = ("_activation", "_at", "_call", "_held", "_own", "_sizes")

    def __init__(
        self, call: Callable[..., int], activation: str, weights: Sequence[Tensor], index: Tensor, slot: Tensor, own: bool
    ) -> None:
        slots, rank, width = weights[0].shape
        shapes = ((slots, rank, width), (slots, rank), (slots, rank, width), (slots, width))
        for name, tensor, shape in zip(("down", "down_bias", "up", "up_bias"), weights, shapes, strict=True):
            _check(name, tensor, _fp32, shape)
        _check("index", index, torch.int64, (index.numel(),))
        _check("slot", slot, torch.int64, (index.numel(),))
        self._activation, self._own = ACTIVATIONS.index(activation), own
        self._call, self._held = call, (*weights, index, slot)
        self._at = tuple(tensor.data_ptr() for tensor in self._held)
        self._sizes = (index.numel(), slots, width, rank)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """x, y [T, H]: adds the rows' branches, of y itself where the run was made for that."""
        given = y if self._own else x
        n, slots, width, rank = self._sizes
        tokens = len(y)
        _check("x", given, _fp32, (tokens, width))
        _check("y", y, _fp32, (tokens, width))
        broken = self._call(self._activation, given.data_ptr(), y.data_ptr(), *self._at, n, tokens, slots, width, rank)
        if broken:
            raise ValueError(_LORA_RULES[broken])

    @property
    def space(self) -> int:
        """Floats of space that an instruction needs."""
        n, _, _, rank = self._sizes
        return n * rank + 1

    def words(self, x: int, y: int, low: int) -> tuple[int, ...]:
        """As an instruction of a layer; addresses of x, y and of its space. Raises: ValueError unless x is y."""
        if not self._own:
            raise ValueError("a bottleneck is an instruction only where it reads the output it adds to")
        return (BOTTLENECK, self._activation, y, *self._at, *self._sizes, low)


class NativeKernels:
    """Every kernel of the library. All arithmetic is fp32; a row's bits do not depend on its batch or on threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        released, held = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        calls = {name: _bind(released, name, args) for name, args in _LONG_CALLS.items()}
        calls |= {name: _bind(held, name, args) for name, args in _SHORT_CALLS.items()}
        self._linear, self._lora, self._attention = calls["linear"], calls["lora"], calls["attention"]
        self._layer, self._bottleneck = calls["layer"], calls["bottleneck"]
        self._attend, self._write_kv, self._rotary = calls["attend"], calls["write_kv"], calls["rotary"]
        self._rms_norm, self._layer_norm = calls["rms_norm"], calls["layer_norm"]
        self._log_sums = calls["log_sums"]
        self._silu_mul, self._gelu_tanh_mul = calls["silu_mul"], calls["gelu_tanh_mul"]
        self._set_threads = calls["set_threads"]
        self.has_tiles = bool(calls["tiles"]())  # AMX
        self.split = Split()  # written before each step by whoever runs it
        self.set_threads(torch.get_num_threads())

    def set_threads(self, count: int) -> None:
        """Threads of every kernel from now on; keep it equal to torch's own number, the thread pool is shared."""
        self._set_threads(count)

    def packed_linear(
        self,
        weight: Tensor | Int8Weight,
        bias: Tensor | None = None,
        *,
        place: Place = Tensor.contiguous,
        tiles: bool = False,
    ) -> PackedLinear:
        """A copy of weight [N, K] (fp32, bf16 or int8, kept as it is) packed for this library.

        `tiles`: lay bf16 out for the matrix unit, where there is one; who uses it is said later, by `tile`.
        """
        return PackedLinear(self._linear, weight, bias, place, tiles and self.has_tiles)

    def tile(self, linear: PackedLinear) -> None:
        """Have it use the matrix unit for rows of prompts, if it was packed for that; see `PackedLinear.tile`."""
        linear.tile(self.split)

    def lora(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, index: Tensor, slot: Tensor) -> None:
        """y[index[i]] += (x[index[i]] @ a[slot[i]].T) @ b[slot[i]], in place, on these rows only.

        x [T, in], y [T, out] fp32; a [S, r, in], b [S, r, out] (B transposed) both fp32 or both bf16; index (without
        duplicates) and slot [n] int64. Rows of one slot should stand next to each other: they share its reads.
        """
        self.lora_over(a, b, index, slot)(x, y)

    def lora_over(self, a: Tensor, b: Tensor, index: Tensor, slot: Tensor) -> LoraRun:
        """`lora` with all but x and y given: what a step calls again and again is checked once."""
        return LoraRun(self._lora, a, b, index, slot)

    def bottleneck(self, x: Tensor, y: Tensor, activation: str, weights: Sequence[Tensor], index: Tensor, slot: Tensor) -> None:
        """y[i] += act(x[i] @ down[s].T + down_bias[s]) @ up[s] + up_bias[s] for i of index and s its slot, in place.

        x, y [T, H], maybe the same; weights: down [S, b, H], down_bias [S, b], up [S, b, H] (transposed), up_bias [S, H];
        `activation` one of ACTIVATIONS; index (without duplicates) and slot [n] int64.
        """
        self.bottleneck_over(activation, weights, index, slot)(x, y)

    def bottleneck_over(
        self, activation: str, weights: Sequence[Tensor], index: Tensor, slot: Tensor, *, own: bool = False
    ) -> BottleneckRun:
        """`bottleneck` with all but x and y given; `own`: x is y, whatever x is given."""
        return BottleneckRun(self._bottleneck, activation, weights, index, slot, own)

    def attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        starts: Tensor,
        contexts: Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """Causal attention of R rows over their pages: [T, Hq, D], contiguous; tokens of no row stay unwritten.

        q [T, Hq, D], any strides with D dense; keys, values [blocks, block_size, Hkv, D] of `make_caches`; tables [R, P],
        starts [R + 1] (row i's tokens are starts[i]..starts[i + 1]), contexts [R] (this step's tokens included), all int32.
        `window` > 0 hides positions <= own - window; `softcap` > 0 caps scores as Gemma 2 does.
        """
        _check_strided("q", q, 3)
        tokens, heads, dim = q.shape
        blocks, size, kv_heads, _ = keys.shape
        rows, pages = tables.shape
        if heads % kv_heads or dim < 1:
            raise ValueError(f"q has {heads} heads of {dim}, the cache {kv_heads} heads: not a multiple")
        _check_caches(keys, values, (blocks, size, kv_heads, dim))
        _check("tables", tables, torch.int32, (rows, pages))
        _check("starts", starts, torch.int32, (rows + 1,))
        _check("contexts", contexts, torch.int32, (rows,))
        out = torch.empty((tokens, heads, dim), dtype=_fp32)
        broken = self._attention(
            q.data_ptr(), q.stride(0), q.stride(1), keys.data_ptr(), values.data_ptr(), blocks, size, kv_heads, dim,
            tables.data_ptr(), pages, starts.data_ptr(), contexts.data_ptr(), rows, tokens, heads, scale, window,
            softcap, out.data_ptr(),
        )  # fmt: skip
        if broken:
            raise ValueError(_ATTENTION_RULES[broken])
        return out

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        turn: tuple[Tensor, Tensor] | None,
        keys: Tensor,
        values: Tensor,
        write: Tensor,
        tables: Tensor,
        starts: Tensor,
        contexts: Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """`rotary`, `write_kv` and `attention` in one call: [1, T, Hq * D]; q and k are left turned.

        q [1, T, Hq * D], k and v [1, T, Hkv * D], contiguous; `turn` (cos, sin) [1, T, d], None without rotary embedding;
        the rest as in `attention` and `write_kv`.
        """
        blocks, size, kv_heads, dim = keys.shape
        _, tokens, width = q.shape
        narrow = (1, tokens, kv_heads * dim)
        if width % narrow[2]:
            raise ValueError(f"q has {width} features, the cache {kv_heads} heads of {dim}: not a multiple")
        rows, pages = tables.shape
        for name, tensor, dtype, shape in (
            ("q", q, _fp32, (1, tokens, width)),
            ("k", k, _fp32, narrow),
            ("v", v, _fp32, narrow),
            ("write", write, torch.int64, (tokens,)),
            ("tables", tables, torch.int32, (rows, pages)),
            ("starts", starts, torch.int32, (rows + 1,)),
            ("contexts", contexts, torch.int32, (rows,)),
        ):
            _check(name, tensor, dtype, shape)
        _check_caches(keys, values, (blocks, size, kv_heads, dim))
        cos_at, sin_at, turned = None, None, 0
        if turn is not None:
            turned = turn[0].shape[-1]
            _check("cos", turn[0], _fp32, (1, tokens, turned))
            _check("sin", turn[1], _fp32, (1, tokens, turned))
            if turned > dim or turned % 2:
                raise ValueError(f"cos turns {turned} features of heads of {dim}")
            cos_at, sin_at = turn[0].data_ptr(), turn[1].data_ptr()
        out = torch.empty_like(q)
        broken = self._attend(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), cos_at, sin_at, turned, keys.data_ptr(), values.data_ptr(), blocks,
            size, kv_heads, dim, write.data_ptr(), tables.data_ptr(), pages, starts.data_ptr(), contexts.data_ptr(), rows,
            tokens, width // dim, scale, window, softcap, out.data_ptr(),
        )  # fmt: skip
        if broken:
            raise ValueError(_ATTENTION_RULES[broken])
        return out

    def layer(self, program: Tensor, frame: Tensor) -> None:
        """Run a decoder layer's instructions: program [count, 16], frame [12], int64 words as `layer.cpp` reads them.

        Addresses in them are not checked; index ranges are. Raises: ValueError naming the rule that an index breaks.
        """
        _check("program", program, torch.int64, (len(program), INSTRUCTION_WORDS))
        _check("frame", frame, torch.int64, (FRAME_WORDS,))
        broken = self._layer(program.data_ptr(), len(program), frame.data_ptr())
        if broken:
            rules = _LAYER_RULES.get(broken // 1000)
            raise ValueError(rules[broken % 1000] if rules else "a layer's program has an unknown instruction")

    def write_kv(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, write: Tensor) -> None:
        """k, v [1, Hkv, T, D] (any strides, D dense) -> rows write[t] of caches of `make_caches`."""
        _check_strided("k", k, 4)
        _check_strided("v", v, 4)
        _, kv_heads, tokens, dim = k.shape
        blocks, size = keys.shape[:2]
        if v.shape != k.shape:
            raise ValueError(f"k and v differ in shape: {list(k.shape)}, {list(v.shape)}")
        _check_caches(keys, values, (blocks, size, kv_heads, dim))
        _check("write", write, torch.int64, (tokens,))
        broken = self._write_kv(
            k.data_ptr(), k.stride(1), k.stride(2), v.data_ptr(), v.stride(1), v.stride(2), keys.data_ptr(),
            values.data_ptr(), write.data_ptr(), tokens, blocks, size, kv_heads, dim,
        )  # fmt: skip
        if broken:
            raise ValueError(_WRITE_RULES[broken])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight * x / sqrt(mean(x^2) + eps); x [..., H], weight [H] (for Gemma pass 1 + w)."""
        width = x.shape[-1]
        _check("x", x, _fp32, x.shape)
        _check("weight", weight, _fp32, (width,))
        y = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // width, width, eps)
        return y

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """x [..., H], weight and bias [H] or None."""
        width = x.shape[-1]
        _check("x", x, _fp32, x.shape)
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                _check(name, tensor, _fp32, (width,))
        y = torch.empty_like(x)
        scale, shift = (None if t is None else t.data_ptr() for t in (weight, bias))
        self._layer_norm(x.data_ptr(), scale, shift, y.data_ptr(), x.numel() // width, width, eps)
        return y

    def log_sums(self, x: Tensor) -> Tensor:
        """log(sum of e^x) of each row, [K] fp64; x [K, V] fp32 contiguous. NaN for a row that holds NaN or infinity."""
        rows, width = x.shape
        _check("x", x, _fp32, (rows, width))
        y = torch.empty(rows, dtype=torch.float64)
        self._log_sums(x.data_ptr(), y.data_ptr(), rows, width)
        return y

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, both [..., I]."""
        return self._gated(self._silu_mul, gate, up)

    def gelu_tanh_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """gelu(gate, approximate="tanh") * up, both [..., I]."""
        return self._gated(self._gelu_tanh_mul, gate, up)

    def _gated(self, run: Callable[..., None], gate: Tensor, up: Tensor) -> Tensor:
        _check("gate", gate, _fp32, gate.shape)
        _check("up", up, _fp32, gate.shape)
        width = gate.shape[-1]
        y = torch.empty_like(gate)
        run(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel() // width, width)
        return y

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Hugging Face's apply_rotary_pos_emb (half rotation), in place on the first d features.

        q [1, Hq, T, D], k [1, Hkv, T, D], any strides with D dense; cos, sin [1, T, d], d even and at most D.
        """
        tokens, dim = q.shape[2], cos.shape[-1]
        _check("cos", cos, _fp32, (1, tokens, dim))
        _check("sin", sin, _fp32, (1, tokens, dim))
        for name, x in (("q", q), ("k", k)):
            _check_strided(name, x, 4)
            if x.shape[0] != 1 or x.shape[2] != tokens or x.shape[3] < dim or dim % 2:
                raise ValueError(f"{name} {list(x.shape)} does not fit cos {list(cos.shape)}")
        cos_at, sin_at = cos.data_ptr(), sin.data_ptr()
        for x in (q, k):
            self._rotary(x.data_ptr(), x.stride(1), x.stride(2), cos_at, sin_at, x.shape[1], tokens, dim)


def _bind(library: ctypes.CDLL, name: str, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    function = library[f"adapterd_{name}"]
    function.argtypes = arguments
    function.restype = _INT if name in _ANSWERING else None
    return function
