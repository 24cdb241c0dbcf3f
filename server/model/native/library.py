"""The loaded library as typed calls on torch tensors.

Owns the C signatures. Decides nothing: who uses which kernel is chosen above.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...methods.base import NO_PROMPT
from .arguments import ATTENTION_RULES, LORA_RULES, WRITE_RULES, check, check_caches, check_strided
from .int8 import Int8Weight
from .layouts import Place
from .opcodes import ATTEND, FRAME_WORDS, INSTRUCTION_WORDS, LORA, WRITE
from .prepared import BottleneckRun, LoraRun, PackedLinear, Split

_INT = ctypes.c_int
_LONG = ctypes.c_int64
_FLOAT = ctypes.c_float
_POINTER = ctypes.c_void_p
_P = _POINTER
_L = _LONG

#: Run without the GIL, as torch's own operators do: other threads answer clients meanwhile.
_LONG_CALLS: dict[str, tuple[Any, ...]] = {
    "linear": (_INT, _P, _P, _P, _P, _L, _L, _L, _L),
    "lora": (_INT, _P, _P, _P, _P, _P, _P, *[_L] * 7),
    "bottleneck": (_INT, *[_P] * 8, *[_L] * 5),
    "attention": (_P, _L, _L, _P, _P, _L, _L, _L, _L, _P, _L, _P, _P, _L, _L, _L, _FLOAT, _L, _FLOAT, _P),
    "layer": (_P, _L, _P),
    "peaks": (_P, _P, _P, _L, _L),
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

_LAYER_RULES = {LORA: LORA_RULES, WRITE: WRITE_RULES, ATTEND: ATTENTION_RULES}

_fp32 = torch.float32


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
        self._peaks = calls["peaks"]
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

    def lora(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, index: Tensor, slot: Tensor, prompt: int = NO_PROMPT) -> None:
        """y[index[i]] += (x[index[i]] @ a[slot[i]].T) @ b[slot[i]], in place, on these rows only.

        x [T, in], y [T, out] fp32; a [S, r, in], b [S, r, out] (B transposed) both fp32 or both bf16; index (without
        duplicates) and slot [n] int64. Rows of one slot should stand next to each other: they share its reads. Rows from
        `prompt` on are a prompt's: through bf16 pools they use the matrix unit, if there is one.
        """
        self.lora_over(a, b, index, slot, prompt)(x, y)

    def lora_over(self, a: Tensor, b: Tensor, index: Tensor, slot: Tensor, prompt: int = NO_PROMPT) -> LoraRun:
        """`lora` with all but x and y given: what a step calls again and again is checked once."""
        return LoraRun(self._lora, a, b, index, slot, prompt)

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
        check_strided("q", q, 3)
        tokens, heads, dim = q.shape
        blocks, size, kv_heads, _ = keys.shape
        rows, pages = tables.shape
        if heads % kv_heads or dim < 1:
            raise ValueError(f"q has {heads} heads of {dim}, the cache {kv_heads} heads: not a multiple")
        check_caches(keys, values, (blocks, size, kv_heads, dim))
        check("tables", tables, torch.int32, (rows, pages))
        check("starts", starts, torch.int32, (rows + 1,))
        check("contexts", contexts, torch.int32, (rows,))
        out = torch.empty((tokens, heads, dim), dtype=_fp32)
        broken = self._attention(
            q.data_ptr(), q.stride(0), q.stride(1), keys.data_ptr(), values.data_ptr(), blocks, size, kv_heads, dim,
            tables.data_ptr(), pages, starts.data_ptr(), contexts.data_ptr(), rows, tokens, heads, scale, window,
            softcap, out.data_ptr(),
        )  # fmt: skip
        if broken:
            raise ValueError(ATTENTION_RULES[broken])
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
            check(name, tensor, dtype, shape)
        check_caches(keys, values, (blocks, size, kv_heads, dim))
        cos_at, sin_at, turned = None, None, 0
        if turn is not None:
            turned = turn[0].shape[-1]
            check("cos", turn[0], _fp32, (1, tokens, turned))
            check("sin", turn[1], _fp32, (1, tokens, turned))
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
            raise ValueError(ATTENTION_RULES[broken])
        return out

    def layer(self, program: Tensor, frame: Tensor) -> None:
        """Run a decoder layer's instructions: program [count, 16], frame [12], int64 words as `program.h` reads them.

        Addresses in them are not checked; index ranges are. Raises: ValueError naming the rule that an index breaks.
        """
        check("program", program, torch.int64, (len(program), INSTRUCTION_WORDS))
        check("frame", frame, torch.int64, (FRAME_WORDS,))
        broken = self._layer(program.data_ptr(), len(program), frame.data_ptr())
        if broken:
            rules = _LAYER_RULES.get(broken // 1000)
            raise ValueError(rules[broken % 1000] if rules else "a layer's program has an unknown instruction")

    def write_kv(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, write: Tensor) -> None:
        """k, v [1, Hkv, T, D] (any strides, D dense) -> rows write[t] of caches of `make_caches`."""
        check_strided("k", k, 4)
        check_strided("v", v, 4)
        _, kv_heads, tokens, dim = k.shape
        blocks, size = keys.shape[:2]
        if v.shape != k.shape:
            raise ValueError(f"k and v differ in shape: {list(k.shape)}, {list(v.shape)}")
        check_caches(keys, values, (blocks, size, kv_heads, dim))
        check("write", write, torch.int64, (tokens,))
        broken = self._write_kv(
            k.data_ptr(), k.stride(1), k.stride(2), v.data_ptr(), v.stride(1), v.stride(2), keys.data_ptr(),
            values.data_ptr(), write.data_ptr(), tokens, blocks, size, kv_heads, dim,
        )  # fmt: skip
        if broken:
            raise ValueError(WRITE_RULES[broken])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight * x / sqrt(mean(x^2) + eps); x [..., H], weight [H] (for Gemma pass 1 + w)."""
        width = x.shape[-1]
        check("x", x, _fp32, x.shape)
        check("weight", weight, _fp32, (width,))
        y = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // width, width, eps)
        return y

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """x [..., H], weight and bias [H] or None."""
        width = x.shape[-1]
        check("x", x, _fp32, x.shape)
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                check(name, tensor, _fp32, (width,))
        y = torch.empty_like(x)
        scale, shift = (None if t is None else t.data_ptr() for t in (weight, bias))
        self._layer_norm(x.data_ptr(), scale, shift, y.data_ptr(), x.numel() // width, width, eps)
        return y

    def peaks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where each row's first largest value stands, [K] int64, and log(sum of e^x), [K] fp64; x [K, V] fp32 contiguous.

        The sum is NaN for a row that holds NaN or infinity.
        """
        rows, width = x.shape
        check("x", x, _fp32, (rows, width))
        best, sums = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float64)
        self._peaks(x.data_ptr(), best.data_ptr(), sums.data_ptr(), rows, width)
        return best, sums

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, both [..., I]."""
        return self._gated(self._silu_mul, gate, up)

    def gelu_tanh_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """gelu(gate, approximate="tanh") * up, both [..., I]."""
        return self._gated(self._gelu_tanh_mul, gate, up)

    def _gated(self, run: Callable[..., None], gate: Tensor, up: Tensor) -> Tensor:
        check("gate", gate, _fp32, gate.shape)
        check("up", up, _fp32, gate.shape)
        width = gate.shape[-1]
        y = torch.empty_like(gate)
        run(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel() // width, width)
        return y

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Hugging Face's apply_rotary_pos_emb (half rotation), in place on the first d features.

        q [1, Hq, T, D], k [1, Hkv, T, D], any strides with D dense; cos, sin [1, T, d], d even and at most D.
        """
        tokens, dim = q.shape[2], cos.shape[-1]
        check("cos", cos, _fp32, (1, tokens, dim))
        check("sin", sin, _fp32, (1, tokens, dim))
        for name, x in (("q", q), ("k", k)):
            check_strided(name, x, 4)
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
